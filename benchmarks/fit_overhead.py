"""What fitting a history costs Tidegate, seen from its client: pairs of requests, one fitted and one not.

The engine keeps the model's tokenizer and template, but one layer of random weights, so that it takes little of a
request's time and blurs it little. A history that fits is asked with `truncation` `auto` and `disabled`; one that is
too long is asked whole and as the messages that are left of it. A pair's prompts are the same, and are cached.
"""

import json
import statistics
import time
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import httpx
from prometheus_client.parser import text_string_to_metric_families

from benchmarks import conversations
from benchmarks.command import Options, benchmark
from benchmarks.comparison import Comparison, Metric, Row, median_interval, say
from benchmarks.contenders import MODEL_NAME, TIDEGATE, shown_settings, started
from benchmarks.conversations import Message
from benchmarks.load import LoadFailed

_WINDOW: Final = 8192
_RESERVE_TOKENS: Final = 1024
_FLAGS: Final = (
    "--max-model-len", str(_WINDOW), "--block-size", "32",
    "--load-format", "dummy", "--hf-overrides", '{"num_hidden_layers": 1}',
)  # fmt: skip
# English takes four to five bytes a token, so this much of the room is sure to fit, or fits only when counted.
_SURE_SHARE: Final = 0.6
_COUNTED_SHARE: Final = 3.0
_LONG_TOKENS: Final = 100_000
_LEAST_EXCHANGE_TOKENS: Final = 32
_LONG_BAR: Final = 1.3
_PAIRS: Final = 400
_QUICK_PAIRS: Final = 100
_LONG_SHARE: Final = 4  # pairs of the long history are as many times fewer
_WARM_UP: Final = 5
_KIND: Final = "counselling-en"
_REQUEST: Final = Metric("request_ms", "whole request, ms", "lower")
_FIT_TIME: Final = "tidegate_context_fit_duration_seconds"
_TIMEOUT_S: Final = 600.0


@dataclass(frozen=True, slots=True)
class _Case:
    """A fitted request and what it is compared with. `history` is what the model sees of it."""

    load: str
    fitted: bytes
    other: bytes
    history: Sequence[Message]
    cut: bool = False


class _Server:
    """Tidegate, as its client sees it."""

    def __init__(self, client: httpx.Client) -> None:
        self._client = client

    def post(self, path: str, **body: Any) -> Any:
        return self._client.post(path, json={"model": MODEL_NAME, **body}).raise_for_status().json()

    def ask_ms(self, body: bytes, *, cut: bool) -> float:
        """The time of a chat. Raises `LoadFailed` where it is not fitted as it should be."""
        started_s = time.perf_counter()
        answer = self._client.post("/v1/chat/completions", content=body, headers={"content-type": "application/json"})
        took_ms = (time.perf_counter() - started_s) * 1000
        if answer.status_code != httpx.codes.OK or ("x-context-truncated" in answer.headers) != cut:
            raise LoadFailed(f"{answer.status_code}, headers {dict(answer.headers)}: {answer.text[:300]}")
        return took_ms

    def render_ms(self, messages: Sequence[Message], repeats: int) -> float:
        """The median time that `/tokenize` takes for these messages more than for a single word."""

        def took_ms(asked: Sequence[Message]) -> float:
            started_s = time.perf_counter()
            self.post("/tokenize", messages=asked)
            return (time.perf_counter() - started_s) * 1000

        word = [{"role": "user", "content": "a"}]
        return statistics.median(took_ms(messages) - took_ms(word) for _ in range(repeats))

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
        "A pair's two requests end in the same cached prompt and generate one token. Their times hold sending and "
        "parsing the body, validating each message, rendering, the engine's step and the answer."
    ]
    with (
        started(TIDEGATE, options.model, flags) as contender,
        httpx.Client(base_url=contender.url, timeout=_TIMEOUT_S, trust_env=False) as client,
    ):
        say(f"tidegate ready after {contender.wait_until_ready():.1f} s")
        server = _Server(client)
        for case in _cases(server):
            number = max(1, pairs // _LONG_SHARE) if case.cut else pairs
            row, note = _measured(server, case, number, noise=options.noise)
            rows.append(row)
            notes.append(note)
            say(note)
    settings = {**shown_settings(options.model, flags), "pairs": pairs, "pairs_of_the_long_history": number}
    return Comparison(("fitted", "again" if options.noise else "not fitted"), settings, rows, notes)


def _cases(server: _Server) -> Iterator[_Case]:
    said = conversations.generate(_KIND, 0, _LONG_TOKENS // _LEAST_EXCHANGE_TOKENS)

    def count(messages: Sequence[Message]) -> int:
        tokens: int = server.post("/tokenize", messages=messages)["count"]
        return tokens

    def history(size: int, of: Callable[[list[Message]], int]) -> list[Message]:
        """The shortest one that has this size."""
        turns = range(len(said.exchanges))
        return said.messages(bisect_left(turns, size, key=lambda turn: of(said.messages(turn))))

    for share, how in ((_SURE_SHARE, "that fit by their bytes"), (_COUNTED_SHARE, "that fit only when counted")):
        messages = history(int(share * (_WINDOW - _RESERVE_TOKENS)), _bytes)
        load = f"{count(messages):,} tokens {how}"
        yield _Case(load, _body(messages, "auto"), _body(messages, "disabled"), messages)
    messages = history(_LONG_TOKENS, count)
    kept = [messages[i] for i in server.post("/v1/context/fit", messages=messages)["kept_messages"]]
    load = f"{count(messages):,} tokens in {len(messages):,} messages, cut to {count(kept):,} tokens"
    yield _Case(load, _body(messages, "auto"), _body(kept, "disabled"), kept, cut=True)


def _bytes(messages: Sequence[Message]) -> int:
    return sum(len(message["content"].encode()) for message in messages)


def _body(messages: Sequence[Message], truncation: str) -> bytes:
    body = {"model": MODEL_NAME, "messages": messages, "max_tokens": 1, "temperature": 0, "truncation": truncation}
    return json.dumps(body, ensure_ascii=False).encode()


def _measured(server: _Server, case: _Case, pairs: int, *, noise: bool) -> tuple[Row, str]:
    """Ask in pairs; every other pair begins with the other request."""

    def fitted_ms() -> float:
        return server.ask_ms(case.other, cut=False) if noise else server.ask_ms(case.fitted, cut=case.cut)

    def other_ms() -> float:
        return server.ask_ms(case.other, cut=False)

    for _ in range(_WARM_UP):
        fitted_ms(), other_ms()
    fits, fit_s = server.fits()
    first, second = list[float](), list[float]()
    for number in range(pairs):
        for ask_ms, times in ((fitted_ms, first), (other_ms, second))[:: 1 if number % 2 == 0 else -1]:
            times.append(ask_ms())
    fits, fit_s = server.fits()[0] - fits, server.fits()[1] - fit_s
    counted_ms = fit_s / fits * 1000 if fits else None
    row = Row(case.load, _REQUEST, first, second)
    return row, _note(case, row, counted_ms, server.render_ms(case.history, pairs))


def _note(case: _Case, row: Row, counted_ms: float | None, render_ms: float) -> str:
    clock = "" if counted_ms is None else f" Counting and planning took {counted_ms:.2f} ms by the server's own clock."
    render = f"a render of what the model sees takes {render_ms:.2f} ms (`/tokenize`, with its larger body and answer)"
    if case.cut:
        ratio = statistics.median(row.ratios)
        held = "met" if ratio < _LONG_BAR else "not met"
        return (
            f"{case.load}: {ratio:.2f} times the request of what is left (bar: < {_LONG_BAR}, {held}); {render}.{clock}"
        )
    added_us = [(ours - theirs) * 1000 for ours, theirs in zip(row.first, row.second, strict=True)]
    low, high = median_interval(added_us)
    median = statistics.median(added_us)
    return (
        f"{case.load}: fitting adds {median:.0f} µs ({low:.0f} to {high:.0f}), and {render}: "
        f"{median / render_ms / 10:.1f} %.{clock}"
    )


command: Final = benchmark("fit-overhead", run)
