"""What streams notice of long histories that arrive beside them, over an engine that takes no time.

Parsing, validating, fitting, rendering and tokenizing a long history takes long, and whatever of it holds up the event
loop holds up everybody's tokens.
"""

import asyncio
import json
import random
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any, Final

import aiohttp
import click

from benchmarks import load
from benchmarks.command import embedded_model
from benchmarks.comparison import Comparison, Metric, Row, say
from benchmarks.contenders import MODEL_NAME, PLAIN, TIDEGATE, shown_settings, variables_set
from benchmarks.front_end import Measured, instant
from benchmarks.load import WORDS, Load, LoadFailed

_GAP_MAX: Final = Metric("itl_max_ms", "longest gap between tokens, ms", "lower")
_GAP_P99: Final = Metric("itl_p99_ms", "ITL p99, ms", "lower")
_ANSWERED: Final = Metric("long_total_s", "until all histories are answered, s", "lower")
_METRICS: Final = (_GAP_MAX, _GAP_P99, _ANSWERED)
_STEPS_PER_S: Final = 200  # a gap is a step at least, and is to show what is more than that
_STREAMS: Final = 4
_HISTORIES: Final = 50
_TURNS: Final = 100
_WORDS_PER_TURN: Final = 500  # some 72,000 tokens in all, with the embedded model's tokenizer
_FLAGS: Final = ("--max-model-len", "131072")
_LONGER_THAN_TRAINED: Final = {"VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1"}  # no engine computes them
_LEAD_S: Final = 1.0  # streams run by then
_TIMEOUT: Final = aiohttp.ClientTimeout(total=600)


@click.command("long-renders")
@click.option("--model", help="Model folder or name; only its configuration and tokenizer matter. [default: embedded]")
@click.option("--quick", is_flag=True, help="Ten histories instead of fifty: minutes.")
@click.option("--continued", is_flag=True, help="Each history was there before, without its last turn.")
@click.option("--pairs", type=click.IntRange(1), default=3, show_default=True, help="Pairs of turns.")
@click.option("--json", "as_json", is_flag=True, help="Add one JSON object as the last line.")
def command(model: str | None, quick: bool, continued: bool, pairs: int, as_json: bool) -> None:
    """The longest gap in running streams while fifty histories of 72,000 tokens arrive. Tidegate and plain vLLM."""
    model = model or embedded_model()
    histories = _HISTORIES // 5 if quick else _HISTORIES
    turns: list[tuple[dict[str, float], dict[str, float]]] = []
    with (
        variables_set(_LONGER_THAN_TRAINED),
        instant(TIDEGATE, model, _STEPS_PER_S, _FLAGS) as ours,
        instant(PLAIN, model, _STEPS_PER_S, _FLAGS) as theirs,
    ):
        for measured in (ours, theirs):
            measured.contender.wait_until_ready()
            asyncio.run(_turn(measured, 1, seed=0, continued=continued))
        for number in range(pairs):
            first, second = (ours, theirs) if number % 2 == 0 else (theirs, ours)
            figures = {side: asyncio.run(_turn(side, histories, number + 1, continued)) for side in (first, second)}
            turns.append((figures[ours], figures[theirs]))
            say(f"pair {number + 1} of {pairs}: {figures[ours]} {figures[theirs]}")
    named = "continued histories" if continued else "histories"
    rows = [
        Row(f"{histories} {named}", metric, [a[metric.key] for a, _ in turns], [b[metric.key] for _, b in turns])
        for metric in _METRICS
    ]
    settings = {**shown_settings(model, _FLAGS), "pairs": pairs}
    note = f"{_STREAMS} streams of {_STEPS_PER_S} tokens a second. The client takes part of the machine, too."
    comparison = Comparison((TIDEGATE.name, PLAIN.name), settings, rows, [note])
    comparison.print()
    if as_json:
        click.echo(json.dumps({"benchmark": "long-renders", **comparison.as_dict()}))


async def _turn(measured: Measured, histories: int, seed: int, continued: bool) -> dict[str, float]:
    """Run streams until every history is answered. `continued`: the turn before was answered without being measured."""
    url = measured.contender.url
    figures: list[dict[str, float]] = []
    answered = asyncio.Event()

    async def stream() -> None:
        number = 0
        while not answered.is_set():
            number += 1
            turn = Load(_STREAMS, _STREAMS, 4 * _STEPS_PER_S, True, seed=1000 * seed + number)
            figures.append(await load.run(url, MODEL_NAME, turn))

    with ProcessPoolExecutor(1, get_context("spawn")) as beside:
        loop = asyncio.get_running_loop()
        bodies = [_history(1000 * seed + number, _TURNS) for number in range(histories)]
        if continued:
            earlier = [_history(1000 * seed + number, _TURNS - 2) for number in range(histories)]
            await loop.run_in_executor(beside, _answer_all, url, earlier)
        await loop.run_in_executor(beside, int)  # starts it
        streaming = asyncio.create_task(stream())
        await asyncio.sleep(_LEAD_S)
        took_s = await loop.run_in_executor(beside, _answer_all, url, bodies)
        answered.set()
        await streaming
    return {
        _GAP_MAX.key: max(turn["itl_max_ms"] for turn in figures),
        _GAP_P99.key: max(turn["itl_p99_ms"] for turn in figures),
        _ANSWERED.key: took_s,
    }


def _answer_all(url: str, bodies: Sequence[bytes]) -> float:
    """Send all histories at once. Returns the seconds until every one is answered."""
    return asyncio.run(_answered(url, bodies))


async def _answered(url: str, bodies: Sequence[bytes]) -> float:
    loop = asyncio.get_running_loop()
    async with aiohttp.ClientSession(url, timeout=_TIMEOUT) as session, asyncio.TaskGroup() as clients:
        began_s = loop.time()
        for body in bodies:
            clients.create_task(_answer(session, body))
    return loop.time() - began_s


async def _answer(session: aiohttp.ClientSession, body: bytes) -> None:
    headers = {"content-type": "application/json"}
    async with session.post("/v1/chat/completions", data=body, headers=headers) as response:
        if response.status != 200:
            raise LoadFailed(f"{response.status}: {(await response.text())[:300]}")
        await response.read()


def _history(seed: int, turns: int) -> bytes:
    """A request with a history that no cache has seen, as it goes over the wire. More turns of a seed go on from it."""
    words = random.Random(seed)
    messages: Sequence[dict[str, Any]] = [
        {
            "role": "assistant" if turn % 2 else "user",
            "content": " ".join(words.choices(WORDS, k=_WORDS_PER_TURN)),
        }
        for turn in range(turns + 1)
    ]
    return json.dumps({"model": MODEL_NAME, "messages": messages, "max_tokens": 1}).encode()
