"""The life of the first process, most often the only one: bind at once, load, serve, drain, end with no child left."""

import asyncio
import contextlib
import os
import signal
import socket
import tempfile
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

import structlog
import uvloop

from server.app import Application, build_application
from server.engine.fork_server import ForkServer
from server.engine.processes import SOCKETS_FOLDER
from server.engine.start_failures import StartFailure
from server.engine.supervisor import Supervisor
from server.lifecycle.draining import drain
from server.lifecycle.ending import end_children, leave_behind_the_loading
from server.lifecycle.http import HttpServer, public_config
from server.lifecycle.machine import (
    bind,
    configure_logs,
    leave_a_core_to_the_event_loop,
    operator_key,
    raise_open_files_limit,
)
from server.lifecycle.scratch import ENGINE_ERRORS, LOGGING_CONFIG
from server.lifecycle.several import Several, plan_for
from server.lifecycle.tasks import first, running
from server.policy.refusals import NotReady
from server.policy.restarts import RestartRules
from server.serving.engine_slot import EngineSlot
from server.serving.seat import Seat
from server.settings import Settings
from server.store.connection import BadRedisUrl
from server.store.ending import ended
from server.store.tenants_file import TenantsFileError
from server.telemetry import logs

if TYPE_CHECKING:
    from server.engine.stack import Stack

log = structlog.get_logger("server.lifecycle")

_LOOPBACK: Final = frozenset({"127.0.0.1", "::1", "localhost"})
_REPORT_INTERVAL_S: Final = 10.0
_REDIS_START_S: Final = 3.0
_NO_ENGINE: Final = "The model could not be started again. Please try again later."


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
                leave_behind_the_loading(process.scratch, code)
    except (BadRedisUrl, TenantsFileError) as error:
        _say_why(str(error))
        return 1
    return code


@contextmanager
def prepared(settings: Settings, vllm_args: Sequence[str], versions: Mapping[str, str]) -> "Iterator[Process]":
    """A process that does not run yet, on a machine made ready for it. Raises `BadRedisUrl` and `TenantsFileError`."""
    raise_open_files_limit()
    leave_a_core_to_the_event_loop()
    with tempfile.TemporaryDirectory(prefix="tidegate-") as scratch:
        os.environ.setdefault(SOCKETS_FOLDER, scratch)
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
        key = operator_key(settings)
        self._app: Application = build_application(settings, versions, operator_key=key)
        self._plan = plan_for(settings, versions, key, scratch)
        self._several = Several(settings, self._app, self._fork_server, self._plan)
        self._stop = asyncio.Event()
        self._stop_at_once = asyncio.Event()
        self.loading_abandoned = False
        self.start_failure: StartFailure | None = None

    async def run(self, listener: socket.socket) -> int:
        """Live, with the signals of an operator. Returns the process's exit code."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.stop)
        loop.add_signal_handler(signal.SIGHUP, self._reload)
        return await self.live(listener)

    async def live(self, listener: socket.socket) -> int:
        """Load, serve and drain. Returns the process's exit code."""
        loop = asyncio.get_running_loop()
        self._app.figures.watch_event_loop(lambda: len(asyncio.all_tasks(loop)))
        self._say_where(listener)
        http = HttpServer(public_config(self._settings, self._app.asgi), self._plan.share)
        serving = asyncio.create_task(http.serve(sockets=[listener]))
        try:
            async with self._app.store.running(), self._keys_followed(), self._app.batches.running():
                code = await self._live(listener)
        finally:
            http.stop()
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
            self._several.stop_at_once()
        self._stop.set()

    def _reload(self) -> None:
        self._app.access.reload_declared()
        self._several.reload()

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

    async def _live(self, listener: socket.socket) -> int:
        stack = await self._load()
        if stack is None:
            end_children(self._app.store.server_pid)
            return 0 if self._stop.is_set() else 1
        log.info("ready", models=list(stack.model_names), max_model_len=stack.max_model_len)
        supervisor = self._supervisor()
        beside = running(_report(self._app.slot), self._app.ladder.run())
        async with beside, self._several.running(listener):
            supervising = asyncio.create_task(supervisor.run(stack))
            del stack  # the supervisor's from now on
            await first(self._stop.wait(), supervising)
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
        end_children(self._app.store.server_pid)
        return 1 if gave_up else 0

    def _supervisor(self) -> Supervisor:
        s, app = self._settings, self._app
        rules = RestartRules(s.engine_hang_timeout_s, max_failures=s.engine_max_failed_restarts)
        seat = self._several.told_of(Seat(app.slot, app.gate))
        return Supervisor(self._build, seat, app.requests, app.resilience, rules)

    async def _end_without_engine(self, supervising: asyncio.Task[None]) -> None:
        """Too many restarts have failed: whoever waits is told, and the process ends so that a service manager acts."""
        log.error("The engine could not be replaced. The log lines above say why.", exc_info=supervising.exception())
        await self._app.requests.drain(0)
        await self._app.requests.end_all(NotReady(_NO_ENGINE))
        await self._several.stop(because=_NO_ENGINE)

    async def _load(self) -> "Stack | None":
        """The first stack, or None if loading failed (said in the log) or was stopped."""
        loading = asyncio.create_task(self._import_and_build())
        await first(self._stop.wait(), loading)
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
        from server.engine.building import build_stack
        from server.engine.stack import StackRequest

        s = self._settings
        config, errors = self.scratch / LOGGING_CONFIG, self.scratch / ENGINE_ERRORS
        errors.unlink(missing_ok=True)  # the words of an engine that is gone explain nothing about the next
        logs.write_child_config(config, errors, json_lines=logs.wants_json(s.log_format), level=s.log_level)
        request = StackRequest(
            self._flags, config, errors, s.context_count_cache_entries, s.fast_streams, s.coalesced_tokens,
            self._app.traces.on, self._fork_server, self._several.sharing(),
        )  # fmt: skip
        return await build_stack(request, self._app.generation, self._app.slot.enter)

    async def _drain(self) -> None:
        await asyncio.gather(drain(self._app.requests, self._settings, self._stop_at_once), self._several.stop())

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


def _import_engine() -> None:
    import server.engine.building  # noqa: F401  # seconds of imports, done where they do not block the port


async def _report(slot: EngineSlot) -> None:
    """Let vLLM log its throughput and cache figures now and then."""
    while True:
        await asyncio.sleep(_REPORT_INTERVAL_S)
        if slot.ready:
            await slot.stack.report()
