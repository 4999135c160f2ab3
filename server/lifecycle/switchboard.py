"""What the first process tells the other front-ends of its server, and does for them."""

import asyncio
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import structlog

from server.app import Application
from server.hub import messages
from server.hub.connection import Connection, listening
from server.lifecycle.scratch import HUB_SOCKET
from server.lifecycle.tasks import running
from server.serving.guests import Guests
from server.telemetry.recent import Happening

if TYPE_CHECKING:  # importing the engine room imports vLLM
    from server.engine.stack import Stack

log = structlog.get_logger("server.lifecycle")

_LOOK_S: Final = 0.1
_FIGURES_TIMEOUT_S: Final = 1.0


@dataclass(slots=True)
class _Line:
    """One front-end that is connected. `figures` is set while it is asked for them."""

    index: int
    pid: int
    connection: Connection
    guests: Guests
    open_requests: int = 0
    figures: asyncio.Future[None] | None = None

    @property
    def name(self) -> str:
        """A name of its own also among front-ends that took one another's place."""
        return f"{self.index}:{self.pid}"


@dataclass(frozen=True, slots=True)
class _Epoch:
    """One engine, from its start on: where it looks for each of the others, and what they need to join it."""

    number: int
    addresses: tuple[tuple[str, str], ...]
    stack: "Stack | None" = None
    blueprint: bytes = b""


class Switchboard:
    """The first process's end of every connection."""

    def __init__(self, app: Application, scratch: Path, others: int) -> None:
        self._app = app
        self._scratch = scratch
        self._others = others
        self._lines: dict[int, _Line] = {}
        self._epoch = _Epoch(0, ())
        self._state = messages.State()
        app.elsewhere.ask_by(self.gather_figures)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Inside it, front-ends can connect."""
        async with listening(self._scratch / HUB_SOCKET, self._talk), running(self._follow()):
            yield

    def unfinished(self) -> int:
        """Requests of the others that the engine works on."""
        return sum(line.guests.running for line in self._lines.values())

    def next_engine(self) -> tuple[tuple[str, str], ...]:
        """Where the engine that is about to start is to look for each of the others, by input and output address."""
        names = [uuid.uuid4().hex[:8] for _ in range(self._others)]
        paths = tuple((self._ipc(f"{name}-in"), self._ipc(f"{name}-out")) for name in names)
        self._epoch = _Epoch(self._epoch.number + 1, paths)
        return paths

    def engine_is(self, stack: "Stack", blueprint: bytes) -> None:
        """The engine serves that was last told where the others are; `blueprint` is what they need to join it."""
        self._epoch = _Epoch(self._epoch.number, self._epoch.addresses, stack, blueprint)
        for line in self._lines.values():
            self._introduce(line)
        self.refresh()

    def engine_is_gone(self) -> None:
        """The engine is dead, which the others cannot see."""
        self._epoch = _Epoch(self._epoch.number, ())
        self.tell(messages.EngineGone(self._epoch.number))

    def tell(self, message: messages.Message) -> None:
        """Tell all of them."""
        for line in self._lines.values():
            line.connection.send(message)

    def refresh(self) -> None:
        """Tell them what every request is treated by, if that has changed."""
        state = self._current()
        if state != self._state:
            self._state = state
            self.tell(state)

    async def gather_figures(self) -> int:
        """Let the others report, and count their open requests; who is too slow counts with what was said before."""
        loop = asyncio.get_running_loop()
        asked: list[asyncio.Future[None]] = []
        for line in self._lines.values():
            if line.figures is None:
                line.figures = loop.create_future()
                line.connection.send(messages.GiveFigures())
            asked.append(line.figures)
        if asked:
            await asyncio.wait(asked, timeout=_FIGURES_TIMEOUT_S)
        return sum(line.open_requests for line in self._lines.values())

    async def _follow(self) -> None:
        while True:
            await asyncio.sleep(_LOOK_S)
            self.refresh()

    async def _talk(self, connection: Connection) -> None:
        line: _Line | None = None
        try:
            async for message in connection.received():
                if line is None:
                    line = self._welcome(message, connection)
                else:
                    self._hear(line, message)
        finally:
            if line is not None:
                await self._part_with(line)

    def _welcome(self, message: messages.Any, connection: Connection) -> _Line:
        assert isinstance(message, messages.Hello)
        line = _Line(message.index, message.pid, connection, Guests(self._app.gate, connection.send))
        self._lines[message.index] = line
        connection.send(self._state)
        self._introduce(line)
        return line

    def _introduce(self, line: _Line) -> None:
        if self._epoch.stack is not None:
            inputs, outputs = self._epoch.addresses[line.index - 1]
            line.connection.send(messages.Engine(self._epoch.number, inputs, outputs, self._epoch.blueprint))

    def _hear(self, line: _Line, message: messages.Any) -> None:
        match message:
            case messages.Stepped():
                line.guests.prefilled(message.prefilled)
                if self._epoch.stack is not None:
                    self._epoch.stack.hear_step(message.engine_index, message.scheduled, message.part)
            case messages.Happened():
                self._app.recent.note(_happening(message))
            case messages.Figures():
                self._take_figures(line, message)
            case messages.Serving():
                log.info("a further front-end serves", front_end=line.index, pid=line.pid)
            case _:
                line.guests.hear(message)
                self.refresh()

    def _take_figures(self, line: _Line, message: messages.Figures) -> None:
        line.open_requests = message.open_requests
        self._app.figures.merged.told(line.name, message.snapshot)
        if line.figures is not None and not line.figures.done():
            line.figures.set_result(None)
        line.figures = None

    async def _part_with(self, line: _Line) -> None:
        """Give back what a front-end held that has ended, however it did."""
        del self._lines[line.index]
        self._app.figures.merged.gone(line.name)
        if line.figures is not None:
            line.figures.cancel()
        engine_requests, stack = line.guests.leave_all(), self._epoch.stack
        if stack is not None and stack.alive and engine_requests:
            await stack.abandon(engine_requests)

    def _current(self) -> messages.State:
        ladder, stack = self._app.ladder, self._epoch.stack
        adapters = () if stack is None else stack.adapters()
        return messages.State(
            level=int(ladder.chosen),
            by_hand=ladder.chosen_by_hand,
            calm=self._app.gate.calm,
            adapters=tuple(messages.Adapter(adapter.name, adapter.path, adapter.number) for adapter in adapters),
        )

    def _ipc(self, name: str) -> str:
        return f"ipc://{self._scratch / name}"


def _happening(told: messages.Happened) -> Happening:
    return Happening(
        kind="refusal" if told.kind == "refusal" else "truncation",
        code=told.code,
        route=told.route,
        tenant=told.tenant,
        status=told.status,
        detail=told.detail,
        request_id=told.request_id,
    )
