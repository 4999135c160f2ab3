"""What a tenant has used, for itself and for the operator."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Final

from server.policy.refusals import StoreUnavailable
from server.store.reaching import RedisUnavailable, reached
from server.store.usage import TokenCounts, Usage, UsageBook

_RETRY_AFTER_S: Final = 2.0


class UsageDesk:
    """Reads the book."""

    def __init__(self, book: UsageBook) -> None:
        self._book = book

    async def read(self, tenant: str, at: datetime | None = None) -> tuple[datetime, Usage]:
        """A moment (now), and the figures of its day and its month in UTC. Raises `StoreUnavailable`."""
        moment = at or datetime.now(UTC)
        async with _book_open():
            return moment, await self._book.read(tenant, moment)

    async def today(self, tenants: Sequence[str]) -> dict[str, TokenCounts]:
        """Each tenant's figures of this day in UTC, over its models. Raises `StoreUnavailable`."""
        async with _book_open():
            return await self._book.today(tenants)


@asynccontextmanager
async def _book_open() -> AsyncIterator[None]:
    try:
        async with reached():
            yield
    except RedisUnavailable as error:
        message = "Usage cannot be read at the moment. Please try again in a few seconds."
        raise StoreUnavailable(message, retry_after_s=_RETRY_AFTER_S) from error
