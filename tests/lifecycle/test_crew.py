"""Further front-ends as real processes, without an engine: they connect, wait, are replaced, and end when told."""

import asyncio
import os
import signal
from collections.abc import Callable
from pathlib import Path

import httpx
import psutil
import pytest

from server.lifecycle.scratch import HTTP_SOCKET
from tests.lifecycle.first_process import first_process

pytestmark = [pytest.mark.anyio, pytest.mark.slow]


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


async def until(holds: Callable[[], bool], what: str) -> None:
    for _ in range(600):
        if holds():
            return
        await asyncio.sleep(0.1)
    raise AssertionError(what)


async def test_front_ends_connect_are_replaced_when_killed_and_end_when_told(tmp_path: Path) -> None:
    async with first_process(tmp_path, 3) as first:
        await until(lambda: set(first.lines) == {1, 2}, "not all of them have connected")
        killed = first.lines[1].pid
        os.kill(killed, signal.SIGKILL)
        await until(lambda: 1 in first.lines and first.lines[1].pid != killed, "it was not started again")
        pids = [line.pid for line in first.lines.values()]
        for pid in pids:
            os.kill(pid, signal.SIGTERM)  # a terminal or a service manager may tell all of them
            os.kill(pid, signal.SIGINT)
        await asyncio.sleep(0.5)
        assert all(psutil.pid_exists(pid) for pid in pids), "a signal for the first process ended another"
        await first.several.stop()
    assert not any(psutil.pid_exists(pid) for pid in [killed, *pids])


async def test_a_front_end_whose_first_process_is_silent_for_good_ends(tmp_path: Path) -> None:
    async with first_process(tmp_path, 2) as first:
        await until(lambda: 1 in first.lines, "it has not connected")
        pid = first.lines[1].pid
        await first.lines[1].connection.close()
        await until(lambda: 1 in first.lines and first.lines[1].pid != pid, "it goes on without the first process")


async def test_figures_are_gathered_from_all_of_them(tmp_path: Path) -> None:
    async with first_process(tmp_path, 2) as first:
        await until(lambda: 1 in first.lines, "it has not connected")
        assert await first.app.elsewhere.gather() == 0
        page = first.app.figures.page().decode()
        assert "tidegate_event_loop_tasks" in page
        name = first.lines[1].name
        assert name in first.app.figures.merged._others


async def test_the_first_process_takes_what_is_passed_on_with_the_clients_address(tmp_path: Path) -> None:
    async with first_process(tmp_path, 2) as first:
        transport = httpx.AsyncHTTPTransport(uds=str(first.scratch / HTTP_SOCKET))
        async with httpx.AsyncClient(transport=transport, base_url="http://first") as client:
            assert (await client.get("/health/live")).json() == {"status": "live"}
            wrong = {"authorization": "Bearer wrong", "x-forwarded-for": "192.0.2.7"}
            for _ in range(25):
                answer = await client.get("/admin/tenants", headers=wrong)
            assert answer.status_code == 429
            other = await client.get("/admin/tenants", headers={**wrong, "x-forwarded-for": "192.0.2.8"})
            assert other.status_code == 401
