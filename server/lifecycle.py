"""The life of the process: bind at once, load, serve, drain, end with no child left."""

import asyncio
import contextlib
import gc
import os
import resource
import shutil
import signal
import socket
import sys
import tempfile
from collections.abc import AsyncIterator, Coroutine, Generator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import psutil
import structlog
import uvicorn
import uvloop

from server.app import Application, build_application
from server.policy.refusals import Draining
from server.settings import Settings
from server.store.connection import BadRedisUrl
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
_ALIVE_CHECK_INTERVAL_S: Final = 1.0
_REDIS_START_S: Final = 3.0
_CHILD_EXIT_TIMEOUT_S: Final = 5.0
_HTTP_STOP_TIMEOUT_S: Final = 5


def serve(settings: Settings, vllm_args: Sequence[str], versions: Mapping[str, str]) -> int:
    """Serve until told to stop. Returns the process's exit code."""
    os.environ.setdefault("PYTHONWARNINGS", _QUIET_RESOURCE_TRACKER)
    json_lines = logs.wants_json(settings.log_format)
    logs.configure(json_lines=json_lines, level=settings.log_level)
    try:
        listener = _bind(settings)
    except OSError as error:
        where = settings.uds or f"{settings.host}:{settings.port}"
        _say_why(f"Cannot listen on {where}: {error.strerror}. Choose another with --port or --host.")
        return 1
    _raise_open_files_limit()
    with (
        tempfile.TemporaryDirectory(prefix="tidegate-") as scratch,
        contextlib.closing(listener),
        asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
    ):
        try:
            process = Process(settings, vllm_args, versions, Path(scratch), json_lines=json_lines)
        except (BadRedisUrl, TenantsFileError) as error:
            _say_why(str(error))
            return 1
        code = runner.run(process.run(listener))
        if process.loading_abandoned:  # its thread cannot be interrupted, and leaving the block would wait for it
            shutil.rmtree(scratch)
            sys.stderr.flush()
            os._exit(code)
    return code


class Process:
    """One serving process."""

    def __init__(
        self,
        settings: Settings,
        vllm_args: Sequence[str],
        versions: Mapping[str, str],
        scratch: Path,
        *,
        json_lines: bool,
    ) -> None:
        self._settings = settings
        self._flags = _all_flags(settings, vllm_args)
        self._scratch = scratch
        self._json_lines = json_lines
        self._app: Application = build_application(settings, versions, operator_key=_operator_key(settings))
        self._stop = asyncio.Event()
        self._stop_at_once = asyncio.Event()
        self.loading_abandoned = False

    async def run(self, listener: socket.socket) -> int:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal)
        loop.add_signal_handler(signal.SIGHUP, self._app.access.reload_declared)
        self._say_where(listener)
        http = _HttpServer(self._http_config())
        serving = asyncio.create_task(http.serve(sockets=[listener]))
        try:
            async with self._app.store.running(), self._keys_followed(), self._app.batches.running():
                code = await self._live()
        finally:
            http.should_exit = True
            await serving
        return code

    @asynccontextmanager
    async def _keys_followed(self) -> AsyncIterator[None]:
        """Inside it, changes of tenants and keys are followed, in Redis and in the tenants file."""
        watching = asyncio.create_task(self._follow_keys())
        try:
            yield
        finally:
            watching.cancel()
            await asyncio.wait({watching})
            await self._app.access.flush()

    async def _follow_keys(self) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_REDIS_START_S):
                await self._app.store.wait_until_up()
        await self._app.access.watch(self._on_open_or_closed)

    def _on_signal(self) -> None:
        if self._stop.is_set():
            self._stop_at_once.set()
        self._stop.set()

    async def _live(self) -> int:
        stack = await self._load()
        if stack is None:
            _end_children(self._app.store.server_pid)
            return 0 if self._stop.is_set() else 1
        self._app.slot.fill(stack)
        gc.collect()
        gc.freeze()  # what loading left is there to stay; the collector need not walk it again
        log.info("ready", models=list(stack.model_names), max_model_len=stack.max_model_len)
        reporting = asyncio.create_task(_report(stack))
        died = asyncio.create_task(_death_of(stack))
        await _first(self._stop.wait(), died)
        reporting.cancel()
        if died.done():
            log.error("The engine ended unexpectedly. The log lines above say why.")
            self._app.slot.empty("engine ended")
        else:
            died.cancel()
            await self._drain()
        await asyncio.to_thread(stack.shutdown)
        _end_children(self._app.store.server_pid)
        return 1 if died.done() and not died.cancelled() else 0

    async def _load(self) -> "Stack | None":
        """The stack, or None if loading failed (said in the log) or was stopped."""
        loading = asyncio.create_task(self._build())
        await _first(self._stop.wait(), loading)
        if not loading.done():
            self.loading_abandoned = True
            loading.cancel()
            return None
        return loading.result()

    async def _build(self) -> "Stack | None":
        self._app.slot.enter("importing the engine")
        await asyncio.to_thread(_import_engine)
        from server.engine.stack import StackRequest, build_stack
        from server.engine.start_failures import StartFailure

        config, errors = self._scratch / "logging.json", self._scratch / "engine-errors.log"
        logs.write_child_config(config, errors, json_lines=self._json_lines, level=self._settings.log_level)
        s = self._settings
        request = StackRequest(self._flags, config, errors, s.context_count_cache_entries, s.fast_streams)
        try:
            return await build_stack(request, self._app.generation, self._app.slot.enter)
        except StartFailure as failure:
            _say_why(str(failure))
            return None

    async def _drain(self) -> None:
        """Finish what runs; what is still running at the deadline, or at a second signal, ends with an error."""
        timeout_s = self._settings.drain_timeout_s
        requests = self._app.requests
        log.info("draining", open_requests=len(requests), timeout_s=timeout_s)
        draining = asyncio.create_task(requests.drain(timeout_s))
        await _first(self._stop_at_once.wait(), draining)
        draining.cancel()
        if len(requests):
            log.warning("ending open requests", open_requests=len(requests))
            await requests.end_all(Draining("The server is stopping and could not finish this answer."))

    def _http_config(self) -> uvicorn.Config:
        s = self._settings
        return uvicorn.Config(
            self._app.asgi,
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
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


def _bind(settings: Settings) -> socket.socket:
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


async def _report(stack: "Stack") -> None:
    while True:
        await asyncio.sleep(_REPORT_INTERVAL_S)
        await stack.report()


async def _death_of(stack: "Stack") -> None:
    while True:
        await asyncio.sleep(_ALIVE_CHECK_INTERVAL_S)
        if not stack.alive:
            return


async def _first(*waits: Coroutine[Any, Any, Any] | asyncio.Task[Any]) -> None:
    """Wait until one of them is done; coroutines among them are cancelled then, tasks are left to their owner."""
    tasks = [wait if isinstance(wait, asyncio.Task) else asyncio.create_task(wait) for wait in waits]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for wait, task in zip(waits, tasks, strict=True):
            if wait is not task:
                task.cancel()


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
