"""The supervisor over small stacks that die and hang when a test says so."""

import asyncio
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, cast

import pytest

from server.engine.start_failures import StartFailure
from server.engine.supervisor import Supervisor
from server.policy.restarts import Pulse, RestartRules

if TYPE_CHECKING:  # importing it imports vLLM
    from server.engine.stack import Stack

pytestmark = pytest.mark.anyio

RULES = RestartRules(hang_timeout_s=0.2, first_pause_s=0.01, longest_pause_s=0.04, max_failures=5)
TIMEOUT_S = 5.0


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@dataclass
class SmallStack:
    """A stack without an engine."""

    name: str
    runtime: tuple[str, ...] = ()
    steps: int = 1
    unfinished: int = 0
    killed: bool = False
    closed: bool = False
    model_names: tuple[str, ...] = ("a-model",)
    _dead: asyncio.Event = field(default_factory=asyncio.Event)
    loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop)

    def die(self) -> None:
        self._dead.set()

    def pulse(self) -> Pulse:
        return Pulse(self.steps, self.unfinished)

    async def ended(self) -> None:
        await self._dead.wait()

    def kill(self) -> None:
        self.killed = True
        self.loop.call_soon_threadsafe(self._dead.set)

    async def close(self) -> None:
        self.closed = True

    def runtime_adapters(self) -> tuple[str, ...]:
        return self.runtime

    async def load_adapters(self, adapters: tuple[str, ...]) -> None:
        if self._dead.is_set():
            raise StartFailure("The engine ended while it was warming up.")
        self.runtime = adapters


class Stage:
    """Seat, guests, witness and builder at once; everything that happens is written down in order."""

    def __init__(self, *outcomes: str) -> None:
        self.events: list[str] = []
        self.stacks: list[SmallStack] = []
        self.woken: list[object] = []
        self.serving: SmallStack | None = None
        self._outcomes = list(outcomes)
        self._changed = asyncio.Condition()

    async def build(self) -> "Stack":
        outcome = self._outcomes.pop(0) if self._outcomes else "good"
        self.events.append(f"build {outcome}")
        if outcome == "bad":
            raise StartFailure("No memory.")
        stack = SmallStack(f"stack {len(self.stacks)}")
        if outcome == "dies loading":
            stack.die()
        self.stacks.append(stack)
        return cast("Stack", stack)

    def fill(self, stack: "Stack") -> None:
        self.serving = cast("SmallStack", stack)
        self.events.append(f"fill {self.serving.name}")
        self._telling = asyncio.create_task(self._tell())

    async def _tell(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    def empty(self, stage: str) -> "Stack | None":
        self.serving = None
        self.events.append(stage)
        return None

    def wake_those_on(self, stack: "Stack") -> None:
        self.woken.append(stack)

    def engine_died(self, *, hung: bool) -> None:
        self.events.append("hung" if hung else "died")

    def engine_replaced(self, downtime_s: float) -> None:
        assert downtime_s >= 0
        self.events.append("replaced")

    def restart_failed(self) -> None:
        self.events.append("failed")

    def supervise(self, first: SmallStack) -> "asyncio.Task[None]":
        supervisor = Supervisor(self.build, self, self, self, RULES)
        return asyncio.create_task(supervisor.run(cast("Stack", first)))

    async def until_serving(self, name: str) -> SmallStack:
        async with asyncio.timeout(TIMEOUT_S):
            async with self._changed:
                await self._changed.wait_for(lambda: self.serving is not None and self.serving.name == name)
        assert self.serving is not None
        return self.serving


async def stopped(task: "asyncio.Task[None]") -> None:
    task.cancel()
    await asyncio.wait({task})
    assert task.cancelled()


async def test_a_dead_engine_is_replaced_and_everything_of_it_given_back() -> None:
    stage = Stage()
    first = SmallStack("first", runtime=("adapter",))
    running = stage.supervise(first)
    await stage.until_serving("first")
    first.die()
    second = await stage.until_serving("stack 0")
    await asyncio.sleep(0.01)
    assert stage.events == [
        "fill first", "replacing the engine", "died", "build good", "fill stack 0", "replaced"
    ]  # fmt: skip
    assert (first.closed, stage.woken) == (True, [first])
    assert second.runtime == ("adapter",)
    await stopped(running)


async def test_an_engine_that_hangs_is_ended_and_replaced() -> None:
    stage, first = Stage(), SmallStack("first", unfinished=1)
    running = stage.supervise(first)
    await stage.until_serving("stack 0")
    assert (first.killed, first.closed) == (True, True)
    assert "hung" in stage.events
    await stopped(running)


async def test_an_engine_that_is_idle_or_makes_steps_is_left_alone() -> None:
    stage, first = Stage(), SmallStack("first")
    running = stage.supervise(first)
    await asyncio.sleep(2 * RULES.hang_timeout_s)
    first.unfinished = 1
    for _ in range(20):
        await asyncio.sleep(RULES.hang_timeout_s / 8)
        first.steps += 1
    assert stage.events == ["fill first"]
    assert not first.killed
    await stopped(running)


async def test_a_restart_that_fails_is_tried_again_until_one_works() -> None:
    stage, first = Stage("bad", "bad", "good"), SmallStack("first")
    running = stage.supervise(first)
    first.die()
    await stage.until_serving("stack 0")
    assert stage.events.count("failed") == 2
    await stopped(running)


async def test_five_failed_restarts_in_a_row_end_the_supervision() -> None:
    stage, first = Stage(*["bad"] * 9), SmallStack("first")
    running = stage.supervise(first)
    first.die()
    await asyncio.wait_for(running, TIMEOUT_S)
    assert stage.events.count("build bad") == 5
    assert stage.serving is None


async def test_a_success_starts_the_count_of_failures_anew() -> None:
    stage, first = Stage(*["bad"] * 4, "good", *["bad"] * 4, "good"), SmallStack("first")
    running = stage.supervise(first)
    first.die()
    (await stage.until_serving("stack 0")).die()
    await stage.until_serving("stack 1")
    await stopped(running)


async def test_an_engine_that_dies_while_its_adapters_are_loaded_is_a_failed_restart() -> None:
    stage, first = Stage("dies loading", "good"), SmallStack("first", runtime=("adapter",))
    running = stage.supervise(first)
    first.die()
    second = await stage.until_serving("stack 1")
    assert (stage.stacks[0].closed, stage.events.count("failed")) == (True, 1)
    assert second.runtime == ("adapter",)
    await stopped(running)


async def test_many_deaths_leave_no_task_behind() -> None:
    stage, first = Stage(), SmallStack("first")
    running = stage.supervise(first)
    before = len(asyncio.all_tasks())
    first.die()
    for i in range(5):
        (await stage.until_serving(f"stack {i}")).die()
    await stage.until_serving("stack 5")
    await asyncio.sleep(0.01)
    assert len(asyncio.all_tasks()) <= before + 2  # the two that watch the stack
    await stopped(running)
