"""An upstream for tests that answers, refuses, hangs or breaks off, on a real loopback port."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

Fault = Literal["none", "refuse", "hang", "hang_midway", "cut", "cut_whole", "status", "empty"]

FRAMES = (
    b'data: {"choices":[{"delta":{"content":"one"}}]}\n\n',
    b"data:  odd \xc3\xa9 spacing\r\n\r\n",
    b"data: [DONE]\n\n",
)
WHOLE = b'{"object": "chat.completion",  "model":"theirs"}'


@dataclass
class FaultProxy:
    """Speaks just enough HTTP. `seen` keeps what it was asked; `open_connections` counts who is still there."""

    fault: Fault = "none"
    status: int = 500
    port: int = 0
    seen: list[tuple[str, dict[str, str], dict[str, Any]]] = field(default_factory=list)
    open_connections: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    @asynccontextmanager
    async def running(self) -> AsyncIterator["FaultProxy"]:
        server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
        self.port = server.sockets[0].getsockname()[1]
        if self.fault == "refuse":
            server.close()
        try:
            yield self
        finally:
            server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.open_connections += 1
        try:
            await self._exchange(reader, writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            return
        finally:
            self.open_connections -= 1
            writer.close()

    async def _exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in head[1:] if line)}
        body = json.loads(await reader.readexactly(int(headers["content-length"])))
        self.seen.append((head[0].split(" ")[1], headers, body))
        if self.fault == "hang":
            await reader.read()
            return
        if self.fault == "status":
            _write_whole(writer, self.status, b'{"error": {"message": "their words"}}')
        elif self.fault == "cut_whole":
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 100\r\n\r\n{")
        elif body.get("stream"):
            await self._stream(reader, writer)
        else:
            _write_whole(writer, 200, WHOLE)
        await writer.drain()

    async def _stream(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")
        frames = () if self.fault == "empty" else FRAMES
        for i, frame in enumerate(frames):
            if i == 1 and self.fault in {"cut", "hang_midway"}:
                await writer.drain()
                if self.fault == "hang_midway":
                    await reader.read()
                return
            writer.write(b"%x\r\n%b\r\n" % (len(frame), frame))
            await writer.drain()
            await asyncio.sleep(0.01)  # so that frames arrive one by one
        writer.write(b"0\r\n\r\n")


def _write_whole(writer: asyncio.StreamWriter, status: int, body: bytes) -> None:
    lines = (f"HTTP/1.1 {status} X", "content-type: application/json", f"content-length: {len(body)}", "", "")
    writer.write("\r\n".join(lines).encode() + body)
