"""Plain vLLM, LiteLLM's proxy in front of that same plain vLLM, and Tidegate: the same chats to each, turn by turn.

The proxy stands in front of the plain server that is measured itself, so what it adds is seen without the noise between
two engines; the prompts of its turns are others, since that engine's prefix cache has seen those of the plain turns.
"""

import asyncio
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Final

import click

from benchmarks import litellm_proxy, load
from benchmarks.command import embedded_model
from benchmarks.comparison import Metric, machine, say
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
from benchmarks.front_end import SATURATED_STEPS_PER_S, Work, instant
from benchmarks.load import Load
from benchmarks.side_by_side_report import Block, SideBySide, Turn

_TOKENS: Final = Metric("tokens_per_s", "tokens/s", "higher")
_CHUNKS: Final = Metric("chunks_per_s", "chunks/s", "higher")
_REQUESTS: Final = Metric("requests_per_s", "requests/s", "higher")
_TTFT: Final = Metric("ttft_p50_ms", "TTFT p50, ms", "lower")
_ITL: Final = Metric("itl_p50_ms", "ITL p50, ms", "lower")
_ITL_TAIL: Final = Metric("itl_p95_ms", "ITL p95, ms", "lower")
_TOTAL: Final = Metric("total_p50_ms", "answer p50, ms", "lower")
_CPU: Final = Metric("front_cpu_us_per_token", "front-end µs CPU/token", "lower")
_STREAMS: Final = (_TOKENS, _TTFT, _ITL, _ITL_TAIL, _CPU)
_OTHER_PROMPTS: Final = 10**6
# vLLM closes a connection that rests for 5 s, and the proxy then fails now and then: it takes an old connection for a
# good one, and when it is saturated it is still reading an answer that vLLM has long sent.
_PATIENT: Final = {"VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "600"}
_NOTE: Final = (
    "Medians of all rounds; intervals hold the true median of the ratios with at least 90% confidence. ↑ higher is "
    "better, ↓ lower is better. The front-end of LiteLLM is the proxy and vLLM's own together."
)


@dataclass(frozen=True, slots=True)
class Entrant:
    """Who takes part. `cpu_s`: CPU seconds of its front-end so far. `other_prompts` is added to its turns' seeds."""

    contender: Contender
    cpu_s: Callable[[], float]
    other_prompts: int = 0


def engine_works(*, quick: bool) -> list[Work]:
    """The loads on a real engine."""
    tokens = 32 if quick else 64
    requests = {1: 3, 8: 16, 32: 32} if quick else {1: 8, 8: 32, 32: 96}
    streams = [
        Work(f"{n} stream{'s' if n > 1 else ''}", Load(n, requests[n], tokens, True, seed=n), _STREAMS)
        for n in requests
    ]
    return [*streams, Work("8 requests", Load(8, requests[8], tokens, False, seed=8), (_REQUESTS, _TOTAL, _CPU))]


def instant_works(*, quick: bool) -> list[Work]:
    """The loads on an engine that takes no time: what each way adds to one request alone, and what it can carry."""
    alone, many = (40, 200) if quick else (200, 1000)
    return [
        Work("1 stream of 16 tokens", Load(1, alone, 16, True, seed=1), (_TTFT, _TOTAL, _CPU)),
        Work("1 answer of 1 token", Load(1, alone, 1, False, seed=2), (_TOTAL, _CPU)),
        Work("32 streams, saturated", Load(32, 64, 256, True, seed=3), (_CHUNKS, _TOKENS, _CPU)),
        Work("32 answers of 1 token", Load(32, many, 1, False, seed=5), (_REQUESTS, _CPU)),
    ]


@contextmanager
def _entrants(model: str, flags: Sequence[str], workers: int, *, no_engine: bool) -> Iterator[list[Entrant]]:
    with ExitStack() as stack, variables_set(_PATIENT):
        limited = stack.enter_context(limited_tenant())

        def serving(kind: Kind, given: Sequence[str]) -> Entrant:
            if no_engine:
                measured = stack.enter_context(instant(kind, model, SATURATED_STEPS_PER_S, given))
                return Entrant(measured.contender, measured.cpu_s)
            contender = stack.enter_context(started(kind, model, given))
            return Entrant(contender, contender.front_cpu_s)

        plain, ours = serving(PLAIN, flags), serving(TIDEGATE, [*flags, *limited])
        proxy = stack.enter_context(litellm_proxy.proxied(plain.contender, workers))
        entrants = [
            plain,
            Entrant(proxy, lambda: proxy.total_cpu_s() + plain.cpu_s(), _OTHER_PROMPTS),
            replace(ours, contender=replace(ours.contender, key=KEY)),
        ]
        for entrant in entrants:
            ready_s = entrant.contender.wait_until_ready()
            say(f"{entrant.contender.name} ready after {ready_s:.1f} s (all were starting)")
        yield entrants


def _block(entrants: Sequence[Entrant], work: Work, rounds: int) -> Block:
    """Measure rounds of turns, each of which begins with another contender."""
    warm_up = replace(work.load, requests=work.load.concurrency, max_tokens=min(4, work.load.max_tokens))
    for entrant in entrants:
        _turn(entrant, entrants, warm_up)
    turns: list[tuple[Turn, ...]] = []
    for number in range(rounds):
        turn = replace(work.load, seed=1000 * (number + 1) + work.load.seed)
        first = number % len(entrants)
        done = {one.contender.name: _turn(one, entrants, turn) for one in (*entrants[first:], *entrants[:first])}
        turns.append(tuple(done[entrant.contender.name] for entrant in entrants))
        key = work.metrics[0].key
        shown = ", ".join(f"{name} {figures[key]:.4g}" for name, figures in done.items())
        say(f"{work.name}: round {number + 1} of {rounds}, {key}: {shown}")
    return Block(work.name, work.metrics, turns)


def _turn(entrant: Entrant, everybody: Sequence[Entrant], work: Load) -> Turn:
    for one in everybody:
        one.contender.wait_until_idle()
    before_s = entrant.cpu_s()
    server, own = entrant.contender, replace(work, seed=work.seed + entrant.other_prompts)
    figures = asyncio.run(load.run(server.url, MODEL_NAME, own, server.key))
    figures[_CPU.key] = (entrant.cpu_s() - before_s) / (work.requests * work.max_tokens) * 1e6
    return figures


@click.command("side-by-side")
@click.argument("flags", nargs=-1, type=click.UNPROCESSED, metavar="[-- VLLM FLAGS]")
@click.option("--instant-engine", "no_engine", is_flag=True, help="Over an engine that takes no time: front-ends only.")
@click.option("--model", help="Model folder or name. [default: the embedded model]")
@click.option("--quick", is_flag=True, help="Less load and fewer rounds: minutes, and more noise.")
@click.option("--rounds", type=click.IntRange(1), help="Rounds of three turns. [9; 5 with --quick]")
@click.option("--workers", type=click.IntRange(1), default=1, show_default=True, help="Processes of LiteLLM's proxy.")
@click.option("--json", "as_json", is_flag=True, help="Add one JSON object as the last line.")
def command(
    flags: tuple[str, ...], model: str | None, rounds: int | None, workers: int, *, no_engine: bool, quick: bool,
    as_json: bool,
) -> None:  # fmt: skip
    """Plain vLLM, LiteLLM's proxy in front of it, and Tidegate, on the same engine settings."""
    model, rounds = model or embedded_model(), rounds or (5 if quick else 9)
    works = instant_works(quick=quick) if no_engine else engine_works(quick=quick)
    try:
        with _entrants(model, flags, workers, no_engine=no_engine) as entrants:
            blocks = [_block(entrants, work, rounds) for work in works]
    except ContenderFailed as failure:
        raise click.ClickException(str(failure)) from failure
    settings: dict[str, Any] = {
        **shown_settings(model, flags), **_PATIENT, "rounds": rounds, "instant_engine": no_engine,
        "litellm_workers": workers,
    }  # fmt: skip
    result = SideBySide(
        [entrant.contender.name for entrant in entrants], blocks, settings,
        {**machine(), "litellm": litellm_proxy.VERSION}, _NOTE,
    )  # fmt: skip
    result.print()
    if as_json:
        click.echo(json.dumps({"benchmark": "side-by-side", **result.as_dict()}))
