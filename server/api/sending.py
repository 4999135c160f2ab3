"""Sends an answer to a client that may not read it."""

import asyncio
from collections.abc import Awaitable, Callable, Generator
from types import TracebackType
from typing import Any, Final

import structlog
from starlette.types import Message, Send

from server.api.exchange import exchange_of, takes_a_chunk

log = structlog.get_logger(__name__)

_LOOKS_PER_TIMEOUT = 4
# Where the outermost layer leaves, in a request's state, how it sends itself.
SEND_BODY: Final = "send_body"


class WatchedSend:
    """The server's `send`, and a watch over it: when one message does not go out in time, `on_stall` is called once.

    The server's buffers are bounded, so `send` waits for a client that does not read. The watch looks a few times per
    timeout, which costs a frame nothing but a time stamp. `send_body` is a shorter way for bodies, at which no layer
    between here and the server looks.
    """

    def __init__(self, send: Send, send_body: Send, timeout_s: float, on_stall: Callable[[], None]) -> None:
        self._send = send
        self._send_body = send_body
        self._exchange = exchange_of(send_body)
        self._timeout_s = timeout_s
        self._on_stall = on_stall
        self._since_s: float | None = None

    async def __call__(self, message: Message) -> None:
        self._since_s = self._loop.time()
        await (self._send_body if message["type"] == "http.response.body" else self._send)(message)
        self._since_s = None

    def write(self, body: bytes) -> Awaitable[None] | None:
        """Send a part of the body without waiting. Returns what is left to be awaited if the connection is full.

        May be called outside the request's task, which then awaits the rest. Raises what the server's `send` raises.
        """
        if (exchange := self._exchange) is not None and takes_a_chunk(exchange):
            exchange.transport.write(b"%x\r\n%b\r\n" % (len(body), body))
            return None
        steps = self._send_body({"type": "http.response.body", "body": body, "more_body": True}).__await__()
        try:
            waits_for = next(steps)
        except StopIteration:
            return None
        self._since_s = self._loop.time()
        return _Rest(steps, waits_for, self._sent)

    def _sent(self) -> None:
        self._since_s = None

    async def __aenter__(self) -> "WatchedSend":
        self._loop = asyncio.get_running_loop()
        self._look_later()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._timer.cancel()
        del self._timer  # its context knows the request, whose shortcut knows this

    def _look_later(self) -> None:
        self._timer = self._loop.call_later(self._timeout_s / _LOOKS_PER_TIMEOUT, self._look)

    def _look(self) -> None:
        if self._since_s is None or self._loop.time() - self._since_s < self._timeout_s:
            self._look_later()
            return
        log.info("a client does not read its answer; it is ended", timeout_s=self._timeout_s)
        self._on_stall()


class _Rest:
    """The rest of a `send` that was driven up to where it waits for room. Whoever holds it awaits it."""

    def __init__(self, steps: Generator[Any, Any, None], waits_for: Any, on_sent: Callable[[], None]) -> None:
        self._steps = steps
        self._waits_for = waits_for
        self._on_sent = on_sent

    def __await__(self) -> Generator[Any, Any, None]:
        waits_for = self._waits_for
        try:
            while True:
                try:
                    sent = yield waits_for
                except BaseException as error:  # noqa: BLE001  # a cancellation, say, which is for the call itself
                    waits_for = self._steps.throw(error)
                else:
                    waits_for = self._steps.send(sent)
        except StopIteration:
            self._on_sent()
