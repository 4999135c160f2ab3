"""New connections, spread evenly over the front-ends that listen on one socket.

The kernel gives a connection to whoever asks for it first, and that is mostly the same one. So each tells the others
how many it has, and who has more than another steps aside for a moment.
"""

import asyncio
import mmap
import socket
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import structlog

from server.store.ending import ended

log = structlog.get_logger("server.lifecycle")

_ASIDE_S: Final = 0.005
# What nobody else has taken meanwhile is not left to wait, or a burst would come in one by one.
_AT_ONCE: Final = 16
_NO_FILES_PAUSE_S: Final = 1.0
_ITEM_BYTES: Final = 4
_NOT_THERE: Final = -1


class Shares:
    """How many connections each of `count` front-ends has, in a file that all of them have mapped."""

    def __init__(self, file: Path, count: int) -> None:
        if not file.exists():
            file.write_bytes(_NOT_THERE.to_bytes(_ITEM_BYTES, "little", signed=True) * count)
        with file.open("r+b") as opened:
            self._held = memoryview(mmap.mmap(opened.fileno(), count * _ITEM_BYTES)).cast("i")

    def tell(self, index: int, connections: int) -> None:
        """Front-end `index` has so many."""
        self._held[index] = connections

    def gone(self, index: int) -> None:
        """Front-end `index` accepts no more."""
        self._held[index] = _NOT_THERE

    def lead_of(self, index: int) -> int:
        """How many more a front-end has than the one with fewest; below 0 or 0 if it is that one."""
        others = [held for other, held in enumerate(self._held) if other != index and held != _NOT_THERE]
        return self._held[index] - min(others) if others else 0


class Counted(set[Any]):
    """The open connections of an HTTP server, which tells how many they are whenever that changes."""

    def __init__(self, tell: Callable[[int], None]) -> None:
        super().__init__()
        self._tell = tell

    def add(self, connection: Any) -> None:
        super().add(connection)
        self._tell(len(self))

    def discard(self, connection: Any) -> None:
        super().discard(connection)
        self._tell(len(self))


class Acceptor:
    """Takes connections for front-end `index`, in the place of the event loop's own server.

    `protocol` makes what speaks HTTP on a connection.
    """

    def __init__(
        self,
        listener: socket.socket,
        shares: Shares,
        index: int,
        protocol: Callable[[], asyncio.Protocol],
        tls: ssl.SSLContext | None,
    ) -> None:
        self._listener = listener
        self._shares = shares
        self._index = index
        self._protocol = protocol
        self._tls = tls
        self._loop = asyncio.get_running_loop()
        self._opening: set[asyncio.Task[None]] = set()
        self._paused: asyncio.TimerHandle | None = None
        shares.tell(index, 0)
        self._listen()

    def close(self) -> None:
        """Take no more."""
        self._loop.remove_reader(self._listener)
        if self._paused is not None:
            self._paused.cancel()
        self._shares.gone(self._index)

    async def wait_closed(self) -> None:
        """End the handshakes that have not ended."""
        await ended(self._opening)

    def _listen(self) -> None:
        self._paused = None
        self._loop.add_reader(self._listener, self._ready)

    def _ready(self) -> None:
        lead = self._shares.lead_of(self._index) + len(self._opening)
        if lead > 0:
            self._pause(_ASIDE_S, self._take_what_is_left)
        else:
            self._take(min(1 - lead, _AT_ONCE))

    def _take_what_is_left(self) -> None:
        self._listen()
        self._take(_AT_ONCE)

    def _pause(self, seconds: float, then: Callable[[], None]) -> None:
        self._loop.remove_reader(self._listener)
        self._paused = self._loop.call_later(seconds, then)

    def _take(self, most: int) -> None:
        for _ in range(most):
            try:
                connection, _ = self._listener.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:  # no files or no memory left: as asyncio's servers do
                log.error("no connection can be accepted", reason=error.strerror)  # noqa: TRY400
                self._pause(_NO_FILES_PAUSE_S, self._listen)
                return
            opening = self._loop.create_task(self._open(connection))
            self._opening.add(opening)
            opening.add_done_callback(self._opening.discard)

    async def _open(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        if connection.family != socket.AF_UNIX:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            await self._loop.connect_accepted_socket(self._protocol, connection, ssl=self._tls)
        except (OSError, TimeoutError) as error:  # a client that left, or does not speak TLS
            log.debug("a connection was not opened", reason=str(error))
            connection.close()
