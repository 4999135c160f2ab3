"""A real Redis for tests: the embedded one, kept running by a thread of its own."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from anyio.from_thread import start_blocking_portal

from server.store.redis_server import EmbeddedRedis

UP_WITHIN_S = 20.0


@contextmanager
def running_redis(folder: Path) -> Iterator[EmbeddedRedis]:
    """An embedded Redis on `folder` that answers."""
    embedded = EmbeddedRedis(folder)
    with start_blocking_portal() as portal, portal.wrap_async_context_manager(embedded.running()):
        portal.call(up, embedded)
        yield embedded


async def up(embedded: EmbeddedRedis) -> None:
    """Wait for it. Raises `TimeoutError` where it does not come."""
    async with asyncio.timeout(UP_WITHIN_S):
        await embedded.wait_until_up()


async def until(holds: Callable[[], bool | Awaitable[bool]], within_s: float = UP_WITHIN_S) -> None:
    """Wait until something holds. Raises `TimeoutError`."""
    async with asyncio.timeout(within_s):
        while True:
            verdict = holds()
            if verdict if isinstance(verdict, bool) else await verdict:
                return
            await asyncio.sleep(0.01)
