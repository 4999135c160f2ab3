"""What clients notice when the engine is killed, again and again, and what it leaves behind.

In every round two streams run and four requests wait behind them; the engine's process gets a kill -9. Measured are
when the streams end, when the first waiting request has its answer, whether any of them is lost, whether the port ever
refuses a connection, and what the server holds after the round. Plain vLLM has one round: it does not come back.
"""

import asyncio
import json
import statistics
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, Final

import aiohttp
import click
import psutil
from rich.console import Console
from rich.table import Table

from benchmarks.command import embedded_model
from benchmarks.comparison import say
from benchmarks.contenders import MODEL_NAME, PLAIN, TIDEGATE, Contender, ContenderFailed, Kind, started
from benchmarks.holdings import Holdings, holdings

_FLAGS: Final = ("--max-num-seqs", "2")
_PATIENT: Final = ("--ttft-slo", "36000")  # two long answers hold all there is, and nobody is to be refused for that
_STREAMS: Final = 2
_WAITING: Final = 4
_LONG_TOKENS: Final = 1900
_SHORT_TOKENS: Final = 8
_PROBE_INTERVAL_S: Final = 0.02
_ROUND_TIMEOUT_S: Final = 300.0
_EXIT_TIMEOUT_S: Final = 60.0
_TIMEOUT: Final = aiohttp.ClientTimeout(total=_ROUND_TIMEOUT_S)


@dataclass(slots=True)
class Round:
    """One kill. Times are seconds after it; `build_s` is what the server says the new engine took."""

    streams_ended_s: list[float] = field(default_factory=list)
    answered_s: list[float] = field(default_factory=list)
    lost: int = 0
    probes: int = 0
    refused: int = 0
    build_s: float = 0.0
    held: Holdings | None = None


class KillRound:
    """Runs one round against one server."""

    def __init__(self, contender: Contender, session: aiohttp.ClientSession) -> None:
        self._contender = contender
        self._session = session
        self._round = Round()
        self._killed_at_s = 0.0

    async def run(self) -> Round:
        begun = [asyncio.Event() for _ in range(_STREAMS)]
        async with asyncio.timeout(_ROUND_TIMEOUT_S):
            streams = [asyncio.create_task(self._stream(event)) for event in begun]
            await asyncio.gather(*(event.wait() for event in begun))
            waiting = [asyncio.create_task(self._wait()) for _ in range(_WAITING)]
            await asyncio.sleep(0.3)
            async with self._probing():
                self._killed_at_s = time.perf_counter()
                _engine_of(self._contender).kill()
                await asyncio.gather(*streams, *waiting)
        return self._round

    async def _stream(self, begun: asyncio.Event) -> None:
        try:
            async with self._session.post("/v1/chat/completions", json=_body(_LONG_TOKENS, stream=True)) as response:
                async for line in response.content:
                    if line.startswith(b"data: "):
                        begun.set()
        except aiohttp.ClientError:  # plain vLLM closes the connection
            begun.set()
        if self._killed_at_s:  # on a machine that others slow down, one may be over before the other begins
            self._round.streams_ended_s.append(time.perf_counter() - self._killed_at_s)

    async def _wait(self) -> None:
        try:
            async with self._session.post("/v1/chat/completions", json=_body(_SHORT_TOKENS, stream=False)) as response:
                answered = response.status == 200
                await response.read()
        except aiohttp.ClientError:
            answered = False
        if answered:
            self._round.answered_s.append(time.perf_counter() - self._killed_at_s)
        else:
            self._round.lost += 1

    @asynccontextmanager
    async def _probing(self) -> AsyncIterator[None]:
        """Inside it the port is tried again and again, each time with a connection of its own."""
        probing = asyncio.create_task(self._probe())
        try:
            yield
        finally:
            probing.cancel()
            await asyncio.wait({probing})

    async def _probe(self) -> None:
        connector = aiohttp.TCPConnector(force_close=True)
        async with aiohttp.ClientSession(self._contender.url, connector=connector) as session:
            while True:
                self._round.probes += 1
                try:
                    async with session.get(self._contender.live_path) as response:
                        await response.read()
                except aiohttp.ClientError:
                    self._round.refused += 1
                await asyncio.sleep(_PROBE_INTERVAL_S)


@click.command("engine-kills")
@click.option("--model", help="Model folder or name. [default: the embedded model]")
@click.option("--kills", type=click.IntRange(1), default=100, show_default=True, help="How many rounds.")
@click.option("--quick", is_flag=True, help="Five rounds.")
@click.option("as_json", "--json", is_flag=True, help="Add one JSON object as the last line.")
def command(model: str | None, kills: int, quick: bool, as_json: bool) -> None:
    """What a killed engine costs its clients, and that nothing of it stays. Tidegate, and plain vLLM once."""
    chosen = model or embedded_model()
    try:
        rounds = asyncio.run(_rounds(TIDEGATE, chosen, 5 if quick else kills))
        plain, exit_code = asyncio.run(_plain_round(chosen))
    except ContenderFailed as failure:
        raise click.ClickException(str(failure)) from failure
    figures = _figures(rounds, plain, exit_code)
    _print(figures)
    if as_json:
        click.echo(json.dumps(figures))


async def _rounds(kind: Kind, model: str, kills: int) -> list[Round]:
    rounds: list[Round] = []
    with started(kind, model, (*_FLAGS, *_PATIENT)) as contender:
        say(f"{contender.name} ready after {await asyncio.to_thread(contender.wait_until_ready):.1f} s")
        async with aiohttp.ClientSession(contender.url, timeout=_TIMEOUT) as session:
            for number in range(kills):
                done = await KillRound(contender, session).run()
                done.build_s = _last_build_s(contender)
                done.held = holdings(contender)
                rounds.append(done)
                say(
                    f"kill {number + 1} of {kills}: streams ended after {max(done.streams_ended_s, default=0):.2f} s, "
                    f"first answer after {min(done.answered_s, default=0):.1f} s, lost {done.lost}, {done.held}"
                )
    return rounds


async def _plain_round(model: str) -> tuple[Round, int | None]:
    """One kill of plain vLLM's engine, and the exit code it ends with; None: it still ran a minute later."""
    with started(PLAIN, model, _FLAGS) as contender:
        say(f"{contender.name} ready after {await asyncio.to_thread(contender.wait_until_ready):.1f} s")
        async with aiohttp.ClientSession(contender.url, timeout=_TIMEOUT) as session:
            done = await KillRound(contender, session).run()
        deadline_s = time.perf_counter() + _EXIT_TIMEOUT_S
        while contender.process.poll() is None and time.perf_counter() < deadline_s:  # noqa: ASYNC110
            await asyncio.sleep(0.1)
        return done, contender.process.poll()


def _body(max_tokens: int, *, stream: bool) -> dict[str, Any]:
    messages = [{"role": "user", "content": "Tell a story."}]
    return {
        "model": MODEL_NAME, "messages": messages, "max_tokens": max_tokens, "ignore_eos": True, "stream": stream
    }  # fmt: skip


def _engine_of(contender: Contender) -> psutil.Process:
    children = psutil.Process(contender.process.pid).children(recursive=True)
    return next(child for child in children if "EngineCore" in child.name())


def _last_build_s(contender: Contender) -> float:
    lines = contender.log_file.read_text(encoding="utf-8", errors="replace").splitlines()
    replaced = [json.loads(line) for line in lines if '"engine replaced"' in line]
    return float(replaced[-1]["build_s"]) if replaced else 0.0


def _figures(rounds: Sequence[Round], plain: Round, exit_code: int | None) -> dict[str, Any]:
    held = [done.held for done in rounds if done.held is not None]
    first, last = held[0], held[-1]
    overheads_s = [min(done.answered_s) - done.build_s for done in rounds if done.answered_s]
    return {
        "benchmark": "engine-kills",
        "kills": len(rounds),
        "streams_ended_max_s": max(max(done.streams_ended_s, default=0.0) for done in rounds),
        "first_answer_p50_s": statistics.median(min(done.answered_s) for done in rounds if done.answered_s),
        "build_p50_s": statistics.median(done.build_s for done in rounds),
        "first_answer_after_build_p50_s": statistics.median(overheads_s),
        "first_answer_after_build_max_s": max(overheads_s),
        "lost": sum(done.lost for done in rounds),
        "port_probes": sum(done.probes for done in rounds),
        "port_refused": sum(done.refused for done in rounds),
        "held_first": asdict(first),
        "held_last": asdict(last),
        "plain_lost": plain.lost,
        "plain_port_refused": plain.refused,
        "plain_exit_code": exit_code,
    }


def _print(figures: dict[str, Any]) -> None:
    table = Table("figure", "value")
    for name, value in figures.items():
        table.add_row(name, f"{value:.2f}" if isinstance(value, float) else str(value))
    Console().print(table)
