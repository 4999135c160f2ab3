"""Connections are spread over the front-ends that share a socket. Here they share an event loop, too."""

import asyncio
import errno
import socket
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from starlette.responses import PlainTextResponse

from server.lifecycle.accepting import Acceptor, Shares
from server.lifecycle.http import HttpServer, Share, private_config

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


async def until(holds: Callable[[], bool]) -> None:
    for _ in range(500):
        if holds():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("not within five seconds")


@dataclass
class Crowd:
    """Servers on one socket, and clients of theirs."""

    port: int
    servers: list[HttpServer]
    clients: list[asyncio.StreamWriter]

    @property
    def held(self) -> list[int]:
        return [len(server.server_state.connections) for server in self.servers]

    async def connect(self) -> bytes:
        """Open a connection that is kept, and return the answer's first line."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        self.clients.append(writer)
        writer.write(b"GET / HTTP/1.1\r\nhost: here\r\n\r\n")
        line = await reader.readline()
        while await reader.readline() != b"\r\n":
            pass
        return line

    async def leave(self, number: int) -> None:
        for client in self.clients[:number]:
            client.close()
        self.clients = self.clients[number:]
        await until(lambda: sum(self.held) == len(self.clients))


@asynccontextmanager
async def crowd(folder: Path, count: int, *, stuck: int = 0) -> AsyncIterator[Crowd]:
    """`stuck` of the front-ends say that they listen, and never accept anything."""
    shares = Shares(folder / "connections", count + stuck)
    for index in range(count, count + stuck):
        shares.tell(index, 0)
    with socket.create_server(("127.0.0.1", 0), backlog=512) as listener:
        listener.setblocking(False)
        listeners = [listener.dup() for _ in range(count)]
        servers = [HttpServer(private_config(PlainTextResponse("ok")), Share(shares, i)) for i in range(count)]
        tasks = [asyncio.create_task(servers[i].serve([listeners[i]])) for i in range(count)]
        await until(lambda: all(server.started for server in servers))
        clients: list[asyncio.StreamWriter] = []
        here = Crowd(listener.getsockname()[1], servers, clients)
        try:
            yield here
        finally:
            for client in here.clients:
                client.close()
            for server in servers:
                server.stop()
            await asyncio.gather(*tasks)


async def test_who_comes_one_by_one_is_spread_evenly(tmp_path: Path) -> None:
    async with crowd(tmp_path, 3) as here:
        for _ in range(30):
            assert b"200" in await here.connect()
        assert here.held == [10, 10, 10]


async def test_a_crowd_that_comes_at_once_is_spread_as_well(tmp_path: Path) -> None:
    async with crowd(tmp_path, 2) as here:
        lines = await asyncio.gather(*(here.connect() for _ in range(200)))
        assert all(b"200" in line for line in lines)
        assert min(here.held) >= 80


async def test_who_has_lost_connections_gets_the_next(tmp_path: Path) -> None:
    async with crowd(tmp_path, 2) as here:
        for _ in range(10):
            await here.connect()
        fewer = here.held
        await here.leave(6)
        for _ in range(6):
            await here.connect()
        assert here.held == fewer == [5, 5]


async def test_one_that_accepts_nothing_does_not_keep_clients_waiting(tmp_path: Path) -> None:
    async with crowd(tmp_path, 1, stuck=1) as here:
        async with asyncio.timeout(2):
            for _ in range(20):
                await here.connect()
            await asyncio.gather(*(here.connect() for _ in range(100)))
        assert here.held == [120]


def test_one_that_is_gone_is_not_waited_for(tmp_path: Path) -> None:
    shares, elsewhere = (Shares(tmp_path / "connections", 3) for _ in range(2))
    shares.tell(0, 7)
    assert elsewhere.lead_of(0) == 0
    elsewhere.tell(2, 4)
    assert shares.lead_of(0) == 3
    assert shares.lead_of(2) == -3
    shares.gone(2)
    assert shares.lead_of(0) == 0


async def test_one_that_stops_takes_no_more_and_is_gone(tmp_path: Path) -> None:
    shares = Shares(tmp_path / "connections", 2)
    async with crowd(tmp_path, 2) as here:
        await here.connect()
        here.servers[1].stop()
        await until(lambda: shares.lead_of(0) <= 0)
        for _ in range(5):
            await here.connect()
        assert here.held[0] >= 5


class _NoFiles(socket.socket):
    """Has no files left for the first connections."""

    failures = 2

    def accept(self) -> tuple[socket.socket, Any]:
        if self.failures:
            self.failures -= 1
            raise OSError(errno.EMFILE, "Too many open files")
        return super().accept()


async def test_it_goes_on_when_there_are_files_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.lifecycle.accepting._NO_FILES_PAUSE_S", 0.01)
    connected = asyncio.Event()

    class Greeter(asyncio.Protocol):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            connected.set()
            transport.close()

    with _NoFiles() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        listener.setblocking(False)
        acceptor = Acceptor(listener, Shares(tmp_path / "connections", 1), 0, Greeter, None)
        with socket.create_connection(listener.getsockname()):
            async with asyncio.timeout(5):
                await connected.wait()
        acceptor.close()
        await acceptor.wait_closed()
        assert listener.failures == 0


async def test_a_client_that_does_not_speak_tls_harms_nobody(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        acceptor = Acceptor(listener, Shares(tmp_path / "connections", 1), 0, asyncio.Protocol, tls)
        reader, writer = await asyncio.open_connection(*listener.getsockname())
        writer.write(b"GET / HTTP/1.1\r\n\r\n")
        async with asyncio.timeout(5):
            while await reader.read(100):
                pass
        writer.close()
        acceptor.close()
        await acceptor.wait_closed()
