"""The parameters and the shape of OpenAI's lists."""

from collections.abc import Mapping, Sequence
from typing import Any, Final

from server.policy.refusals import InvalidRequest
from server.store.pages import Cut, Order

_ORDERS: Final[Mapping[str, Order]] = {"asc": "asc", "desc": "desc"}


def cut_from(query: Mapping[str, str], most: int, default: int) -> Cut:
    """Which part of a list is asked for. Raises `InvalidRequest`."""
    given = query.get("limit", str(default))
    if not given.isdecimal() or not 1 <= int(given) <= most:
        raise InvalidRequest(f"`limit` must be a whole number from 1 to {most}.", param="limit")
    order = _ORDERS.get(query.get("order", "desc"))
    if order is None:
        raise InvalidRequest("`order` must be `asc` or `desc`.", param="order")
    return Cut(int(given), query.get("after") or None, order)


def page(items: Sequence[Mapping[str, Any]], has_more: bool) -> dict[str, Any]:
    """A list as OpenAI gives it."""
    return {
        "object": "list",
        "data": list(items),
        "first_id": items[0]["id"] if items else None,
        "last_id": items[-1]["id"] if items else None,
        "has_more": has_more,
    }
