"""What a tenant has used, for itself and for the operator."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Final

from server.policy.refusals import StoreUnavailable
from server.store.reaching import RedisUnavailable, reached
from server.store.usage import Usage, UsageBook

_RETRY_AFTER_S: Final = 2.0


class UsageDesk:
    """Reads the book."""

    def __init__(self, book: UsageBook) -> None:
        self._book = book

    async def read(self, tenant: str, at: datetime | None = None) -> tuple[datetime, Usage]:
        """A moment (now), and the figures of its day and its month in UTC. Raises `StoreUnavailable`."""
        moment = at or datetime.now(UTC)
        try:
            async with reached():
                return moment, await self._book.read(tenant, moment)
        except RedisUnavailable as error:
            message = "Usage cannot be read at the moment. Please try again in a few seconds."
            raise StoreUnavailable(message, retry_after_s=_RETRY_AFTER_S) from error
