"""What the server around the engine costs: the same chats to Tidegate and to plain vLLM, turn by turn."""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from benchmarks import load
from benchmarks.command import Options, benchmark
from benchmarks.comparison import Comparison, Metric, Row, say
from benchmarks.contenders import MODEL_NAME, Contender, shown_settings, started
from benchmarks.load import Load

_FRONT_CPU: Final = Metric("front_cpu_us_per_token", "front-end µs CPU/token", "lower")
_STREAMS: Final = (
    Metric("tokens_per_s", "tokens/s", "higher"),
    Metric("ttft_p50_ms", "TTFT p50, ms", "lower"),
    Metric("itl_p50_ms", "ITL p50, ms", "lower"),
    Metric("itl_p95_ms", "ITL p95, ms", "lower"),
    _FRONT_CPU,
)
_REQUESTS: Final = (
    Metric("requests_per_s", "requests/s", "higher"),
    Metric("total_p50_ms", "answer p50, ms", "lower"),
    _FRONT_CPU,
)
_IDLE: Final = "idle_cpu_ratio"


@dataclass(frozen=True, slots=True)
class Plan:
    """How much is measured: `requests` in a turn, by concurrency."""

    pairs: int
    max_tokens: int
    requests: Mapping[int, int]


_FULL: Final = Plan(pairs=9, max_tokens=64, requests={1: 8, 8: 32, 32: 96})
_QUICK: Final = Plan(pairs=5, max_tokens=32, requests={1: 3, 8: 16, 32: 32})

Pair = tuple[dict[str, float], dict[str, float]]


def run(options: Options) -> Comparison:
    """Throughput, TTFT and ITL of 1, 8 and 32 streams, and requests."""
    plan = _QUICK if options.quick else _FULL
    plan = replace(plan, pairs=options.pairs or plan.pairs)
    first, second = options.kinds
    rows: list[Row] = []
    idle = 0.0
    with (
        started(first, options.model, options.engine_flags) as ours,
        started(second, options.model, options.engine_flags) as theirs,
    ):
        for contender in (ours, theirs):
            say(f"{contender.name} ready after {contender.wait_until_ready():.1f} s (both were starting)")
        for stream in (True, False):
            for concurrency in plan.requests:
                pairs = _pairs(ours, theirs, plan, concurrency, stream=stream)
                rows += _rows(_name(concurrency, stream=stream), _STREAMS if stream else _REQUESTS, pairs)
                idle = max([idle, *(turn[_IDLE] for pair in pairs for turn in pair)])
    settings = {**shown_settings(options.model, options.engine_flags), "pairs": plan.pairs}
    note = f"The server that waited for its turn used at most {idle:.1%} of one core."
    return Comparison((first.name, second.name), settings, rows, [note])


def _pairs(ours: Contender, theirs: Contender, plan: Plan, concurrency: int, *, stream: bool) -> list[Pair]:
    """Measure pairs of turns; every other pair begins with the other contender."""
    work = Load(concurrency, plan.requests[concurrency], plan.max_tokens, stream, seed=concurrency)
    for contender, other in ((ours, theirs), (theirs, ours)):  # unmeasured: a first time is slower than the next
        _turn(contender, other, replace(work, requests=concurrency, max_tokens=4))
    pairs: list[Pair] = []
    for number in range(plan.pairs):
        turn = replace(work, seed=1000 * (number + 1) + concurrency)
        if number % 2 == 0:
            pair = _turn(ours, theirs, turn), _turn(theirs, ours, turn)
        else:
            second, first = _turn(theirs, ours, turn), _turn(ours, theirs, turn)
            pair = first, second
        pairs.append(pair)
        ratio = pair[0]["tokens_per_s"] / pair[1]["tokens_per_s"]
        say(f"{_name(concurrency, stream=stream)}: pair {number + 1} of {plan.pairs}, throughput ratio {ratio:.3f}")
    return pairs


def _turn(contender: Contender, idle: Contender, work: Load) -> dict[str, float]:
    """One contender's figures for one load, with the CPU that its front-end and the waiting contender used."""
    idle.wait_until_idle()
    front_s, idle_s = contender.front_cpu_s(), idle.total_cpu_s()
    figures = asyncio.run(load.run(contender.url, MODEL_NAME, work))
    tokens = work.requests * work.max_tokens
    wall_s = tokens / figures["tokens_per_s"]
    figures[_FRONT_CPU.key] = (contender.front_cpu_s() - front_s) / tokens * 1e6
    figures[_IDLE] = (idle.total_cpu_s() - idle_s) / wall_s
    return figures


def _rows(name: str, metrics: Sequence[Metric], pairs: list[Pair]) -> list[Row]:
    return [
        Row(name, metric, [ours[metric.key] for ours, _ in pairs], [theirs[metric.key] for _, theirs in pairs])
        for metric in metrics
    ]


def _name(concurrency: int, *, stream: bool) -> str:
    return f"{concurrency} {'stream' if stream else 'request'}{'s' if concurrency > 1 else ''}"


command: Final = benchmark("serving", run)
