"""The other front-ends of a server: started by its first process, started again when one ends, ended with it."""

import asyncio
import multiprocessing
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Final

import structlog

from server.engine.fork_server import ForkServer
from server.hub import messages
from server.lifecycle.front_end import Plan, main
from server.lifecycle.switchboard import Switchboard
from server.lifecycle.tasks import first, say_if_failed
from server.store.ending import ended

log = structlog.get_logger("server.lifecycle")

_FIRST_PAUSE_S: Final = 0.5
_LONGEST_PAUSE_S: Final = 30.0
# One that has lived for so long did not end because it could not begin.
_WELL_S: Final = 60.0
_BEYOND_THE_DRAIN_S: Final = 10.0


class Crew:
    """Keeps so many processes running, and is told of the engine that they share."""

    def __init__(self, plan: Plan, fork_server: ForkServer | None, switchboard: Switchboard) -> None:
        self._plan = plan
        self._fork_server = fork_server
        self._switchboard = switchboard
        self._share = plan.share
        self._processes: dict[int, Any] = {}
        self._keepers: list[asyncio.Task[None]] = []
        self._stopping = asyncio.Event()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Inside it, they run; leaving ends those that have not ended by themselves."""
        self._keepers = [asyncio.create_task(self._keep(index)) for index in range(1, self._plan.count)]
        for keeper in self._keepers:
            keeper.add_done_callback(say_if_failed)
        try:
            yield
        finally:
            await ended(self._keepers)
            for process in self._processes.values():
                process.kill()
                process.join()

    def stop_at_once(self) -> None:
        """End without waiting for what runs."""
        self._switchboard.tell(messages.Stop(at_once=True))

    async def stop(self, timeout_s: float, because: str | None = None) -> None:
        """Let all of them drain and end. `because`: why there is no engine any more, for the requests they have."""
        self._stopping.set()
        self._switchboard.tell(messages.Stop(because=because))
        if self._keepers:
            await asyncio.wait(self._keepers, timeout=timeout_s + _BEYOND_THE_DRAIN_S)

    async def _keep(self, index: int) -> None:
        pause_s = _FIRST_PAUSE_S
        while not self._stopping.is_set():
            started_s = time.monotonic()
            self._processes[index] = process = self._start(index)
            await _end_of(process)
            if self._share is not None:
                self._share.shares.gone(index)
            if self._stopping.is_set():
                return
            if time.monotonic() - started_s > _WELL_S:
                pause_s = _FIRST_PAUSE_S
            log.error("a front-end has ended and is started again", front_end=index, exit_code=process.exitcode)
            await first(self._stopping.wait(), asyncio.sleep(pause_s))
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    def _start(self, index: int) -> Any:
        context: Any = multiprocessing.get_context("spawn")
        if self._fork_server is not None:
            context = self._fork_server.context("spawn")
        process = context.Process(target=main, args=(self._plan.of(index),), name=f"front-end {index}")
        process.start()
        return process


async def _end_of(process: Any) -> None:
    """Wait until a process has ended."""
    loop, over = asyncio.get_running_loop(), asyncio.Event()
    loop.add_reader(process.sentinel, over.set)
    try:
        await over.wait()
    finally:
        loop.remove_reader(process.sentinel)
    await asyncio.to_thread(process.join)
