"""What an overview needs from Redis, read anew only after some seconds: several consoles ask every second."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Final, Generic, TypeVar

from server.policy.refusals import StoreUnavailable
from server.store.file_bodies import DiskFull

Value = TypeVar("Value")

_PATIENCE_S: Final = 1.0
_LEAST_REST: Final = 50


class Glimpse(Generic[Value]):
    """One thing that is read, kept for `kept_s` seconds. A read that fails is kept as long, with the reason.

    What takes long to read is kept longer, so that reading never takes more than a fiftieth of the time.
    """

    def __init__(
        self, read: Callable[[], Awaitable[Value]], kept_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._read = read
        self._kept_s = kept_s
        self._clock = clock
        self._until_s = float("-inf")
        self._reading = asyncio.Lock()
        self._value: Value | None = None
        self._problem = ""

    async def look(self) -> tuple[Value | None, str]:
        """The value, or None and a sentence that says why there is none. Waits one second at most."""
        async with self._reading:
            if self._clock() >= self._until_s:
                started_s = self._clock()
                await self._look()
                took_s = self._clock() - started_s
                self._until_s = self._clock() + max(self._kept_s, _LEAST_REST * took_s)
            return self._value, self._problem

    async def _look(self) -> None:
        self._value, self._problem = None, ""
        try:
            async with asyncio.timeout(_PATIENCE_S):
                self._value = await self._read()
        except StoreUnavailable as refusal:
            self._problem = refusal.message
        except TimeoutError:
            self._problem = "Redis takes too long to answer."
        except (DiskFull, OSError) as error:
            self._problem = f"The data folder cannot be used: {error}"
