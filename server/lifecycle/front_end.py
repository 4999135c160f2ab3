"""The life of a front-end beside the first process: with that one's engine, gate and level, and HTTP of its own."""

import asyncio
import contextlib
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import structlog
import uvloop

from server.app import FrontEndApplication, build_front_end
from server.engine.processes import end_with_parent
from server.engine.start_failures import StartFailure
from server.engine.supervisor import Supervisor
from server.hub import messages
from server.hub.connection import Connection, connect
from server.lifecycle.accepting import Shares
from server.lifecycle.draining import drain
from server.lifecycle.http import HttpServer, Share, public_config
from server.lifecycle.machine import configure_logs, leave_a_core_to_the_event_loop, raise_open_files_limit
from server.lifecycle.scratch import CONNECTIONS, ENGINE_ERRORS, HTTP_SOCKET, HUB_SOCKET, LOGGING_CONFIG
from server.lifecycle.tasks import first, running
from server.policy.refusals import NotReady
from server.policy.restarts import RestartRules
from server.settings import Settings
from server.store.ending import ended

if TYPE_CHECKING:  # importing the engine room imports vLLM
    from server.engine.stack import Stack

log = structlog.get_logger("server.lifecycle")

_KEYS_LOOK_S: Final = 0.05
_KEYS_TIMEOUT_S: Final = 3.0
_NEVER_S: Final = 10.0 * 365 * 24 * 3600  # the first process sees when the engine hangs
_MOST_FAILED_BUILDS: Final = 5


@dataclass(frozen=True, slots=True)
class Plan:
    """What a front-end is started with; `index` counts from 1, and `count` includes the first process.

    `settings` are the fields of the first one's, since the class they were read by cannot be sent.
    """

    index: int
    count: int
    settings: Mapping[str, Any]
    versions: Mapping[str, str]
    operator_key: str | None
    scratch: Path
    listener: socket.socket | None = None

    def of(self, index: int) -> "Plan":
        """The plan of one of them."""
        return replace(self, index=index)

    @property
    def share(self) -> Share | None:
        """Its part of the connections; None where there is nobody to share them with."""
        return Share(Shares(self.scratch / CONNECTIONS, self.count), self.index) if self.count > 1 else None

    def on(self, listener: socket.socket) -> "Plan":
        """The plan with the socket that all of them listen on."""
        return replace(self, listener=listener)


def main(plan: Plan) -> None:
    """Run one front-end in a process of its own, until the first process tells it to end or ends itself."""
    end_with_parent()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # these are for the first process, which tells the others
    with contextlib.suppress(ImportError):
        import setproctitle

        setproctitle.setproctitle(f"tidegate front-end {plan.index}")
    settings = Settings.model_construct(**plan.settings)
    configure_logs(settings)
    raise_open_files_limit()
    leave_a_core_to_the_event_loop()
    structlog.contextvars.bind_contextvars(front_end=plan.index)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        ended_as = runner.run(_live(plan, settings))
        if ended_as.building_abandoned:  # its thread cannot be interrupted, and Python would wait for it
            sys.stderr.flush()
            os._exit(ended_as.code)
    sys.exit(ended_as.code)


@dataclass(frozen=True, slots=True)
class _End:
    code: int
    building_abandoned: bool = False


async def _live(plan: Plan, settings: Settings) -> _End:
    connection = await connect(plan.scratch / HUB_SOCKET)
    connection.send(messages.Hello(plan.index, os.getpid()))
    return await FrontEnd(plan, settings, connection).live()


class _Engines:
    """The engine that the first process has told of, until it is gone."""

    def __init__(self) -> None:
        self._told = asyncio.Event()
        self._engine: messages.Engine | None = None
        self._gone = asyncio.Event()

    def serves(self, engine: messages.Engine) -> None:
        self._engine, self._gone = engine, asyncio.Event()
        self._told.set()

    def is_gone(self) -> None:
        self._engine = None
        self._gone.set()
        self._told.clear()

    async def next(self) -> tuple[messages.Engine, asyncio.Event]:
        """The one that serves, and what is set when it does no longer. Waits while there is none."""
        while self._engine is None:
            await self._told.wait()
        return self._engine, self._gone


class _Seat:
    """Where the stack stands that serves here."""

    def __init__(self, app: FrontEndApplication) -> None:
        self._app = app
        self._state = messages.State()

    def follow(self, state: messages.State) -> None:
        """Treat every request by what the first process says."""
        self._state = state
        self._app.level.follow(state.level, by_hand=state.by_hand)
        self._app.gate.calm = state.calm
        if self._app.slot.ready:
            self._app.slot.stack.follow_adapters(_adapters(state))

    def fill(self, stack: "Stack") -> None:
        self._app.objectives.unloaded = stack.unloaded
        stack.follow_adapters(_adapters(self._state))
        self._app.slot.fill(stack)

    def empty(self, stage: str) -> "Stack | None":
        return self._app.slot.empty(stage)


class _Witness:
    """The first process has seen the engine's death as well, and counts it."""

    def engine_died(self, *, hung: bool) -> None: ...

    def engine_replaced(self, downtime_s: float) -> None: ...

    def restart_failed(self) -> None: ...


class FrontEnd:
    """One front-end, from the connection to the first process to its end."""

    def __init__(self, plan: Plan, settings: Settings, connection: Connection) -> None:
        self._plan = plan
        self._settings = settings
        self._connection = connection
        self._app = build_front_end(
            settings, plan.versions, plan.operator_key, connection.send, plan.scratch / HTTP_SOCKET
        )
        self._seat = _Seat(self._app)
        self._engines = _Engines()
        self._stop = asyncio.Event()
        self._stop_at_once = asyncio.Event()
        self._because: str | None = None

    async def live(self) -> _End:
        """Join the engine, serve and drain."""
        loop = asyncio.get_running_loop()
        self._app.figures.watch_event_loop(lambda: len(asyncio.all_tasks(loop)))
        try:
            async with self._app.store.running(), running(self._listen()), self._keys_followed():
                return await self._serve()
        finally:
            await self._app.fallback.close()
            await self._app.passing_on.close()
            await asyncio.to_thread(self._app.traces.close)
            await self._connection.close()

    async def _serve(self) -> _End:
        supervisor = Supervisor(
            self._build, self._seat, self._app.requests, _Witness(), RestartRules(_NEVER_S, _MOST_FAILED_BUILDS)
        )
        building = asyncio.create_task(self._build())
        await first(self._stop.wait(), building)
        if not building.done():
            await ended({building})
            return _End(0, building_abandoned=True)
        try:
            stack = building.result()
        except StartFailure as failure:
            log.error(f"The engine could not be joined: {failure}")  # noqa: TRY400  # a sentence, and no traceback
            return _End(1)
        supervising = asyncio.create_task(supervisor.run(stack))
        del stack  # the supervisor's from now on
        await self._app.slot.filled()
        code = await self._answer(supervising)
        building_abandoned = supervisor.building
        await ended({supervising})
        if (last := self._app.slot.empty("stopping")) is not None:
            await last.close()
        return _End(code, building_abandoned=building_abandoned)

    async def _answer(self, supervising: "asyncio.Task[None]") -> int:
        """Serve HTTP until told to stop, or until no engine can be joined any more."""
        assert self._plan.listener is not None
        http = HttpServer(public_config(self._settings, self._app.asgi), self._plan.share)
        serving = asyncio.create_task(http.serve(sockets=[self._plan.listener]))
        self._connection.send(messages.Serving())
        await first(self._stop.wait(), supervising)
        if self._because is None and not supervising.done():
            await drain(self._app.requests, self._settings, self._stop_at_once)
        else:
            await self._app.requests.drain(0)
            await self._app.requests.end_all(NotReady(self._because or "The model could not be reached any more."))
        http.stop()
        await serving
        return int(supervising.done())

    async def _build(self) -> "Stack":
        """A stack on the engine that serves, once there is one. Raises `StartFailure`."""
        await asyncio.to_thread(_import_engine)
        from server.engine.joined import JoinRequest, build_joined
        from server.engine.stack import StackRequest

        engine, gone = await self._engines.next()
        scratch, s = self._plan.scratch, self._settings
        request = StackRequest(
            (), scratch / LOGGING_CONFIG, scratch / ENGINE_ERRORS, s.context_count_cache_entries, s.fast_streams,
            s.coalesced_tokens, self._app.traces.on,
        )  # fmt: skip
        join = JoinRequest(
            engine.blueprint, engine.input_address, engine.output_address, self._plan.index, self._plan.count,
            self._tell_step, gone,
        )  # fmt: skip
        return await build_joined(join, request, self._app.generation)

    def _tell_step(self, engine_index: int, account: bytes | None, part: Any) -> None:
        self._connection.send(messages.Stepped(part, account, engine_index, self._app.gate.take_prefilled()))

    async def _listen(self) -> None:
        """Do as the first process says, and end when it is gone."""
        try:
            async for message in self._connection.received():
                self._hear(message)
        finally:
            self._stop.set()
            self._stop_at_once.set()

    def _hear(self, message: messages.Any) -> None:
        match message:
            case messages.State():
                self._seat.follow(message)
            case messages.Engine():
                self._engines.serves(message)
            case messages.EngineGone():
                self._lose_engine()
            case messages.GiveFigures():
                figures = messages.Figures(self._app.figures.snapshot(), len(self._app.requests))
                self._connection.send(figures)
            case messages.Reload():
                self._app.access.reload_declared()
            case messages.Stop(at_once, because):
                self._because = because
                self._stop.set()
                if at_once:
                    self._stop_at_once.set()
            case _:
                self._app.gate.hear(message)

    def _lose_engine(self) -> None:
        from server.engine.joined import lose_engine

        self._engines.is_gone()
        if self._app.slot.ready:
            lose_engine(self._app.slot.stack.engine)

    @contextlib.asynccontextmanager
    async def _keys_followed(self) -> AsyncIterator[None]:
        """Inside it, changes of tenants and keys are followed. Entering waits a moment for what is known of them."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_KEYS_TIMEOUT_S):
                await self._app.access.refresh()
                while self._app.access.open is None:
                    await asyncio.sleep(_KEYS_LOOK_S)
                    await self._app.access.refresh()
        async with running(self._app.access.watch(_nothing_to_say)):
            yield
        await self._app.access.flush()


def _import_engine() -> None:
    import server.engine.joined  # noqa: F401  # seconds of imports, in which the first process is listened to


def _nothing_to_say(is_open: bool) -> None:
    """The first process says whether callers need a key."""


def _adapters(state: messages.State) -> "list[Any]":
    from server.engine.stack import Adapter

    return [Adapter(adapter.name, adapter.path, adapter.number) for adapter in state.adapters]
