"""The ladder's watch: follows the pressure and the operator's pin, and knows the level that counts now."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Protocol

import structlog

from server.policy.ladder import (
    DESCRIPTIONS,
    Ladder,
    LadderRules,
    Level,
    Pin,
    at_rest,
    effective,
    step,
    with_engine_state,
)
from server.serving.engine_slot import EngineSlot
from server.store.beats import until_beat
from server.store.level import PinsUnreachable
from server.telemetry.resilience import ResilienceMetrics

log = structlog.get_logger(__name__)
audit = structlog.get_logger("server.audit")

_PRESSURE_INTERVAL_S: Final = 0.25
# While the gate is calm and the ladder at rest. Two seconds of pressure lead up, so it is seen in time.
_REST_INTERVAL_S: Final = 1.0
# A round trip to Redis each time, and a change has to be everywhere within a second.
_PIN_INTERVAL_S: Final = 0.5
_PRESSURE: Final = "pressure"


class Pins(Protocol):
    """Where the operator's pin is kept for all replicas."""

    async def read(self) -> Pin | None:
        """The pin, with the time it has left. Raises `PinsUnreachable`."""
        ...

    async def write(self, pin: Pin) -> None:
        """Keep a pin for its `ttl_s`. Raises `PinsUnreachable`."""
        ...

    async def clear(self) -> None:
        """Forget the pin. Raises `PinsUnreachable`."""
        ...


class LocalPins:
    """A pin in this process's memory, for a server that shares its level with nobody."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._pin: Pin | None = None
        self._ends_s = 0.0

    async def read(self) -> Pin | None:
        left_s = self._ends_s - self._clock()
        if self._pin is None or left_s <= 0:
            return None
        return Pin(self._pin.level, self._pin.reason, self._pin.by, left_s)

    async def write(self, pin: Pin) -> None:
        self._pin, self._ends_s = pin, self._clock() + pin.ttl_s

    async def clear(self) -> None:
        self._pin = None


@dataclass(frozen=True, slots=True)
class LadderSources:
    """What the watch looks at. `pressure` is the predicted wait for a first token over what is promised.

    `calm` tells whether so much room is free that no pressure can be near.
    """

    pressure: Callable[[], float]
    calm: Callable[[], bool]
    slot: EngineSlot
    has_fallback: bool


class LadderWatch:
    """The level, and who may change it."""

    def __init__(
        self,
        rules: LadderRules,
        sources: LadderSources,
        pins: Pins,
        metrics: ResilienceMetrics,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._rules = rules
        self._sources = sources
        self._pins = pins
        self._metrics = metrics
        self._clock = clock
        self._ladder = Ladder()
        self._pin: Pin | None = None
        self._pin_ends_s = 0.0
        self._told = Level.NORMAL
        self._reachable = True

    @property
    def has_fallback(self) -> bool:
        return self._sources.has_fallback

    @property
    def chosen_by_hand(self) -> bool:
        """Whether a pin holds."""
        return self._pin is not None

    @property
    def chosen(self) -> Level:
        """The level by pin or pressure, whatever the engine does."""
        return effective(self._ladder, self._pin)

    @property
    def level(self) -> Level:
        """The level that counts."""
        return with_engine_state(
            self.chosen, engine_down=self._sources.slot.down, has_fallback=self._sources.has_fallback
        )

    async def run(self) -> None:
        """Watch until cancelled. A store that hangs holds up nothing but the pin."""
        async with asyncio.TaskGroup() as watching:
            watching.create_task(self._follow_pin())
            watching.create_task(self._follow_pressure())

    async def look(self) -> None:
        """Take in the pin and the pressure once."""
        await self._read_pin()
        self._take_in_pressure()

    async def _follow_pin(self) -> None:
        while True:
            await self._read_pin()
            self._tell()
            await asyncio.sleep(until_beat(_PIN_INTERVAL_S))

    async def _follow_pressure(self) -> None:
        while True:
            self._take_in_pressure()
            await asyncio.sleep(until_beat(_REST_INTERVAL_S if self._at_rest else _PRESSURE_INTERVAL_S))

    @property
    def _at_rest(self) -> bool:
        return self._sources.calm() and at_rest(self._ladder, self._rules)

    def _take_in_pressure(self) -> None:
        # Without an engine nothing is known of the load, and nothing is saved by answering shorter.
        pressure = 0.0 if self._sources.slot.down else self._sources.pressure()
        self._ladder = step(self._ladder, pressure, self._clock(), self._rules)
        self._tell()

    async def pin(self, level: Level, reason: str, ttl_s: float, by: str) -> None:
        """Hold a level for `ttl_s` seconds. Raises `PinsUnreachable`, and then nothing has changed."""
        pin = Pin(level, reason, by, ttl_s)
        await self._pins.write(pin)
        audit.warning("level pinned", level=int(level), reason=reason, ttl_s=ttl_s, by=by)
        self._hold(pin)
        self._tell()

    async def unpin(self, by: str) -> None:
        """Let pressure decide again. Raises `PinsUnreachable`, and then nothing has changed."""
        await self._pins.clear()
        audit.warning("level unpinned", by=by)
        self._hold(None)
        self._tell()

    def status(self) -> dict[str, Any]:
        """What an operator sees."""
        level, pin = self.level, self._pin
        return {
            "level": int(level),
            "name": level.name.lower(),
            "description": DESCRIPTIONS[level],
            "because": self._because(level),
            "automatic_level": int(self._ladder.level),
            "pressure": round(self._ladder.pressure, 3),
            "pin": None
            if pin is None
            else {
                "level": int(pin.level),
                "reason": pin.reason,
                "by": pin.by,
                "ttl_s": round(max(self._pin_ends_s - self._clock(), 0.0), 1),
            },
            "engine": self._sources.slot.stage,
            "has_fallback": self.has_fallback,
        }

    async def _read_pin(self) -> None:
        """The pin as the store has it; while the store is away, the last one until its time is over."""
        try:
            self._hold(await self._pins.read())
        except PinsUnreachable as error:
            if self._reachable:
                log.warning("the store of the level is away; the last value holds", reason=str(error))
            self._reachable = False
            if self._pin is not None and self._clock() >= self._pin_ends_s:
                self._hold(None)
        else:
            self._reachable = True

    def _hold(self, pin: Pin | None) -> None:
        self._pin = pin
        self._pin_ends_s = 0.0 if pin is None else self._clock() + pin.ttl_s

    def _because(self, level: Level) -> str:
        if level != self.chosen:
            return "the engine is down" if self._sources.slot.down else "no fallback is configured"
        return _PRESSURE if self._pin is None else f"pinned by {self._pin.by}: {self._pin.reason}"

    def _tell(self) -> None:
        level = self.level
        self._metrics.level_is(level, self._ladder.pressure)
        if level == self._told:
            return
        change = {"from": int(self._told), "to": int(level)}
        audit.warning("level changed", **change, because=self._because(level), pressure=round(self._ladder.pressure, 2))
        self._metrics.level_changed(level)
        self._told = level
