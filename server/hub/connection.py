"""One front-end's connection to the first process: messages on a Unix socket, in order, each with its length first."""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, Final

import msgspec

from server.hub import messages

_LENGTH_BYTES: Final = 4
_ENCODER: Final = msgspec.msgpack.Encoder()
_DECODER: Final[msgspec.msgpack.Decoder[messages.Any]] = msgspec.msgpack.Decoder(messages.Any)


class Connection:
    """Both ends are the same. What is sent leaves in order, and is lost only with the connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    def send(self, message: messages.Message) -> None:
        """Send without waiting; to an end that is gone, nothing."""
        encoded = _ENCODER.encode(message)
        if not self._writer.is_closing():
            self._writer.write(len(encoded).to_bytes(_LENGTH_BYTES, "big") + encoded)

    async def received(self) -> AsyncIterator[messages.Any]:
        """What the other end says, until it is gone."""
        with suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                length = int.from_bytes(await self._reader.readexactly(_LENGTH_BYTES), "big")
                yield _DECODER.decode(await self._reader.readexactly(length))

    async def close(self) -> None:
        """Send what is left, and close."""
        self._writer.close()
        with suppress(ConnectionError):
            await self._writer.wait_closed()


async def connect(path: Path) -> Connection:
    """Raises `OSError`."""
    return Connection(*await asyncio.open_unix_connection(str(path)))


@asynccontextmanager
async def listening(path: Path, talk: Callable[[Connection], Coroutine[Any, Any, None]]) -> AsyncIterator[None]:
    """Inside it, `talk` runs for each connection. Leaving ends the connections; only this user can make one."""
    talks: dict[asyncio.Task[None], Connection] = {}

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection, task = Connection(reader, writer), asyncio.current_task()
        assert task is not None
        talks[task] = connection
        try:
            await talk(connection)
        finally:
            del talks[task]
            await connection.close()

    server = await asyncio.start_unix_server(serve, str(path))
    await asyncio.to_thread(path.chmod, 0o600)
    try:
        yield
    finally:
        server.close()
        left = dict(talks)
        await asyncio.gather(*(connection.close() for connection in left.values()))
        await asyncio.gather(*left)
