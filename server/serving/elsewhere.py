"""The other front-ends of this server, as far as figures go."""

from collections.abc import Awaitable, Callable


class Elsewhere:
    """For whoever shows figures of the whole server. By itself it knows of no other front-end."""

    def __init__(self) -> None:
        self._gather: Callable[[], Awaitable[int]] | None = None

    def ask_by(self, gather: Callable[[], Awaitable[int]]) -> None:
        """There are others: this lets them report, and returns their open requests."""
        self._gather = gather

    async def gather(self) -> int:
        """Let the others report their metrics. Returns how many requests they have open."""
        return 0 if self._gather is None else await self._gather()
