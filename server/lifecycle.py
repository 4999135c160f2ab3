"""The life of the process: bind at once, load, serve, drain, end with no child left."""

import asyncio
import contextlib
import os
import resource
import shutil
import signal
import socket
import sys
import tempfile
from collections.abc import AsyncIterator, Coroutine, Generator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Never

import psutil
import structlog
import uvicorn
import uvloop

from server.app import Application, build_application
from server.engine.fork_server import ForkServer
from server.engine.start_failures import StartFailure
from server.engine.supervisor import Supervisor
from server.policy.refusals import Draining, NotReady
from server.policy.restarts import RestartRules
from server.serving.engine_slot import EngineSlot
from server.serving.seat import Seat
from server.settings import Settings
from server.store.connection import BadRedisUrl
from server.store.ending import ended
from server.store.operator_key import OperatorKeyUnavailable, ensure_operator_key
from server.store.tenants_file import TenantsFileError
from server.telemetry import logs

if TYPE_CHECKING:
    from server.engine.stack import Stack

log = structlog.get_logger(__name__)

_LOOPBACK: Final = frozenset({"127.0.0.1", "::1", "localhost"})
# An engine that is ended leaves shared memory to Python's resource tracker, which would say so after our last word.
_QUIET_RESOURCE_TRACKER: Final = "ignore::UserWarning:multiprocessing.resource_tracker"
_BACKLOG: Final = 2048
_OPEN_FILES: Final = 65535
_REPORT_INTERVAL_S: Final = 10.0
_REDIS_START_S: Final = 3.0
_CHILD_EXIT_TIMEOUT_S: Final = 5.0
# Longer than proxies keep theirs (nginx: 60 s): a connection that both may close is closed under a request some day.
_KEEP_ALIVE_S: Final = 75
_HTTP_STOP_TIMEOUT_S: Final = 5
_SOCKETS_FOLDER: Final = "VLLM_RPC_BASE_PATH"  # where vLLM puts its engine's sockets


def serve(settings: Settings, vllm_args: Sequence[str], versions: Mapping[str, str]) -> int:
    """Serve until told to stop. Returns the process's exit code."""
    configure_logs(settings)
    try:
        listener = bind(settings)
    except OSError as error:
        where = settings.uds or f"{settings.host}:{settings.port}"
        _say_why(f"Cannot listen on {where}: {error.strerror}. Choose another with --port or --host.")
        return 1
    try:
        with (
            contextlib.closing(listener),
            prepared(settings, vllm_args, versions) as process,
            asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
        ):
            code = runner.run(process.run(listener))
            if process.loading_abandoned:
                _leave_behind_the_loading(process.scratch, code)
    except (BadRedisUrl, TenantsFileError) as error:
        _say_why(str(error))
        return 1
    return code


def configure_logs(settings: Settings) -> None:
    """Let this process, and those it will start, log as the settings say."""
    os.environ.setdefault("PYTHONWARNINGS", _QUIET_RESOURCE_TRACKER)
    logs.configure(json_lines=logs.wants_json(settings.log_format), level=settings.log_level)


@contextmanager
def prepared(settings: Settings, vllm_args: Sequence[str], versions: Mapping[str, str]) -> "Iterator[Process]":
    """A process that does not run yet, on a machine made ready for it. Raises `BadRedisUrl` and `TenantsFileError`."""
    _raise_open_files_limit()
    with tempfile.TemporaryDirectory(prefix="tidegate-") as scratch:
        os.environ.setdefault(_SOCKETS_FOLDER, scratch)
        yield Process(settings, vllm_args, versions, Path(scratch))


class Process:
    """One serving process."""

    def __init__(
        self, settings: Settings, vllm_args: Sequence[str], versions: Mapping[str, str], scratch: Path
    ) -> None:
        self._settings = settings
        self._fork_server = ForkServer() if settings.engine_fork_server else None
        self._flags = _all_flags(settings, vllm_args)
        self.scratch = scratch
        self._app: Application = build_application(settings, versions, operator_key=_operator_key(settings))
        self._stop = asyncio.Event()
        self._stop_at_once = asyncio.Event()
        self.loading_abandoned = False
        self.start_failure: StartFailure | None = None

    async def run(self, listener: socket.socket) -> int:
        """Live, with the signals of an operator. Returns the process's exit code."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.stop)
        loop.add_signal_handler(signal.SIGHUP, self._app.access.reload_declared)
        return await self.live(listener)

    async def live(self, listener: socket.socket) -> int:
        """Load, serve and drain. Returns the process's exit code."""
        loop = asyncio.get_running_loop()
        self._app.figures.watch_event_loop(lambda: len(asyncio.all_tasks(loop)))
        self._say_where(listener)
        http = _HttpServer(self._http_config())
        serving = asyncio.create_task(http.serve(sockets=[listener]))
        try:
            async with self._app.store.running(), self._keys_followed(), self._app.batches.running():
                code = await self._live()
        finally:
            http.should_exit = True
            await serving
            await asyncio.to_thread(self._app.traces.close)
        return code

    @property
    def application(self) -> Application:
        """What answers HTTP, and its parts."""
        return self._app

    def stop(self) -> None:
        """Drain and end; called again, end without waiting for what runs."""
        if self._stop.is_set():
            self._stop_at_once.set()
        self._stop.set()

    @asynccontextmanager
    async def _keys_followed(self) -> AsyncIterator[None]:
        """Inside it, changes of tenants and keys are followed, in Redis and in the tenants file."""
        watching = asyncio.create_task(self._follow_keys())
        try:
            yield
        finally:
            await ended({watching})
            await self._app.access.flush()

    async def _follow_keys(self) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_REDIS_START_S):
                await self._app.store.wait_until_up()
        await self._app.access.watch(self._on_open_or_closed)

    async def _live(self) -> int:
        stack = await self._load()
        if stack is None:
            _end_children(self._app.store.server_pid)
            return 0 if self._stop.is_set() else 1
        log.info("ready", models=list(stack.model_names), max_model_len=stack.max_model_len)
        supervisor = self._supervisor()
        async with _running(_report(self._app.slot), self._app.ladder.run()):
            supervising = asyncio.create_task(supervisor.run(stack))
            del stack  # the supervisor's from now on
            await _first(self._stop.wait(), supervising)
            gave_up = supervising.done()
            if gave_up:
                await self._end_without_engine(supervising)
            else:
                await self._drain()
            self.loading_abandoned = supervisor.building
            await ended({supervising})
        last = self._app.slot.empty("stopping")
        if last is not None:
            await last.close()
        await self._app.fallback.close()
        _end_children(self._app.store.server_pid)
        return 1 if gave_up else 0

    def _supervisor(self) -> Supervisor:
        s, app = self._settings, self._app
        rules = RestartRules(s.engine_hang_timeout_s, max_failures=s.engine_max_failed_restarts)
        return Supervisor(self._build, Seat(app.slot, app.gate), app.requests, app.resilience, rules)

    async def _end_without_engine(self, supervising: asyncio.Task[None]) -> None:
        """Too many restarts have failed: whoever waits is told, and the process ends so that a service manager acts."""
        log.error("The engine could not be replaced. The log lines above say why.", exc_info=supervising.exception())
        await self._app.requests.drain(0)
        await self._app.requests.end_all(NotReady("The model could not be started again. Please try again later."))

    async def _load(self) -> "Stack | None":
        """The first stack, or None if loading failed (said in the log) or was stopped."""
        loading = asyncio.create_task(self._import_and_build())
        await _first(self._stop.wait(), loading)
        if not loading.done():
            self.loading_abandoned = True
            loading.cancel()
            return None
        return loading.result()

    async def _import_and_build(self) -> "Stack | None":
        self._app.slot.enter("importing the engine")
        if self._fork_server is not None:
            self._fork_server.start()
        await asyncio.to_thread(_import_engine)
        try:
            return await self._build()
        except StartFailure as failure:
            self.start_failure = failure
            _say_why(str(failure))
            return None

    async def _build(self) -> "Stack":
        """A new stack. Raises `StartFailure`."""
        from server.engine.stack import StackRequest, build_stack

        s = self._settings
        config, errors = self.scratch / "logging.json", self.scratch / "engine-errors.log"
        errors.unlink(missing_ok=True)  # the words of an engine that is gone explain nothing about the next
        logs.write_child_config(config, errors, json_lines=logs.wants_json(s.log_format), level=s.log_level)
        request = StackRequest(
            self._flags, config, errors, s.context_count_cache_entries, s.fast_streams, self._app.traces.on,
            self._fork_server,
        )  # fmt: skip
        return await build_stack(request, self._app.generation, self._app.slot.enter)

    async def _drain(self) -> None:
        """Finish what runs; what is still running at the deadline, or at a second signal, ends with an error."""
        timeout_s = self._settings.drain_timeout_s
        requests = self._app.requests
        await self._lame_duck()
        log.info("draining", open_requests=len(requests), timeout_s=timeout_s)
        draining = asyncio.create_task(requests.drain(timeout_s))
        await _first(self._stop_at_once.wait(), draining)
        draining.cancel()
        if len(requests):
            log.warning("ending open requests", open_requests=len(requests))
            await requests.end_all(Draining("The server is stopping and could not finish this answer."))

    async def _lame_duck(self) -> None:
        """Say that the server is leaving before it refuses anything: a balancer needs a moment to see it."""
        self._app.requests.announce_leaving()
        if (delay_s := self._settings.drain_delay_s) > 0:
            log.info("leaving: not ready any more, and taking requests for a moment", delay_s=delay_s)
            await _first(self._stop_at_once.wait(), asyncio.sleep(delay_s))

    def _http_config(self) -> uvicorn.Config:
        s = self._settings
        return uvicorn.Config(
            self._app.asgi,
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_keep_alive=_KEEP_ALIVE_S,
            timeout_graceful_shutdown=_HTTP_STOP_TIMEOUT_S,
            ssl_keyfile=s.ssl_keyfile,
            ssl_certfile=s.ssl_certfile,
            ssl_ca_certs=s.ssl_ca_certs,
            ssl_cert_reqs=s.ssl_cert_reqs,
            ssl_ciphers=s.ssl_ciphers,
            forwarded_allow_ips=list(s.forwarded_allow_ips),
        )

    def _say_where(self, listener: socket.socket) -> None:
        s = self._settings
        if s.uds:
            log.info("listening", socket=s.uds)
            return
        scheme = "https" if s.ssl_certfile else "http"
        host, port = listener.getsockname()[:2]
        log.info("listening", url=f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}/v1")

    def _on_open_or_closed(self, is_open: bool) -> None:
        """Told as soon as it is known whether callers need a key, and whenever that changes."""
        s = self._settings
        if is_open and s.uds is None and s.host not in _LOOPBACK:
            log.warning(
                "ANYONE WHO REACHES THIS ADDRESS CAN USE THE MODEL: there is no tenant, no --api-key is set and the "
                "server does not listen on loopback only",
                host=s.host,
            )
        else:
            log.info("callers need no key" if is_open else "callers need a key")


class _HttpServer(uvicorn.Server):
    """uvicorn without its signal handlers: a signal drains first and stops HTTP last."""

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield


def _operator_key(settings: Settings) -> str | None:
    """The operator's key, made at the first start; without one the operator's routes are closed to everybody."""
    if settings.operator_key is not None:
        return settings.operator_key
    try:
        return ensure_operator_key(settings.data_path)
    except OperatorKeyUnavailable as error:
        log.warning(f"{error} The operator's routes stay closed; give a key with --operator-key.")
        return None


def _all_flags(settings: Settings, vllm_args: Sequence[str]) -> tuple[str, ...]:
    """vLLM's flags, the file's before the command line's, so that the latter win.

    A model that opens the command line stays in front: after a flag that takes a list it would be one more item.
    """
    named = ("--model", settings.model) if settings.model else ()
    opens_with_model = bool(vllm_args) and not vllm_args[0].startswith("-")
    first, rest = (vllm_args[:1], vllm_args[1:]) if opens_with_model else ((), vllm_args)
    return (*first, *named, *settings.vllm_flags, *rest)


def _say_why(sentence: str) -> None:
    """The one line that a start which failed leaves for the operator; a traceback would bury it."""
    log.error(sentence)


def bind(settings: Settings) -> socket.socket:
    """The socket to listen on. Raises `OSError`."""
    if settings.uds:
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(settings.uds)
    else:
        family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
        listener = socket.create_server((settings.host, settings.port), family=family, backlog=_BACKLOG)
    listener.setblocking(False)
    return listener


def _raise_open_files_limit() -> None:
    """One connection is one file; the usual soft limit of 1,024 is soon reached."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _OPEN_FILES if hard == resource.RLIM_INFINITY else min(_OPEN_FILES, hard)
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _import_engine() -> None:
    import server.engine.stack  # noqa: F401  # seconds of imports, done where they do not block the port


async def _report(slot: EngineSlot) -> None:
    """Let vLLM log its throughput and cache figures now and then."""
    while True:
        await asyncio.sleep(_REPORT_INTERVAL_S)
        if slot.ready:
            await slot.stack.report()


@contextlib.asynccontextmanager
async def _running(*works: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """Run these beside the block, and cancel them with it."""
    tasks = [asyncio.create_task(work) for work in works]
    for task in tasks:
        task.add_done_callback(_say_if_failed)
    try:
        yield
    finally:
        await ended(tasks)


def _say_if_failed(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        log.error("a task beside the requests has failed", exc_info=error)


async def _first(*waits: Coroutine[Any, Any, Any] | asyncio.Task[Any]) -> None:
    """Wait until one of them is done; coroutines among them are cancelled then, tasks are left to their owner."""
    tasks = [wait if isinstance(wait, asyncio.Task) else asyncio.create_task(wait) for wait in waits]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for wait, task in zip(waits, tasks, strict=True):
            if wait is not task:
                task.cancel()


def _leave_behind_the_loading(scratch: Path, code: int) -> Never:
    """End now: the thread that loads cannot be interrupted, and Python would wait for it.

    Until the last moment it may write files and start processes, so both are cleared away here once more.
    """
    shutil.rmtree(scratch, ignore_errors=True)
    _end_children(spared=None)
    sys.stderr.flush()
    os._exit(code)


def _end_children(spared: int | None) -> None:
    """End every process that this one started, and theirs, except the one that its owner ends after the last settle.

    Python's resource tracker is left: it cleans up shared memory, and ends by itself with this process.
    """
    family = psutil.Process().children(recursive=True)
    children = [child for child in family if child.pid != spared and not _is_resource_tracker(child)]
    for child in children:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.terminate()
    _, alive = psutil.wait_procs(children, timeout=_CHILD_EXIT_TIMEOUT_S)
    for child in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()


def _is_resource_tracker(child: psutil.Process) -> bool:
    try:
        return any("resource_tracker" in word for word in child.cmdline())
    except psutil.NoSuchProcess:
        return False
