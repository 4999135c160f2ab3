"""The HTTP server of a process on a real socket."""

import asyncio
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import httpx
import pytest
from starlette.responses import PlainTextResponse

from server.lifecycle.http import HttpServer, private_config

pytestmark = pytest.mark.anyio


@dataclass
class Serving:
    """A server and the task that serves."""

    http: HttpServer
    task: "asyncio.Task[None]"
    client: httpx.AsyncClient

    async def date(self) -> str:
        return (await self.client.get("/")).headers["date"]


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@asynccontextmanager
async def serving() -> AsyncIterator[Serving]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        http = HttpServer(private_config(PlainTextResponse("ok")))
        task = asyncio.create_task(http.serve([listener]))
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        async with httpx.AsyncClient(base_url=url, trust_env=False) as client:
            yield Serving(http, task, client)
        http.stop()
        await task


async def test_it_ends_when_it_is_told_and_not_at_its_next_tick() -> None:
    taken_s = []
    for _ in range(3):  # on a busy machine one of them may take longer
        async with serving() as server:
            await server.date()
            await server.client.aclose()
            told_s = time.monotonic()
            server.http.stop()
            await server.task
            taken_s.append(time.monotonic() - told_s)
    assert min(taken_s) < 0.5


async def test_one_that_is_stopped_before_it_serves_ends() -> None:
    async with serving() as server, asyncio.timeout(5):
        server.http.stop()
        await server.task


async def test_the_date_of_an_answer_follows_the_clock() -> None:
    async with serving() as server:
        first = await server.date()
        await asyncio.sleep(2.2)
        assert await server.date() != first
