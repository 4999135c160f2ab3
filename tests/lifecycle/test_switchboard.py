"""What the first process tells a front-end and takes from it, over a real Unix socket; the stack is the test's."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pytest
from prometheus_client import CollectorRegistry

from server.app import Application
from server.hub import messages
from server.hub.connection import Connection, connect
from server.lifecycle.scratch import HUB_SOCKET
from server.lifecycle.switchboard import Switchboard
from server.policy.forecast import NO_PART, StepPart
from server.policy.ladder import Level
from server.policy.reservations import Ask
from server.policy.terms import Terms
from server.serving.elsewhere import Elsewhere
from server.telemetry.metrics import Metrics
from server.telemetry.recent import RecentHappenings
from tests.serving.gate_bench import Bench

if TYPE_CHECKING:  # the engine room imports vLLM
    from server.engine.stack import Stack

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@dataclass
class Ladder:
    chosen: Level = Level.NORMAL
    chosen_by_hand: bool = False


@dataclass
class Adapter:
    name: str
    path: str
    number: int


@dataclass
class FakeStack:
    alive: bool = True
    loaded: list[Adapter] = field(default_factory=list)
    steps: list[tuple[int, bytes | None, StepPart]] = field(default_factory=list)
    abandoned: list[str] = field(default_factory=list)

    def adapters(self) -> tuple[Adapter, ...]:
        return tuple(self.loaded)

    def hear_step(self, engine_index: int, encoded: bytes | None, part: StepPart) -> None:
        self.steps.append((engine_index, encoded, part))

    async def abandon(self, engine_requests: list[str]) -> None:
        self.abandoned += engine_requests


@dataclass
class App:
    """As much of the application as the switchboard works on."""

    bench: Bench = field(default_factory=Bench)
    ladder: Ladder = field(default_factory=Ladder)
    figures: Metrics = field(default_factory=lambda: Metrics(CollectorRegistry()))
    recent: RecentHappenings = field(default_factory=RecentHappenings)
    elsewhere: Elsewhere = field(default_factory=Elsewhere)

    def __post_init__(self) -> None:
        self.gate = self.bench.gate


class FrontEnd:
    """The other end of a connection, as the test speaks and hears it."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.heard: list[messages.Any] = []
        self.listening = asyncio.create_task(self._listen())

    async def _listen(self) -> None:
        async for message in self.connection.received():
            self.heard.append(message)
            if isinstance(message, messages.GiveFigures):
                snapshot = Metrics(CollectorRegistry()).snapshot()
                self.connection.send(messages.Figures(snapshot, open_requests=3))

    def last(self, kind: type[Any]) -> Any:
        return next((message for message in reversed(self.heard) if isinstance(message, kind)), None)


@asynccontextmanager
async def connected(folder: Path, index: int) -> AsyncIterator[FrontEnd]:
    front_end = FrontEnd(await connect(folder / HUB_SOCKET))
    front_end.connection.send(messages.Hello(index, 1000 + index))
    await until(lambda: front_end.last(messages.State) is not None)
    try:
        yield front_end
    finally:
        await front_end.connection.close()
        await front_end.listening


async def until(holds: Callable[[], object]) -> None:
    for _ in range(400):
        if holds():
            return
        await asyncio.sleep(0.005)
    raise AssertionError("it never came to that")


def new_board(app: App, folder: Path, others: int = 2) -> Switchboard:
    return Switchboard(cast("Application", app), folder, others)


def a_stack() -> "tuple[FakeStack, Stack]":
    fake = FakeStack()
    return fake, cast("Stack", fake)


async def test_each_is_told_of_the_engine_at_its_own_address_also_one_that_comes_late(tmp_path: Path) -> None:
    app = App()
    board = new_board(app, tmp_path)
    async with board.running(), connected(tmp_path, 1) as early:
        addresses = board.next_engine()
        assert early.last(messages.Engine) is None
        board.engine_is(a_stack()[1], b"plan")
        async with connected(tmp_path, 2) as late:
            await until(lambda: early.last(messages.Engine) and late.last(messages.Engine))
            told = [end.last(messages.Engine) for end in (early, late)]
            assert [(engine.input_address, engine.output_address) for engine in told] == list(addresses)
            assert {engine.blueprint for engine in told} == {b"plan"}
            board.engine_is_gone()
            await until(lambda: late.last(messages.EngineGone))
        async with connected(tmp_path, 2) as later:
            assert later.last(messages.Engine) is None
        assert len({*addresses, *board.next_engine()}) == 4  # two engines never share a socket


async def test_level_adapters_and_calm_are_told_when_they_change(tmp_path: Path) -> None:
    app = App(Bench(places=4))
    board = new_board(app, tmp_path)
    async with board.running(), connected(tmp_path, 1) as end:
        await until(lambda: end.last(messages.State).calm)
        app.ladder.chosen, app.ladder.chosen_by_hand = Level.ESSENTIAL, True
        await until(lambda: end.last(messages.State).level == Level.ESSENTIAL)
        assert end.last(messages.State).by_hand
        fake, stack = a_stack()
        board.next_engine()
        board.engine_is(stack, b"")
        fake.loaded.append(Adapter("poet", "/poet", 1))
        board.refresh()
        await until(lambda: end.last(messages.State).adapters)
        assert end.last(messages.State).adapters == (messages.Adapter("poet", "/poet", 1),)
        for number in range(4):
            end.connection.send(messages.Enter(number, "t", Terms(), Ask(7, 16), time.monotonic(), 0, False, None))
        await until(lambda: not end.last(messages.State).calm)


async def test_steps_happenings_and_figures_arrive(tmp_path: Path) -> None:
    app = App()
    board = new_board(app, tmp_path)
    fake, stack = a_stack()
    async with board.running(), connected(tmp_path, 1) as end:
        board.next_engine()
        board.engine_is(stack, b"")
        end.connection.send(messages.Stepped(NO_PART, b"account", 0))
        end.connection.send(messages.Happened("refusal", "rate_limit_exceeded", "/v1/x", "t", 429, "why", "id-1"))
        await until(lambda: fake.steps and app.recent.latest("refusal"))
        assert fake.steps == [(0, b"account", NO_PART)]
        assert app.recent.latest("refusal")[0].last.tenant == "t"
        assert await app.elsewhere.gather() == 3
    assert await app.elsewhere.gather() == 0


async def test_what_a_front_end_held_is_given_back_and_aborted_when_it_is_gone(tmp_path: Path) -> None:
    app = App()
    board = new_board(app, tmp_path)
    fake, stack = a_stack()
    async with board.running():
        board.next_engine()
        board.engine_is(stack, b"")
        async with connected(tmp_path, 1) as end:
            end.connection.send(messages.Enter(1, "t", Terms(), Ask(7, 16), time.monotonic(), 0, False, None))
            end.connection.send(messages.Started(1, "engine-1"))
            await until(lambda: end.last(messages.Granted))
            assert board.unfinished() == 1
        await until(lambda: app.bench.nothing_held and fake.abandoned)
        assert fake.abandoned == ["engine-1"]
        assert board.unfinished() == 0
