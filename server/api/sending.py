"""Sends an answer to a client that may not read it."""

import asyncio
from collections.abc import Callable
from types import TracebackType

import structlog
from starlette.types import Message, Send

log = structlog.get_logger(__name__)

_LOOKS_PER_TIMEOUT = 4


class WatchedSend:
    """The server's `send`, and a watch over it: when one message does not go out in time, `on_stall` is called once.

    The server's buffers are bounded, so `send` waits for a client that does not read. The watch looks a few times per
    timeout, which costs a frame nothing but a time stamp.
    """

    def __init__(self, send: Send, timeout_s: float, on_stall: Callable[[], None]) -> None:
        self._send = send
        self._timeout_s = timeout_s
        self._on_stall = on_stall
        self._since_s: float | None = None

    async def __call__(self, message: Message) -> None:
        self._since_s = self._loop.time()
        await self._send(message)
        self._since_s = None

    async def __aenter__(self) -> "WatchedSend":
        self._loop = asyncio.get_running_loop()
        self._look_later()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._timer.cancel()

    def _look_later(self) -> None:
        self._timer = self._loop.call_later(self._timeout_s / _LOOKS_PER_TIMEOUT, self._look)

    def _look(self) -> None:
        if self._since_s is None or self._loop.time() - self._since_s < self._timeout_s:
            self._look_later()
            return
        log.info("a client does not read its answer; it is ended", timeout_s=self._timeout_s)
        self._on_stall()
