"""Keeps a client, and the proxies before it, patient."""

import asyncio
from collections.abc import Awaitable, Callable
from types import TracebackType


class Reminder:
    """Inside it, and until `stop`, `remind` is called again and again, each time after `every_s` of silence.

    The first call is a timer's, not a task's: nearly every wait is over before.
    """

    def __init__(self, every_s: float, remind: Callable[[], Awaitable[None]]) -> None:
        self._every_s = every_s
        self._remind = remind
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> "Reminder":
        self._timer = asyncio.get_running_loop().call_later(self._every_s, self._begin)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    async def stop(self) -> None:
        """Remind no more; a call that is under way is ended."""
        self._timer.cancel()
        if (task := self._task) is not None:
            self._task = None
            task.cancel()
            await asyncio.wait({task})

    def _begin(self) -> None:
        self._task = asyncio.create_task(self._go_on())

    async def _go_on(self) -> None:
        while True:
            await self._remind()
            await asyncio.sleep(self._every_s)
