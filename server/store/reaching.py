"""One name for every way in which Redis fails to answer, for rooms that do not know Redis."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from server.store.connection import FAILURES


class RedisUnavailable(Exception):
    """Redis did not answer, or not in time."""


@asynccontextmanager
async def reached() -> AsyncIterator[None]:
    """Inside it, what the client raises becomes `RedisUnavailable`."""
    try:
        yield
    except FAILURES as error:
        raise RedisUnavailable(str(error)) from error
