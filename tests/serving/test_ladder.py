"""The watch over pressure and pin, on a clock that the test moves."""

import asyncio
from dataclasses import dataclass
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from structlog.testing import capture_logs

from server.policy.ladder import LadderRules, Level, Pin
from server.serving.engine_slot import EngineSlot
from server.serving.ladder import LadderSources, LadderWatch, LocalPins, Pins
from server.store.level import PinsUnreachable
from server.telemetry.resilience import ResilienceMetrics
from tests.serving.fake_stack import FakeStack, slot_with

pytestmark = pytest.mark.anyio


@dataclass
class World:
    """A clock, a pressure and a slot."""

    slot: EngineSlot
    now_s: float = 0.0
    pressure: float = 0.0
    calm: bool = True
    looks: int = 0

    def clock(self) -> float:
        return self.now_s

    def pressure_seen(self) -> float:
        self.looks += 1
        return self.pressure

    async def looks_in(self, seconds: float) -> int:
        """How often the pressure is looked at by a watch that runs for so long."""
        watching = asyncio.create_task(self.watch().run())
        await asyncio.sleep(seconds)
        watching.cancel()
        await asyncio.wait({watching})
        return self.looks

    def watch(self, pins: Pins | None = None, *, has_fallback: bool = False) -> LadderWatch:
        sources = LadderSources(self.pressure_seen, lambda: self.calm, self.slot, has_fallback)
        rules, metrics = LadderRules(highest=Level.ESSENTIAL), ResilienceMetrics(CollectorRegistry())
        return LadderWatch(rules, sources, pins or LocalPins(self.clock), metrics, self.clock)

    async def pass_time(self, watch: LadderWatch, seconds: float) -> None:
        for _ in range(round(seconds * 4)):
            self.now_s += 0.25
            await watch.look()


class FragilePins(LocalPins):
    """Pins whose store can go away."""

    away = False

    async def read(self) -> Pin | None:
        if self.away:
            raise PinsUnreachable("timeout")
        return await super().read()

    async def write(self, pin: Pin) -> None:
        if self.away:
            raise PinsUnreachable("timeout")
        await super().write(pin)


@pytest.fixture
def world() -> World:
    return World(slot_with(FakeStack({})))


def level_of(watch: LadderWatch) -> Level:
    """The level now; mypy would take it for unchanged between two looks."""
    return watch.level


def changes(logs: list[Any]) -> list[tuple[int, int, str]]:
    return [(log["from"], log["to"], log["because"]) for log in logs if log["event"] == "level changed"]


async def test_pressure_moves_the_level_and_every_move_is_logged(world: World) -> None:
    watch = world.watch()
    with capture_logs() as logs:
        world.pressure = 5.0
        await world.pass_time(watch, 8)
        assert level_of(watch) == Level.SHORT_CONTEXT
        world.pressure = 0.0
        await world.pass_time(watch, 60)
    assert level_of(watch) == Level.NORMAL
    assert changes(logs) == [(0, 1, "pressure"), (1, 2, "pressure"), (2, 1, "pressure"), (1, 0, "pressure")]


async def test_a_pin_holds_until_its_time_is_over(world: World) -> None:
    watch = world.watch()
    with capture_logs() as logs:
        await watch.pin(Level.ESSENTIAL, "a migration", 60, "anna")
        assert level_of(watch) == Level.ESSENTIAL
        await world.pass_time(watch, 59)
        assert level_of(watch) == Level.ESSENTIAL
        await world.pass_time(watch, 2)
        assert level_of(watch) == Level.NORMAL
    assert changes(logs) == [(0, 3, "pinned by anna: a migration"), (3, 0, "pressure")]


async def test_a_pin_is_taken_away_by_hand(world: World) -> None:
    watch = world.watch()
    await watch.pin(Level.CLOSED, "maintenance", 60, "anna")
    await watch.unpin("ben")
    assert level_of(watch) == Level.NORMAL
    assert watch.status()["pin"] is None


async def test_another_replica_follows_at_its_next_look(world: World) -> None:
    pins = LocalPins(world.clock)
    here, there = world.watch(pins), world.watch(pins)
    await here.pin(Level.ECONOMY, "a test", 60, "anna")
    await there.look()
    assert there.level == Level.ECONOMY


async def test_the_last_value_holds_while_the_store_is_away_and_no_longer_than_it_was_to(world: World) -> None:
    pins = FragilePins(world.clock)
    watch = world.watch(pins)
    await watch.pin(Level.ECONOMY, "a test", 60, "anna")
    pins.away = True
    with capture_logs() as logs:
        await world.pass_time(watch, 59)
        assert level_of(watch) == Level.ECONOMY
        await world.pass_time(watch, 2)
        assert level_of(watch) == Level.NORMAL
    assert len([log for log in logs if "store of the level" in log["event"]]) == 1


async def test_a_pin_that_cannot_be_kept_changes_nothing(world: World) -> None:
    pins = FragilePins(world.clock)
    pins.away = True
    watch = world.watch(pins)
    with pytest.raises(PinsUnreachable):
        await watch.pin(Level.CLOSED, "maintenance", 60, "anna")
    assert level_of(watch) == Level.NORMAL


async def test_a_dead_engine_is_level_four_at_once_where_there_is_a_fallback() -> None:
    stack = FakeStack({})
    world = World(slot_with(stack))
    with_fallback, without = world.watch(has_fallback=True), world.watch()
    stack.alive = False
    assert (with_fallback.level, without.level) == (Level.FALLBACK, Level.NORMAL)
    assert with_fallback.status()["because"] == "the engine is down"


async def test_while_the_engine_is_down_the_pressure_leads_nowhere() -> None:
    stack = FakeStack({})
    world = World(slot_with(stack), pressure=9.0)
    watch = world.watch()
    stack.alive = False
    await world.pass_time(watch, 60)
    assert watch.level == Level.NORMAL


async def test_a_server_at_rest_is_looked_at_once_a_second(world: World) -> None:
    assert await world.looks_in(1.9) <= 3  # the first one, and two beats


@pytest.mark.parametrize(("pressure", "calm"), [(0.0, False), (3.0, True)])
async def test_where_there_is_something_to_see_it_is_looked_at_more_often(
    world: World, pressure: float, calm: bool
) -> None:
    world.pressure, world.calm = pressure, calm
    assert await world.looks_in(1.9) >= 5


async def test_the_status_tells_what_counts_and_why(world: World) -> None:
    watch = world.watch()
    await watch.pin(Level.ECONOMY, "a test", 60, "anna")
    world.now_s += 10
    status = watch.status()
    assert status["level"] == 1
    assert status["name"] == "economy"
    assert status["automatic_level"] == 0
    assert status["pin"] == {"level": 1, "reason": "a test", "by": "anna", "ttl_s": 50.0}
