"""A client that leaves, told by a real uvicorn without anybody waiting for it."""

import asyncio
import gc
import socket
import weakref
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import uvicorn
from starlette.datastructures import Headers
from starlette.types import Receive, Scope, Send

from server.api.body import read_body
from server.api.disconnect import CancelOnDisconnect
from server.api.exchange import exchange_of, watch_for_leaving
from server.api.sending import WatchedSend

pytestmark = pytest.mark.anyio

WHOLE = [(b"content-length", b"2")]


class Watching:
    """An application that reads its body and watches its client, until `answer` is set or the client has left."""

    def __init__(self, *, watch_late: bool = False) -> None:
        self.answer = asyncio.Event()
        self.left = asyncio.Event()
        self.watching = asyncio.Event()
        self.over = asyncio.Event()
        self._watch_late = watch_late

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await read_body(receive, Headers(scope=scope), 10 << 20)
        exchange = exchange_of(receive)
        assert exchange is not None
        assert exchange is exchange_of(send)
        if self._watch_late:
            assert (await receive())["type"] == "http.disconnect"
        watch_for_leaving(exchange, self.left.set)
        self.watching.set()
        first = [asyncio.create_task(event.wait()) for event in (self.answer, self.left)]
        await asyncio.wait(first, return_when=asyncio.FIRST_COMPLETED)
        if self.answer.is_set():
            await send({"type": "http.response.start", "status": 200, "headers": WHOLE})
            await send({"type": "http.response.body", "body": b"ok"})
        for task in first:
            task.cancel()
        self.over.set()


@asynccontextmanager
async def served(app: Any) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A connection to a real uvicorn with this application."""
    config = uvicorn.Config(app, http="httptools", lifespan="off", log_config=None, access_log=False)
    server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        serving = asyncio.create_task(server.serve([listener]))
        reader, writer = await asyncio.open_connection(*listener.getsockname())
        yield reader, writer
        writer.close()
        server.should_exit = True
        await asyncio.wait_for(serving, 5)


def request(body: bytes = b"") -> bytes:
    return b"POST / HTTP/1.1\r\nhost: here\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body)


@pytest.mark.parametrize("body", [b"", b"x" * 1_000_000], ids=["no body", "a body for which reading was paused"])
async def test_a_client_that_leaves_is_noticed(body: bytes) -> None:
    app = Watching()
    async with served(app) as (_, writer):
        writer.write(request(body))
        await asyncio.wait_for(app.watching.wait(), 5)
        assert not app.left.is_set()
        writer.close()
        await asyncio.wait_for(app.left.wait(), 5)


async def test_one_that_has_left_before_is_noticed_too() -> None:
    app = Watching(watch_late=True)
    async with served(app) as (_, writer):
        writer.write(request())
        await writer.drain()
        writer.close()
        await asyncio.wait_for(app.left.wait(), 5)


async def test_a_client_that_has_its_answer_may_go() -> None:
    app = Watching()
    async with served(app) as (reader, writer):
        writer.write(request())
        await asyncio.wait_for(app.watching.wait(), 5)
        app.answer.set()
        assert (await reader.readuntil(b"ok")).startswith(b"HTTP/1.1 200")
        await app.over.wait()
        writer.close()
        await asyncio.sleep(0.05)
    assert not app.left.is_set()


async def test_the_next_request_of_a_connection_is_watched_as_well() -> None:
    app = Watching()
    app.answer.set()
    async with served(app) as (reader, writer):
        writer.write(request())
        await reader.readuntil(b"ok")
        app.answer.clear()
        app.watching.clear()
        writer.write(request())
        await asyncio.wait_for(app.watching.wait(), 5)
        writer.close()
        await asyncio.wait_for(app.left.wait(), 5)


async def test_work_for_a_client_that_leaves_is_cancelled_without_a_task_that_waits_for_it() -> None:
    cancelled, started = asyncio.Event(), asyncio.Event()
    before: set[Any] = set()

    async def app(_: Scope, receive: Receive, __: Send) -> None:
        await receive()
        before.update(asyncio.all_tasks())
        async with CancelOnDisconnect(receive) as client:
            assert asyncio.all_tasks() == before
            started.set()
            try:
                await asyncio.Event().wait()
            finally:
                cancelled.set()
        assert client.client_left

    async with served(app) as (_, writer):
        writer.write(request())
        await asyncio.wait_for(started.wait(), 5)
        writer.close()
        await asyncio.wait_for(cancelled.wait(), 5)


async def test_an_exchange_that_is_over_is_freed_without_the_garbage_collector() -> None:
    watched: list[weakref.ref[Any]] = []

    async def app(_: Scope, receive: Receive, send: Send) -> None:
        watched.append(weakref.ref(exchange_of(receive)))
        await receive()
        async with CancelOnDisconnect(receive) as client, WatchedSend(send, send, 60, client.leave) as connection:
            watched.append(weakref.ref(connection))
            await connection({"type": "http.response.start", "status": 200, "headers": WHOLE})
            client.finish()
            await connection({"type": "http.response.body", "body": b"ok"})

    gc.disable()
    try:
        async with served(app) as (reader, writer):
            writer.write(request())
            await reader.readuntil(b"ok")
        assert [alive() for alive in watched] == [None, None]
    finally:
        gc.enable()
