"""How long a start takes: to the first HTTP answer, to ready, and to the first chat answered."""

import asyncio
from typing import Final

from benchmarks import load
from benchmarks.command import Options, benchmark
from benchmarks.comparison import Comparison, Metric, Row, say
from benchmarks.contenders import MODEL_NAME, Kind, shown_settings, started
from benchmarks.load import Load

_METRICS: Final = (
    Metric("live_s", "first HTTP 200, s", "lower"),
    Metric("ready_s", "ready, s", "lower"),
    Metric("answered_s", "first answer, s", "lower"),
)
_PAIRS: Final = 5
_QUICK_PAIRS: Final = 3
_ONE_CHAT: Final = Load(concurrency=1, requests=1, max_tokens=1, stream=False, seed=0)
_NOTE: Final = "Plain vLLM has no liveness route and answers nothing before it is ready: its first 200 is /health."


def run(options: Options) -> Comparison:
    """Time to live, to ready and to the first answer."""
    pairs = options.pairs or (_QUICK_PAIRS if options.quick else _PAIRS)
    first, second = options.kinds
    say("one start of each that does not count: it reads every file into the page cache")
    for kind in (first, second):
        _start(kind, options)
    measured: dict[Kind, list[dict[str, float]]] = {first: [], second: []}
    for number in range(pairs):
        for kind in (first, second) if number % 2 == 0 else (second, first):
            measured[kind].append(_start(kind, options))
        ratio = measured[first][-1]["ready_s"] / measured[second][-1]["ready_s"]
        say(f"pair {number + 1} of {pairs}, ratio of the times to ready {ratio:.3f}")
    rows = [
        Row("start", metric, *([turn[metric.key] for turn in measured[kind]] for kind in (first, second)))
        for metric in _METRICS
    ]
    settings = {**shown_settings(options.model, options.engine_flags), "pairs": pairs}
    return Comparison((first.name, second.name), settings, rows, [_NOTE])


def _start(kind: Kind, options: Options) -> dict[str, float]:
    with started(kind, options.model, options.engine_flags) as contender:
        live_s = contender.wait_until_live()
        ready_s = contender.wait_until_ready()
        first_chat_s = 1 / asyncio.run(load.run(contender.url, MODEL_NAME, _ONE_CHAT))["requests_per_s"]
        return {"live_s": live_s, "ready_s": ready_s, "answered_s": ready_s + first_chat_s}


command: Final = benchmark("start-up", run)
