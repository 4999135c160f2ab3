"""uvicorn's end of an exchange, for what is known of it besides ASGI's two functions."""

import asyncio
from collections.abc import Callable
from typing import Any

from uvicorn.protocols.http.httptools_impl import RequestResponseCycle


def exchange_of(function: Any) -> RequestResponseCycle | None:
    """Whose `send` or `receive` it is, where that is uvicorn's own."""
    owner = getattr(function, "__self__", None)
    return owner if type(owner) is RequestResponseCycle else None


def takes_a_chunk(exchange: RequestResponseCycle) -> bool:
    """Whether `send` would do nothing with a part of the body but write it, and that at once."""
    open_ended = exchange.chunked_encoding and not exchange.response_complete
    return bool(open_ended) and not exchange.disconnected and not exchange.flow.write_paused


def watch_for_leaving(exchange: RequestResponseCycle, on_left: Callable[[], None]) -> Callable[[], None]:
    """Call `on_left` when the client goes away before it has its answer, or soon if it has. Returns what ends that.

    This is for whoever would otherwise wait for the next message in a task of its own, with nobody else waiting. The
    exchange rings its bell whenever there is news.
    """
    if not exchange.response_complete:
        exchange.flow.resume_reading()  # as its `receive` does
    bell = _Bell(exchange, on_left)
    exchange.message_event = bell
    if exchange.disconnected:
        asyncio.get_running_loop().call_soon(bell.look)  # not in the middle of what the caller does
    return bell.unhang


class _Bell(asyncio.Event):
    """Looks whether the client has gone whenever it is set."""

    def __init__(self, exchange: RequestResponseCycle, on_left: Callable[[], None]) -> None:
        super().__init__()
        self._watched: tuple[RequestResponseCycle, Callable[[], None]] | None = (exchange, on_left)

    def set(self) -> None:
        super().set()
        self.look()

    def look(self) -> None:
        if self._watched is not None and self._watched[0].disconnected:
            self._watched[1]()

    def unhang(self) -> None:
        """Know neither any more: the exchange knows its bell, and such a ring would wait for the garbage collector."""
        self._watched = None
