"""What fitting a history costs Tidegate, seen from its client: pairs of requests, one fitted and one not.

The engine keeps the model's tokenizer and template, but one layer of random weights, so that it takes little of a
request's time and blurs it little. A history that fits is asked with `truncation` `auto` and `disabled`; one that is
too long is asked whole and as the messages that are left of it, which gives the same prompt. The prompts are cached.

What is too long is also asked without the engine: whole to `/v1/context/fit`, a dry run that counts, cuts and renders,
and what is left of it to `/tokenize`, which renders. What a fit costs that cuts nothing is too little to be seen in a
request, so all three are also measured in this process (`fit_in_process.py`).
"""

import json
import statistics
import time
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import httpx
from prometheus_client.parser import text_string_to_metric_families

from benchmarks import conversations, fit_in_process
from benchmarks.command import Options, benchmark
from benchmarks.comparison import Comparison, Metric, Row, median_interval, say
from benchmarks.contenders import MODEL_NAME, TIDEGATE, shown_settings, started
from benchmarks.conversations import Message
from benchmarks.load import LoadFailed
from server.engine.embedded_model import ensure_embedded_model

_WINDOW: Final = 8192
_RESERVE_TOKENS: Final = 1024
_FLAGS: Final = (
    "--max-model-len", str(_WINDOW), "--block-size", "32",
    "--load-format", "dummy", "--hf-overrides", '{"num_hidden_layers": 1}',
)  # fmt: skip
_KIND: Final = "counselling-en"
# English takes four to five bytes a token, so this much of the room is sure to fit, or fits only when counted.
_SURE_SHARE: Final = 0.6
_COUNTED_SHARE: Final = 3.0
_LONG_TOKENS: Final = 100_000
_LEAST_EXCHANGE_TOKENS: Final = 32
_LONG_BAR: Final = 1.3
_PAIRS: Final = 400
_QUICK_PAIRS: Final = 100
_WARM_UP: Final = 5
_TIMEOUT_S: Final = 600.0
_FIT_TIME: Final = "tidegate_context_fit_duration_seconds"

_REQUEST: Final = Metric("request_ms", "request, ms", "lower")
_DRY_RUN: Final = Metric("dry_run_ms", "without the engine, ms", "lower")

Ask = Callable[[], float]


@dataclass(frozen=True, slots=True)
class _Case:
    """Two ways to ask, each of which returns milliseconds. `seen` are the messages that the model sees."""

    load: str
    metric: Metric
    fitted: Ask
    other: Ask
    seen: Sequence[Message]
    bar: float | None = None


class _Server:
    """Tidegate, as its client sees it."""

    def __init__(self, client: httpx.Client) -> None:
        self._client = client

    def post(self, path: str, messages: Sequence[Message]) -> Any:
        return self._client.post(path, json=_body(messages)).raise_for_status().json()

    def ask_ms(self, path: str, body: bytes, *, cut: bool = False) -> float:
        """The time of a request. Raises `LoadFailed` where the history is not cut, or left whole, as it should be."""
        started_s = time.perf_counter()
        answer = self._client.post(path, content=body, headers={"content-type": "application/json"})
        took_ms = (time.perf_counter() - started_s) * 1000
        if answer.status_code != httpx.codes.OK or ("x-context-truncated" in answer.headers) != cut:
            raise LoadFailed(f"{answer.status_code}, headers {dict(answer.headers)}: {answer.text[:300]}")
        return took_ms

    def chat(self, messages: Sequence[Message], truncation: str, *, cut: bool = False) -> Ask:
        body = {**_body(messages), "max_tokens": 1, "temperature": 0, "truncation": truncation}
        return partial(self.ask_ms, "/v1/chat/completions", _encoded(body), cut=cut)

    def dry(self, path: str, messages: Sequence[Message]) -> Ask:
        return partial(self.ask_ms, path, _encoded(_body(messages)))

    def fits(self) -> tuple[float, float]:
        """Number and seconds, so far, of the fits that had to count, by the server's own clock."""
        page = text_string_to_metric_families(self._client.get("/metrics").text)
        samples = {sample.name: sample.value for family in page for sample in family.samples}
        return samples.get(f"{_FIT_TIME}_count", 0.0), samples.get(f"{_FIT_TIME}_sum", 0.0)


def run(options: Options) -> Comparison:
    """What fitting a history adds to a request. Tidegate only; with --noise neither of a pair is fitted."""
    pairs = options.pairs or (_QUICK_PAIRS if options.quick else _PAIRS)
    flags = (*_FLAGS, *options.engine_flags)
    rows: list[Row] = []
    notes = [
        "A request's time is all of it: sending and parsing the body, validating every message, fitting, rendering, "
        "the engine's step for one token, and the answer. Without the engine it is the dry run against `/tokenize`.",
    ]
    with (
        started(TIDEGATE, options.model, flags) as contender,
        httpx.Client(base_url=contender.url, timeout=_TIMEOUT_S, trust_env=False) as client,
    ):
        say(f"tidegate ready after {contender.wait_until_ready():.1f} s")
        server = _Server(client)
        for case in _cases(server):
            row, note = _measured(server, case, pairs, noise=options.noise)
            rows.append(row)
            notes.append(note)
            say(note)
    for note in fit_in_process.measured(Path(options.model) if options.model else ensure_embedded_model()):
        notes.append(note)
        say(note)
    names = ("fitted", "again" if options.noise else "not fitted")
    return Comparison(names, {**shown_settings(options.model, flags), "pairs": pairs}, rows, notes)


def _cases(server: _Server) -> Iterator[_Case]:
    said = conversations.generate(_KIND, 0, _LONG_TOKENS // _LEAST_EXCHANGE_TOKENS)

    def count(messages: Sequence[Message]) -> int:
        tokens: int = server.post("/tokenize", messages)["count"]
        return tokens

    def history(size: int, of: Callable[[list[Message]], int]) -> list[Message]:
        """The shortest one of this size."""
        turns = range(len(said.exchanges))
        return said.messages(bisect_left(turns, size, key=lambda turn: of(said.messages(turn))))

    for share, how in ((_SURE_SHARE, "fit by bytes"), (_COUNTED_SHARE, "fit when counted")):
        messages = history(int(share * (_WINDOW - _RESERVE_TOKENS)), _bytes)
        asks = server.chat(messages, "auto"), server.chat(messages, "disabled")
        yield _Case(f"{count(messages):,} tokens, {how}", _REQUEST, *asks, messages)
    messages = history(_LONG_TOKENS, count)
    kept = [messages[i] for i in server.post("/v1/context/fit", messages)["kept_messages"]]
    load = f"{count(messages):,} tokens, cut to {count(kept):,}"
    asks = server.chat(messages, "auto", cut=True), server.chat(kept, "disabled")
    yield _Case(load, _REQUEST, *asks, kept, _LONG_BAR)
    yield _Case(load, _DRY_RUN, server.dry("/v1/context/fit", messages), server.dry("/tokenize", kept), kept, _LONG_BAR)


def _bytes(messages: Sequence[Message]) -> int:
    return sum(len(message["content"].encode()) for message in messages)


def _body(messages: Sequence[Message]) -> dict[str, Any]:
    return {"model": MODEL_NAME, "messages": messages}


def _encoded(body: dict[str, Any]) -> bytes:
    return json.dumps(body, ensure_ascii=False).encode()


def _measured(server: _Server, case: _Case, pairs: int, *, noise: bool) -> tuple[Row, str]:
    """Ask in pairs; every other pair begins with the other request."""
    asks = (case.other if noise else case.fitted), case.other
    for _ in range(_WARM_UP):
        for ask in asks:
            ask()
    fits, fit_s = server.fits()
    first, second = list[float](), list[float]()
    for number in range(pairs):
        for ask, times_ms in list(zip(asks, (first, second), strict=True))[:: 1 if number % 2 == 0 else -1]:
            times_ms.append(ask())
    more_fits, more_s = server.fits()
    row = Row(case.load, case.metric, first, second)
    note = _note(case, row, _render_ms(server, case.seen, pairs))
    if more_fits > fits:
        clock_ms = (more_s - fit_s) / (more_fits - fits) * 1000
        note += f" By the server's own clock counting and planning took {clock_ms:.2f} ms."
    return row, note


def _render_ms(server: _Server, messages: Sequence[Message], repeats: int) -> float:
    """The median time that `/tokenize` takes for these messages more than for a single word."""
    whole, word = server.dry("/tokenize", messages), server.dry("/tokenize", [{"role": "user", "content": "a"}])
    return statistics.median(whole() - word() for _ in range(repeats))


def _note(case: _Case, row: Row, render_ms: float) -> str:
    name = f"{case.load}, {case.metric.label.removesuffix(', ms')}"
    render = f"A render of what the model sees takes {render_ms:.2f} ms (`/tokenize`, beyond its time for one word)."
    if case.bar is not None:
        ratio = statistics.median(row.ratios)
        return f"{name}: ratio {ratio:.2f}, bar < {case.bar} {'met' if ratio < case.bar else 'not met'}. {render}"
    added_ms = [ours - theirs for ours, theirs in zip(row.first, row.second, strict=True)]
    median, (low, high) = statistics.median(added_ms), median_interval(added_ms)
    return (
        f"{name}: fitting adds {median:.3f} ms ({low:.3f} to {high:.3f}), which is {median / render_ms:.1%} "
        f"({low / render_ms:.1%} to {high / render_ms:.1%}) of a render. {render}"
    )


command: Final = benchmark("fit-overhead", run)
