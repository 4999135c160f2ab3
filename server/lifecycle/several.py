"""What the first process does when its server has several front-ends, and nothing when it has one."""

import asyncio
import socket
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from server.app import Application
from server.engine.fork_server import ForkServer
from server.engine.supervisor import Seat
from server.hub import messages
from server.lifecycle.crew import Crew
from server.lifecycle.front_end import Plan
from server.lifecycle.http import HttpServer, private_config
from server.lifecycle.scratch import HTTP_SOCKET
from server.lifecycle.switchboard import Switchboard
from server.settings import Settings

if TYPE_CHECKING:  # importing the engine room imports vLLM
    from server.engine.stack import OtherFrontEnds, Stack


class Several:
    """The other front-ends: started beside the first process's own work, told what they need, ended with it."""

    def __init__(
        self,
        settings: Settings,
        app: Application,
        fork_server: ForkServer | None,
        plan: Plan,
    ) -> None:
        self._settings = settings
        self._app = app
        self._plan = plan
        others = settings.api_server_count - 1
        self._switchboard = Switchboard(app, plan.scratch, others) if others else None
        self._crew: Crew | None = None
        self._fork_server = fork_server

    @asynccontextmanager
    async def running(self, listener: socket.socket) -> AsyncIterator[None]:
        """Inside it, the others run, on the same socket."""
        if self._switchboard is None:
            yield
            return
        self._crew = Crew(self._plan.on(listener), self._fork_server, self._switchboard)
        async with self._switchboard.running(), self._passed_on_taken(), self._crew.running():
            yield

    def sharing(self) -> "OtherFrontEnds | None":
        """What the engine that is about to start is to know of the others."""
        if self._switchboard is None:
            return None
        from server.engine.stack import OtherFrontEnds

        board = self._switchboard
        return OtherFrontEnds(board.next_engine(), board.unfinished, board.refresh)

    def told_of(self, seat: Seat) -> Seat:
        """The seat, with the others told who sits on it."""
        return seat if self._switchboard is None else _SharedSeat(seat, self._switchboard)

    def reload(self) -> None:
        """Let the others read the declared tenants again."""
        if self._switchboard is not None:
            self._switchboard.tell(messages.Reload())

    def stop_at_once(self) -> None:
        """Let the others end without waiting for what runs."""
        if self._crew is not None:
            self._crew.stop_at_once()

    async def stop(self, because: str | None = None) -> None:
        """Let the others drain, by the same rules, and end. `because`: there is no engine for what they have."""
        if self._crew is not None:
            await self._crew.stop(self._settings.drain_delay_s + self._settings.drain_timeout_s, because)

    @asynccontextmanager
    async def _passed_on_taken(self) -> AsyncIterator[None]:
        """Inside it, requests are answered that the others pass on."""
        path = self._plan.scratch / HTTP_SOCKET
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(path))
            await asyncio.to_thread(path.chmod, 0o600)
            http = HttpServer(private_config(self._app.asgi))
            serving = asyncio.create_task(http.serve(sockets=[listener]))
            try:
                yield
            finally:
                http.stop()
                await serving


class _SharedSeat:
    """Where the stack stands that serves, as the others are told."""

    def __init__(self, seat: Seat, switchboard: Switchboard) -> None:
        self._seat = seat
        self._switchboard = switchboard

    def fill(self, stack: "Stack") -> None:
        from server.engine.joined import blueprint

        self._seat.fill(stack)
        self._switchboard.engine_is(stack, blueprint(stack))

    def empty(self, stage: str) -> "Stack | None":
        self._switchboard.engine_is_gone()
        return self._seat.empty(stage)


def plan_for(settings: Settings, versions: Mapping[str, str], operator_key: str | None, scratch: Path) -> Plan:
    """What the others are started with."""
    fields = {name: getattr(settings, name) for name in Settings.model_fields}
    return Plan(0, settings.api_server_count, fields, versions, operator_key, scratch)
