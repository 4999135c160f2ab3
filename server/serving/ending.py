"""Ends tasks for sure."""

import asyncio
from collections.abc import Iterable
from typing import Any, Final

_AGAIN_AFTER_S: Final = 0.5


async def end(tasks: Iterable[asyncio.Task[Any]]) -> None:
    """Cancel tasks until they have ended.

    Once is not always enough: Python 3.11's `asyncio.wait_for`, which the Redis client uses, swallows a cancellation
    that comes at the moment at which what it waits for is done (cpython issue 86296).
    """
    left = set(tasks)
    while left:
        for task in left:
            task.cancel()
        _, left = await asyncio.wait(left, timeout=_AGAIN_AFTER_S)
