import asyncio
import os
import signal
import subprocess
import sys
from contextlib import AbstractAsyncContextManager, aclosing
from pathlib import Path

import psutil
import pytest
from redis.asyncio import Redis
from redis.exceptions import RedisError

from server.store.redis_server import CannotStart, EmbeddedRedis, find_program, wheel_program
from tests.store.running_redis import until, up
from tests.telemetry.captured_logs import captured_logs

pytestmark = pytest.mark.anyio

GONE_WITHIN_S = 5.0
USUAL_HZ = 10
OWNER = """
import asyncio, sys
from pathlib import Path
from server.store.redis_server import EmbeddedRedis

async def main():
    embedded = EmbeddedRedis(Path(sys.argv[1]))
    async with embedded.running():
        await embedded.wait_until_up()
        print(embedded.pid, flush=True)
        await asyncio.Event().wait()

asyncio.run(main())
"""


def client(embedded: EmbeddedRedis) -> AbstractAsyncContextManager[Redis]:
    redis: Redis = Redis.from_url(embedded.url)
    return aclosing(redis)


async def test_what_was_written_is_there_after_a_restart(tmp_path: Path) -> None:
    for said in (None, b"kept"):
        embedded = EmbeddedRedis(tmp_path)
        async with embedded.running():
            await up(embedded)
            async with client(embedded) as redis:
                assert await redis.get("what") == said
                await redis.set("what", "kept")


async def test_it_listens_on_its_socket_alone_and_only_its_owner_may_enter(tmp_path: Path) -> None:
    embedded = EmbeddedRedis(tmp_path / "redis")
    async with embedded.running():
        await up(embedded)
        assert embedded.pid is not None
        listening = [c for c in psutil.Process(embedded.pid).net_connections("inet") if c.status == "LISTEN"]
        assert listening == []
        assert (tmp_path / "redis").stat().st_mode & 0o077 == 0
        assert (tmp_path / "redis/redis.sock").stat().st_mode & 0o077 == 0


async def test_while_nothing_is_asked_it_wakes_up_less_often_than_by_itself(tmp_path: Path) -> None:
    embedded = EmbeddedRedis(tmp_path)
    async with embedded.running():
        await up(embedded)
        async with client(embedded) as redis:
            hz = (await redis.config_get("hz"))["hz"]
            assert int(hz or USUAL_HZ) < USUAL_HZ


async def test_leaving_ends_it(tmp_path: Path) -> None:
    embedded = EmbeddedRedis(tmp_path)
    async with embedded.running():
        await up(embedded)
        pid = embedded.pid
    assert embedded.pid is None
    assert pid is not None
    assert not psutil.pid_exists(pid)


async def test_it_is_started_again_when_it_is_killed(tmp_path: Path) -> None:
    embedded = EmbeddedRedis(tmp_path)
    async with embedded.running(), client(embedded) as redis:
        await up(embedded)
        await redis.set("what", "kept")
        first = embedded.pid
        assert first is not None
        os.kill(first, signal.SIGKILL)
        await until(lambda: embedded.pid not in (None, first))
        await until(lambda: ping(redis))
        assert await redis.get("what") == b"kept"


async def ping(redis: Redis) -> bool:
    try:
        return bool(await redis.ping())
    except RedisError:
        return False


def start_owner(folder: Path) -> tuple["subprocess.Popen[str]", int]:
    """A process that runs the embedded Redis, and the pid of that Redis."""
    owner = subprocess.Popen([sys.executable, "-c", OWNER, str(folder)], stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    return owner, next(int(line) for line in owner.stdout if line.strip().isdigit())


def gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


async def test_it_dies_with_an_owner_that_is_killed(tmp_path: Path) -> None:
    owner, pid = start_owner(tmp_path)
    owner.kill()
    owner.wait()
    await until(lambda: gone(pid), GONE_WITHIN_S)


async def test_a_second_server_shares_it_and_takes_over_with_the_data(tmp_path: Path) -> None:
    owner, _ = start_owner(tmp_path)
    second = EmbeddedRedis(tmp_path)
    async with second.running(), client(second) as redis:
        await up(second)
        assert second.pid is None
        await redis.set("what", "kept")
        owner.kill()
        owner.wait()
        await until(lambda: second.pid is not None)
        await until(lambda: ping(redis))
        assert await redis.get("what") == b"kept"


def append_only_files(folder: Path) -> list[Path]:
    """The files that hold commands, newest last: one in `appendonlydir`, or a single file before Redis 7."""
    return sorted(folder.glob("appendonlydir/*.incr.aof")) or [folder / "appendonly.aof"]


async def with_data(folder: Path) -> None:
    embedded = EmbeddedRedis(folder)
    async with embedded.running():
        await up(embedded)
        async with client(embedded) as redis:
            await redis.mset({"first": "1" * 100, "second": "2" * 100})
            await redis.set("third", "3" * 100)


async def test_a_file_that_ends_in_the_middle_of_a_command_is_read_up_to_there(tmp_path: Path) -> None:
    await with_data(tmp_path)
    (file,) = append_only_files(tmp_path)
    file.write_bytes(file.read_bytes()[:-20])
    embedded = EmbeddedRedis(tmp_path)
    async with embedded.running():
        await up(embedded)
        async with client(embedded) as redis:
            assert await redis.get("first") == b"1" * 100
            assert await redis.get("third") is None


async def test_data_that_cannot_be_read_is_left_alone_and_said(tmp_path: Path) -> None:
    await with_data(tmp_path)
    (file,) = append_only_files(tmp_path)
    broken = b"no command\r\n" + file.read_bytes()
    file.write_bytes(broken)
    with captured_logs() as logs:
        async with EmbeddedRedis(tmp_path).running():
            await until(lambda: bool(logs.events))
    (said,) = (line["event"] for line in logs.events)
    assert "cannot be read" in said
    assert str(tmp_path) in said
    assert file.read_bytes() == broken


async def test_a_program_that_is_missing_is_said_once_and_used_when_it_is_there(tmp_path: Path) -> None:
    programs: list[Path] = []

    def find() -> Path:
        if not programs:
            raise CannotStart("there is none.")
        return programs[0]

    with captured_logs() as logs:
        embedded = EmbeddedRedis(tmp_path, find)
        async with embedded.running():
            await asyncio.sleep(2.5)
            assert [line["event"] for line in logs.events] == ["The embedded Redis does not run: there is none."]
            programs.append(find_program())
            await up(embedded)


def test_the_wheel_holds_a_server_that_can_be_run() -> None:
    program = wheel_program()
    assert program is not None
    words = subprocess.run([program, "--version"], capture_output=True, text=True, check=True).stdout
    assert "Valkey server v=9.1" in words


def test_a_server_on_path_is_taken_only_where_the_wheel_has_none(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    program = tmp_path / "redis-server"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_program() == wheel_program()
    monkeypatch.setattr("server.store.redis_server.wheel_program", lambda: None)
    assert find_program() == program


def test_no_server_anywhere_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr("server.store.redis_server.wheel_program", lambda: None)
    with pytest.raises(CannotStart, match="--redis-url"):
        find_program()
