"""Watches the engine, and puts a new stack in the place of a dead one, behind the open port."""

from __future__ import annotations

import asyncio
import ctypes
import gc
import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Protocol

import structlog

from server.engine.start_failures import StartFailure
from server.policy.restarts import HangWatch, RestartRules

if TYPE_CHECKING:  # importing it imports vLLM
    from server.engine.stack import Adapter, Stack

log = structlog.get_logger(__name__)

_LONGEST_INTERVAL_S = 1.0
_LOOKS_PER_TIMEOUT = 20
_NOTICING_S = 0.2
_COLLECTED_AFTER = (700, 10, 100)  # Python's own: 700, 10, 10


class Seat(Protocol):
    """Where the stack stands that serves."""

    def fill(self, stack: Stack) -> None:
        """Requests run on this stack from now on."""
        ...

    def empty(self, stage: str) -> Stack | None:
        """No stack serves until the next one is there."""
        ...


class Guests(Protocol):
    """The requests that run on a stack."""

    def wake_those_on(self, stack: Stack) -> None:
        """Tell those that have not noticed that their stack is dead."""
        ...


class Witness(Protocol):
    """Is told what happens to the engine."""

    def engine_died(self, *, hung: bool) -> None: ...

    def engine_replaced(self, downtime_s: float) -> None: ...

    def restart_failed(self) -> None: ...


class Supervisor:
    """Keeps an engine running: one task, from the first stack to the last."""

    def __init__(
        self,
        build: Callable[[], Awaitable[Stack]],
        seat: Seat,
        guests: Guests,
        witness: Witness,
        rules: RestartRules,
    ) -> None:
        self._build = build
        self._seat = seat
        self._guests = guests
        self._witness = witness
        self._rules = rules
        self.building = False
        self._build_s = 0.0

    async def run(self, stack: Stack) -> None:
        """Watch `stack` and its successors. Returns when too many restarts in a row have failed."""
        self._seat.fill(stack)
        settle_memory()
        current: Stack | None = stack
        del stack  # a dead stack is to be forgotten, with all that it holds
        while current is not None:
            hung = await self._end_of(current)
            died_at_s = time.monotonic()
            self._seat.empty("replacing the engine")
            self._witness.engine_died(hung=hung)
            log.error("the engine hung and was ended" if hung else "the engine ended unexpectedly")
            adapters = current.runtime_adapters()
            # Nearly every request has its error by now; what vLLM never answers is told when there was time for that.
            await asyncio.gather(current.close(), asyncio.sleep(_NOTICING_S))
            self._guests.wake_those_on(current)
            current = None
            # The collection takes up to a second, and the new engine's process many: they need not wait for each other.
            current, _ = await asyncio.gather(self._successor(adapters), asyncio.to_thread(forget_garbage))
            if current is None:
                return
            self._seat.fill(current)
            gc.freeze()
            downtime_s = time.monotonic() - died_at_s
            self._witness.engine_replaced(downtime_s)
            log.info("engine replaced", downtime_s=round(downtime_s, 2), build_s=round(self._build_s, 2))

    async def _end_of(self, stack: Stack) -> bool:
        """Wait until the stack's engine has ended; it is ended here if it hangs. True when it hung."""
        watching = asyncio.create_task(self._until_it_hangs(stack))
        ended = asyncio.create_task(stack.ended())
        try:
            await asyncio.wait({watching, ended}, return_when=asyncio.FIRST_COMPLETED)
            if ended.done():
                return False
            watching.result()
            await asyncio.to_thread(stack.kill)
            await ended
            return True
        finally:
            watching.cancel()
            ended.cancel()

    async def _until_it_hangs(self, stack: Stack) -> None:
        interval_s = min(_LONGEST_INTERVAL_S, self._rules.hang_timeout_s / _LOOKS_PER_TIMEOUT)
        watch = HangWatch(self._rules.hang_timeout_s, interval_s, stack.pulse(), time.monotonic())
        while True:
            await asyncio.sleep(interval_s)
            pulse = stack.pulse()
            watch = watch.look(pulse, time.monotonic())
            if watch.is_hung(pulse):
                log.error("the engine has requests and makes no step", stalled_s=round(watch.stalled_s, 1))
                return

    async def _successor(self, adapters: tuple[Adapter, ...]) -> Stack | None:
        """A new stack, after as many tries as the rules give, or None."""
        failures = 0
        while not self._rules.gives_up(failures):
            await asyncio.sleep(self._rules.pause_s(failures))
            self.building = True
            try:
                return await self._built(adapters)
            except StartFailure as failure:
                failures += 1
                self._witness.restart_failed()
                log.error("the engine could not be replaced", failures=failures, reason=str(failure))  # noqa: TRY400
            finally:
                self.building = False
        return None

    async def _built(self, adapters: tuple[Adapter, ...]) -> Stack:
        started_s = time.monotonic()
        stack = await self._build()
        self._build_s = time.monotonic() - started_s
        try:
            await stack.load_adapters(adapters)
        except StartFailure:
            await stack.close()
            raise
        return stack


def settle_memory() -> None:
    """What loading left is there to stay as long as the stack: the collector need not walk it again.

    A request is thousands of objects. By Python's own thresholds the collector would walk all that there are many times
    over while a burst of requests comes in, and all of them would wait for it. What is new is walked as often as ever:
    the token ids of long histories are millions, which must not come together in one walk.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(*_COLLECTED_AFTER)


def forget_garbage() -> None:
    """Free a stack that nobody refers to any more; it was frozen when it began to serve."""
    gc.unfreeze()
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's alone, which keeps what is freed
    if trim is not None:
        trim(0)
