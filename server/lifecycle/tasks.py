"""Tasks beside a block, and waits for one of several things."""

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import structlog

from server.store.ending import ended

log = structlog.get_logger("server.lifecycle")


@asynccontextmanager
async def running(*works: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """Run these beside the block, and cancel them with it."""
    tasks = [asyncio.create_task(work) for work in works]
    for task in tasks:
        task.add_done_callback(say_if_failed)
    try:
        yield
    finally:
        await ended(tasks)


def say_if_failed(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        log.error("a task beside the requests has failed", exc_info=error)


async def first(*waits: Coroutine[Any, Any, Any] | asyncio.Task[Any]) -> None:
    """Wait until one of them is done; coroutines among them are cancelled then, tasks are left to their owner."""
    tasks = [wait if isinstance(wait, asyncio.Task) else asyncio.create_task(wait) for wait in waits]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for wait, task in zip(waits, tasks, strict=True):
            if wait is not task:
                task.cancel()
