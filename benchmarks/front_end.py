"""What the front-end costs per token and per request, over an engine that takes no time (`instant_engine.py`)."""

import asyncio
import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import click

from benchmarks import instant_engine, load, several_front_ends
from benchmarks.command import embedded_model
from benchmarks.comparison import Comparison, Metric, Row, say
from benchmarks.contenders import (
    KEY,
    MODEL_NAME,
    PLAIN,
    TIDEGATE,
    Contender,
    ContenderFailed,
    Kind,
    limited_tenant,
    shown_settings,
    started,
    variables_set,
)
from benchmarks.load import Load

_CPU: Final = Metric("cpu_us_per_token", "front-end µs CPU/token", "lower")
_TTFT_P50: Final = Metric("ttft_p50_ms", "TTFT p50, ms", "lower")
_TTFT_P99: Final = Metric("ttft_p99_ms", "TTFT p99, ms", "lower")
_TOKENS: Final = Metric("tokens_per_s", "tokens/s", "higher")
_REQUESTS: Final = Metric("requests_per_s", "requests/s", "higher")
_REQUEST_CPU: Final = Metric("cpu_us_per_request", "front-end µs CPU/request", "lower")
_STREAM_METRICS: Final = (_CPU, _TTFT_P50, _TTFT_P99)
_ANSWER_METRICS: Final = (_REQUESTS, _REQUEST_CPU)
SATURATED_STEPS_PER_S: Final = 100_000
_TOKENS_OF_A_STREAM: Final = 128  # a short answer in a chat; with fewer, what a request costs hides what a token costs
# Every stream runs: how many at a time an engine takes is not the front-end's matter.
_ENGINE_FLAGS: Final = ("--max-num-seqs", "1024")

Command = Callable[[str, int, Sequence[str]], list[str]]


@dataclass(frozen=True, slots=True)
class Work:
    """One measured load, at the step rate that the engine was started with."""

    name: str
    load: Load
    metrics: Sequence[Metric]


@dataclass(frozen=True, slots=True)
class Measured:
    """A contender and the file in which its engine's stand-in accounts for itself."""

    contender: Contender
    cost_file: Path

    def cpu_s(self) -> float:
        return self.contender.front_cpu_s() - instant_engine.cost_s(self.cost_file)


def _works(*, quick: bool) -> dict[int, list[Work]]:
    """The loads by the engine's steps a second."""
    streams = [1, 32, 256] if quick else [1, 32, 256, 1024]
    paced = [Work(f"{n} streams", Load(n, n, _TOKENS_OF_A_STREAM, True, seed=n), _STREAM_METRICS) for n in streams]
    saturated = [
        Work("saturated, 32 streams", Load(32, 64, 256, True, seed=3), (_CPU, _TOKENS)),
        Work("answers of 1 token", Load(32, 400 if quick else 2000, 1, False, seed=5), _ANSWER_METRICS),
    ]
    return {25: paced, SATURATED_STEPS_PER_S: saturated}


@click.command("front-end")
@click.option("--model", help="Model folder or name; only its configuration and tokenizer matter. [default: embedded]")
@click.option("--quick", is_flag=True, help="No 1,024 streams and fewer answers: minutes.")
@click.option("--pairs", type=click.IntRange(1), default=5, show_default=True, help="Pairs of turns.")
@click.option("--noise", is_flag=True, help="Compare plain vLLM with itself.")
@click.option("--json", "as_json", is_flag=True, help="Add one JSON object as the last line.")
@click.option("--api-server-count", type=click.IntRange(1), default=1, help="Compare so many processes with one.")
@click.argument("flags", nargs=-1, type=click.UNPROCESSED, metavar="[-- TIDEGATE FLAGS]")
def command(
    model: str | None,
    quick: bool,
    pairs: int,
    noise: bool,
    as_json: bool,
    api_server_count: int,
    flags: tuple[str, ...],
) -> None:
    """CPU per streamed token, TTFT and requests/s of the front-end, over an engine that takes no time."""
    model = model or embedded_model()
    if api_server_count > 1:
        _several(model, api_server_count, flags, pairs=pairs, quick=quick, as_json=as_json)
        return
    first = PLAIN if noise else TIDEGATE
    rows: list[Row] = []
    for steps_per_s, works in _works(quick=quick).items():
        with ExitStack() as stack:
            limited = [] if noise else stack.enter_context(limited_tenant())
            ours = stack.enter_context(instant(first, model, steps_per_s, () if noise else [*limited, *flags]))
            if not noise:
                ours = replace(ours, contender=replace(ours.contender, key=KEY))
            theirs = stack.enter_context(instant(PLAIN, model, steps_per_s, ()))
            for measured in (ours, theirs):
                measured.contender.wait_until_ready()
            for work in works:
                rows += _measure(work, ours, theirs, pairs)
    settings = {**shown_settings(model, _ENGINE_FLAGS), "tidegate_flags": flags, "pairs": pairs}
    note = "The engine's stand-in is not counted. Its steps: 25 a second, or as many as there are tokens to take."
    limits = "Tidegate counts a tenant's limits in Redis, and nothing is refused."
    comparison = Comparison((first.name, PLAIN.name), settings, rows, [note, limits])
    comparison.print()
    if as_json:
        click.echo(json.dumps({"benchmark": "front-end", **_headline(rows), **comparison.as_dict()}))


def _several(model: str, count: int, flags: tuple[str, ...], *, pairs: int, quick: bool, as_json: bool) -> None:
    try:
        comparisons = several_front_ends.both(count, model, flags, pairs=pairs, quick=quick)
    except ContenderFailed as failure:
        raise click.ClickException(str(failure)) from failure
    for comparison in comparisons:
        comparison.print()
    if as_json:
        compared = [comparison.as_dict() for comparison in comparisons]
        click.echo(json.dumps({"benchmark": "several-front-ends", "comparisons": compared}))


def _headline(rows: Sequence[Row]) -> dict[str, float]:
    """The ratios that matter most, under fixed names."""
    wanted = {
        ("32 streams", _CPU): "cpu_per_token_ratio",
        ("saturated, 32 streams", _CPU): "cpu_per_token_ratio_saturated",
        ("256 streams", _TTFT_P99): "ttft_p99_ratio_256",
        ("answers of 1 token", _REQUESTS): "requests_per_s_ratio",
    }
    return {wanted[key]: statistics.median(row.ratios) for row in rows if (key := (row.load, row.metric)) in wanted}


@contextmanager
def instant(kind: Kind, model: str, steps_per_s: int, flags: Sequence[str]) -> Iterator[Measured]:
    """A server of this kind over an engine that makes so many steps a second."""
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        cost_file = Path(folder) / "cost"
        cost_file.write_bytes(bytes(8))
        variables = {
            instant_engine.COST_FILE_ENV: str(cost_file),
            instant_engine.STEPS_PER_S_ENV: str(steps_per_s),
        }
        with (
            variables_set(variables),
            started(replace(kind, command=_command(kind)), model, (*_ENGINE_FLAGS, *flags)) as contender,
        ):
            yield Measured(contender, cost_file)


def _command(kind: Kind) -> Command:
    def command(model: str, port: int, flags: Sequence[str]) -> list[str]:
        words = kind.command(model, port, flags)
        skipped = words.index("serve") + 1 if kind.name == TIDEGATE.name else 3  # python -m MODULE
        return [sys.executable, "-m", "benchmarks.instant_engine", kind.name, *words[skipped:]]

    return command


def _measure(work: Work, ours: Measured, theirs: Measured, pairs: int) -> list[Row]:
    warm_up = replace(work.load, requests=work.load.concurrency, max_tokens=min(4, work.load.max_tokens))
    for measured in (ours, theirs):
        _turn(measured, warm_up)
    turns: list[tuple[dict[str, float], dict[str, float]]] = []
    for number in range(pairs):
        turn = replace(work.load, seed=1000 * (number + 1) + work.load.seed)
        if number % 2 == 0:
            pair = _turn(ours, turn), _turn(theirs, turn)
        else:
            second = _turn(theirs, turn)
            pair = _turn(ours, turn), second
        turns.append(pair)
        key = work.metrics[0].key
        say(f"{work.name}: pair {number + 1} of {pairs}, {key} ratio {pair[0][key] / pair[1][key]:.3f}")
    return [
        Row(work.name, metric, [a[metric.key] for a, _ in turns], [b[metric.key] for _, b in turns])
        for metric in work.metrics
    ]


def _turn(measured: Measured, work: Load) -> dict[str, float]:
    before_s = measured.cpu_s()
    figures = asyncio.run(load.run(measured.contender.url, MODEL_NAME, work, measured.contender.key))
    used_us = (measured.cpu_s() - before_s) * 1e6
    figures[_CPU.key] = used_us / (work.requests * work.max_tokens)
    figures[_REQUEST_CPU.key] = used_us / work.requests
    return figures
