"""Ends background tasks that call Redis."""

import asyncio
from collections.abc import Iterable
from typing import Any, Final

_AGAIN_AFTER_S: Final = 0.1


async def ended(tasks: Iterable["asyncio.Task[Any]"], again_after_s: float = _AGAIN_AFTER_S) -> None:
    """Cancel the tasks and wait for them, and cancel again what goes on; `again_after_s` is what a cleanup may take.

    The Redis client waits with `asyncio.wait_for`, which before Python 3.12 loses a cancellation that comes together
    with the answer (python/cpython issue 81839). Once would not be enough.
    """
    open_tasks = set(tasks)
    while open_tasks:
        for task in open_tasks:
            task.cancel()
        _, open_tasks = await asyncio.wait(open_tasks, timeout=again_after_s)
