"""Lists that a client reads page by page, newest first or oldest first."""

from dataclasses import dataclass
from typing import Any, Literal

Order = Literal["asc", "desc"]


class UnknownCursor(Exception):
    """The page is to begin after something that is not on the list."""


@dataclass(frozen=True, slots=True)
class Cut:
    """Which part of a list: at most `limit` entries after the one with the id `after`."""

    limit: int
    after: str | None = None
    order: Order = "desc"


async def ids_on_page(redis: Any, index: str, cut: Cut) -> tuple[list[str], bool]:
    """The ids of one page of a sorted set, and whether there are more. Raises `UnknownCursor`."""
    start = "+inf" if cut.order == "desc" else "-inf"
    if cut.after is not None:
        score = await redis.zscore(index, cut.after)
        if score is None:
            raise UnknownCursor(cut.after)
        start = f"({int(score)}"
    if cut.order == "desc":
        found = await redis.zrevrangebyscore(index, start, "-inf", start=0, num=cut.limit + 1)
    else:
        found = await redis.zrangebyscore(index, start, "+inf", start=0, num=cut.limit + 1)
    ids = [member.decode() for member in found]
    return ids[: cut.limit], len(ids) > cut.limit
