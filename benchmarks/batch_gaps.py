"""What a batch costs the people who chat meanwhile, and how fast it is when nobody does.

Chats come at half of what the server can do, in turns without and with a batch; the figures are those of the chats.
Alone, the batch is compared with vLLM's own `run_batch`.
"""

import asyncio
import json
import math
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

import click
import httpx
import psutil

from benchmarks import open_loop
from benchmarks.command import embedded_model
from benchmarks.contenders import FLAGS, MODEL_NAME, PROJECT, TIDEGATE, Contender, environment, started
from benchmarks.traffic import Arrival, Caller, Traffic

_CHAT_PATH: Final = "/v1/chat/completions"
_CHATTER: Final = Caller("chat", "default", 1.0)
_WORKER: Final = Caller("batch", "batch", 1.0)
_LOAD: Final = 0.5
_GRACE_S: Final = 60.0
_OTHER_WORDS: Final = 10**9
_LOOK_INTERVAL_S: Final = 0.05
_VALIDATED_LINES: Final = 50_000
# How tqdm ends its bar: "150/150 [00:07<00:00, 20.21req/s]".
_RATE: Final = re.compile(r"([0-9.]+)(req/s|s/req)\]")
_ENDLESS_LINES: Final = 4000
_GOING_ON: Final = ("validating", "in_progress", "finalizing", "cancelling")
_MIB: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class Size:
    """How much is measured."""

    batch_lines: int
    turn_s: float
    pairs: int


@dataclass(frozen=True, slots=True)
class Figures:
    """Bars: the ratio of p99 at most 1.15, throughput at least 0.95, validation under 10 s and 200 MiB."""

    validation_s: float
    validation_extra_mib: float
    batch_tokens_per_s: float
    run_batch_tokens_per_s: float
    throughput_ratio: float
    chats_per_s: float
    chats: int
    answered_without: int
    answered_with: int
    ttft_p50_without_s: float
    ttft_p50_with_s: float
    ttft_p99_without_s: float
    ttft_p99_with_s: float
    ttft_p99_ratio: float
    batch_tokens_per_s_in_the_gaps: float


class Batches:
    """The Files and Batches API of one server."""

    def __init__(self, url: str) -> None:
        self._http = httpx.Client(base_url=url, timeout=120, trust_env=False)

    def start(self, content: bytes) -> dict[str, Any]:
        sent = self._http.post("/v1/files", files={"file": ("in.jsonl", content)}, data={"purpose": "batch"})
        order = {"input_file_id": sent.raise_for_status().json()["id"], "endpoint": _CHAT_PATH}
        made = self._http.post("/v1/batches", json={**order, "completion_window": "24h"})
        batch: dict[str, Any] = made.raise_for_status().json()
        return batch

    def until(self, batch: dict[str, Any], *statuses: str) -> dict[str, Any]:
        """Wait for one of the states; any state that is not going on is waited for as well."""
        while batch["status"] not in statuses and batch["status"] in _GOING_ON:
            time.sleep(_LOOK_INTERVAL_S)
            batch = self._http.get(f"/v1/batches/{batch['id']}").raise_for_status().json()
        return batch

    def ended(self, batch: dict[str, Any]) -> dict[str, Any]:
        return self.until(batch, "completed")

    def cancelled(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Cancel it and wait for its end."""
        self._http.post(f"/v1/batches/{batch['id']}/cancel").raise_for_status()
        return self.until({**batch, "status": "cancelling"}, "cancelled")


def _lines(arrivals: Sequence[Arrival]) -> bytes:
    return b"".join(_line(n, arrival) for n, arrival in enumerate(arrivals))


def _line(number: int, arrival: Arrival) -> bytes:
    left_out = ("stream", "stream_options")
    body = {name: value for name, value in arrival.body(MODEL_NAME).items() if name not in left_out}
    request = {"custom_id": f"line-{number}", "method": "POST", "url": _CHAT_PATH, "body": body}
    return json.dumps(request).encode() + b"\n"


def _work(lines: int, seed: int) -> bytes:
    """So many lines, with the lengths that chats have."""
    return _lines(Traffic(float(lines), 2.0, (_WORKER,), seed).arrivals()[:lines])


@contextmanager
def _peak_rss(contender: Contender) -> Iterator[list[int]]:
    """The resident bytes of the process that speaks HTTP: at the beginning, and the most of them."""
    process, over = psutil.Process(contender.process.pid), threading.Event()
    seen = [process.memory_info().rss] * 2

    def watch() -> None:
        while not over.wait(0.02):
            seen[1] = max(seen[1], process.memory_info().rss)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield seen
    finally:
        over.set()
        thread.join()


def _validation(contender: Contender, batches: Batches) -> tuple[float, float]:
    """Seconds and extra MiB for a file of 50,000 lines."""
    arrival = Arrival(0.0, _WORKER, 20, 8, 1)
    content = b"".join(_line(n, arrival) for n in range(_VALIDATED_LINES))
    with _peak_rss(contender) as seen:
        batch = batches.start(content)
        begun_s = time.perf_counter()
        batch = batches.until(batch, "in_progress")
        took_s = time.perf_counter() - begun_s
    batches.cancelled(batch)
    return took_s, (seen[1] - seen[0]) / _MIB


def _alone(batches: Batches, lines: int) -> tuple[float, float]:
    """Output tokens per second of a batch with nobody else there, and its lines per second."""
    batch = batches.until(batches.start(_work(lines, seed=1)), "in_progress")
    begun_s = time.perf_counter()
    batch = batches.ended(batch)
    took_s = time.perf_counter() - begun_s
    return batch["usage"]["output_tokens"] / took_s, lines / took_s


def _turn(contender: Contender, rate_per_s: float, duration_s: float, pair: int, *, beside: bool) -> list[float]:
    """The times to first token of one turn of chats; one that failed took for ever.

    Both turns of a pair have the same arrivals and lengths, in other words: the prefix cache knows none of them.
    """
    arrivals = Traffic(rate_per_s, duration_s, (_CHATTER,), pair).arrivals()
    arrivals = [replace(arrival, seed=arrival.seed + _OTHER_WORDS * beside) for arrival in arrivals]
    turn = asyncio.run(open_loop.run(contender.url, arrivals, _GRACE_S))
    return [math.inf if outcome.ttft_s is None else outcome.ttft_s for outcome in turn.outcomes]


def _run_batch(model: str, lines: int, flags: Sequence[str]) -> float:
    """Output tokens per second of vLLM's `run_batch`, by the clock of its progress bar, which leaves out its start."""
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "in.jsonl", Path(folder) / "out.jsonl"
        source.write_bytes(_work(lines, seed=1))
        command = [
            sys.executable, "-m", "vllm.entrypoints.launchers.run_batch", "-i", str(source), "-o", str(target),
            "--model", model, "--served-model-name", MODEL_NAME, *FLAGS, *flags,
        ]  # fmt: skip
        done = subprocess.run(
            command, env=environment(flags), cwd=PROJECT, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        answers = [json.loads(line)["response"]["body"] for line in target.read_text(encoding="utf-8").splitlines()]
    number, unit = _RATE.findall(done.stderr.decode(errors="replace"))[-1]
    lines_per_s = float(number) if unit == "req/s" else 1 / float(number)
    tokens: int = sum(answer["usage"]["completion_tokens"] for answer in answers)
    return lines_per_s * tokens / len(answers)


def _quantile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, math.ceil(share * len(ordered)) - 1)]


@dataclass(slots=True)
class _Chats:
    """Times to first token in both kinds of turns, and what batches did in the gaps."""

    without: list[float]
    beside: list[float]
    gap_tokens: int = 0
    gap_s: float = 0.0


def _chats(contender: Contender, batches: Batches, rate_per_s: float, size: Size) -> _Chats:
    chats = _Chats([], [])
    for pair in range(size.pairs):
        contender.wait_until_idle()
        chats.without += _turn(contender, rate_per_s, size.turn_s, pair, beside=False)
        batch = batches.until(batches.start(_work(_ENDLESS_LINES, seed=100 + pair)), "in_progress")
        begun_s = time.perf_counter()
        chats.beside += _turn(contender, rate_per_s, size.turn_s, pair, beside=True)
        chats.gap_s += time.perf_counter() - begun_s
        chats.gap_tokens += batches.cancelled(batch)["usage"]["output_tokens"]
    return chats


def measure(model: str, size: Size, flags: Sequence[str]) -> Figures:
    """All figures, one after the other."""
    with (
        tempfile.TemporaryDirectory(prefix="batches-") as data,
        started(TIDEGATE, model, [*flags, "--data-folder", data]) as contender,
    ):
        contender.wait_until_ready()
        batches = Batches(contender.url)
        batches.ended(batches.start(_work(20, seed=3)))  # the first steps of an engine are slow
        validation_s, extra_mib = _validation(contender, batches)
        tokens_per_s, lines_per_s = _alone(batches, size.batch_lines)
        chats = _chats(contender, batches, _LOAD * lines_per_s, size)
    theirs = _run_batch(model, size.batch_lines, flags)
    p99_without, p99_with = _quantile(chats.without, 0.99), _quantile(chats.beside, 0.99)
    return Figures(
        validation_s=validation_s,
        validation_extra_mib=extra_mib,
        batch_tokens_per_s=tokens_per_s,
        run_batch_tokens_per_s=theirs,
        throughput_ratio=tokens_per_s / theirs,
        chats_per_s=_LOAD * lines_per_s,
        chats=len(chats.without),
        answered_without=sum(map(math.isfinite, chats.without)),
        answered_with=sum(map(math.isfinite, chats.beside)),
        ttft_p50_without_s=_quantile(chats.without, 0.5),
        ttft_p50_with_s=_quantile(chats.beside, 0.5),
        ttft_p99_without_s=p99_without,
        ttft_p99_with_s=p99_with,
        ttft_p99_ratio=p99_with / p99_without,
        batch_tokens_per_s_in_the_gaps=chats.gap_tokens / chats.gap_s,
    )


@click.command("batch-gaps", help=__doc__)
@click.argument("engine_flags", nargs=-1, type=click.UNPROCESSED, metavar="[-- VLLM FLAGS]")
@click.option("--model", help="Model folder or name. [default: the embedded model]")
@click.option("--quick", is_flag=True, help="Less load: minutes, and more noise.")
@click.option("as_json", "--json", is_flag=True, help="Add one JSON object as the last line.")
def command(engine_flags: tuple[str, ...], model: str | None, quick: bool, as_json: bool) -> None:
    size = Size(150, 20.0, 1) if quick else Size(600, 60.0, 3)
    figures = measure(model or embedded_model(), size, engine_flags)
    for name, value in asdict(figures).items():
        click.echo(f"{name:<32} {value:.3f}" if isinstance(value, float) else f"{name:<32} {value}")
    if as_json:
        click.echo(json.dumps({"benchmark": "batch-gaps", **asdict(figures)}))
