"""One Tidegate server inside a process of Ray: the same parts and the same life as `tidegate serve`."""

import asyncio
import contextlib
import errno
import socket
from collections.abc import Sequence
from typing import Any, Final

import click
from prometheus_client import REGISTRY
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware

from deploy.ray.scaling import WAIT, wait_counts
from server.cli import read_serve, versions
from server.lifecycle.machine import bind, configure_logs
from server.lifecycle.process import Process, prepared
from server.settings import Settings
from server.store.connection import BadRedisUrl
from server.store.tenants_file import TenantsFileError
from server.telemetry.readings import Readings

FIRST_PORT: Final = 8100
_PORTS: Final = 32  # replicas of one node, the leaving ones included
_LAST_PORT: Final = 65535
_REQUEST_ID: Final = b"x-request-id"


class CannotServe(Exception):
    """The replica cannot start; the message is for the operator, and Ray shows it."""


def settings_for_ray(flags: Sequence[str]) -> tuple[Settings, tuple[str, ...]]:
    """The settings of a replica, and the flags that are vLLM's. Raises `CannotServe`.

    Replicas come and go over nodes, so they need one Redis, and one folder for batches. The own port of each is for
    metrics and operators, beside Ray Serve's.
    """
    try:
        settings, vllm_args = read_serve(flags)
    except click.UsageError as error:
        raise CannotServe(error.format_message()) from None
    if settings.redis_url is None:
        raise CannotServe(
            "Replicas keep one limit for all through one Redis: name it with --redis-url or TIDEGATE_REDIS_URL."
        )
    if settings.api_server_count > 1:
        raise CannotServe("Ray Serve calls a replica in one process: leave --api-server-count out, and add replicas.")
    usual = {"host": "0.0.0.0", "port": FIRST_PORT, "batches": settings.batch_folder is not None}  # noqa: S104
    unset = {name: value for name, value in usual.items() if name not in settings.model_fields_set}
    return settings.model_copy(update=unset), vllm_args


class Server:
    """A server that loads its model and serves until it is stopped, behind `asgi` and on a port of its own."""

    def __init__(self, settings: Settings, vllm_args: Sequence[str]) -> None:
        """Raises `CannotServe`."""
        configure_logs(settings)
        with contextlib.ExitStack() as opened:
            listener = opened.enter_context(contextlib.closing(_bound(settings)))
            try:
                process = opened.enter_context(prepared(settings, vllm_args, versions()))
            except (BadRedisUrl, TenantsFileError) as error:
                raise CannotServe(str(error)) from None
            self._opened = opened.pop_all()
        self._process, self._stopped = process, False
        self._life = asyncio.create_task(self._live(process, listener))
        self._figures = Readings(REGISTRY, (), (WAIT,))
        application: Any = process.application.asgi  # uvicorn and Starlette write ASGI's types in different words
        behind_proxies: Any = ProxyHeadersMiddleware(application, list(settings.forwarded_allow_ips))
        self.asgi: ASGIApp = BehindRay(behind_proxies)

    async def _live(self, process: Process, listener: socket.socket) -> int:
        with self._opened:
            return await process.live(listener)

    async def loaded(self) -> None:
        """Wait until the model serves. Raises `CannotServe` if it does not come to that."""
        filled = asyncio.create_task(self._process.application.slot.filled())
        await asyncio.wait({filled, self._life}, return_when=asyncio.FIRST_COMPLETED)
        filled.cancel()
        self.check()

    def check(self) -> None:
        """Raises `CannotServe` once the server has ended.

        An engine that is being replaced is no reason to end the replica: its server sees to it, and requests wait.
        """
        if not self._life.done():
            return
        if self._stopped:
            raise CannotServe("The server was stopped.")
        raise CannotServe(str(self._process.start_failure or "The server has ended; this replica's log says why."))

    def wait_counts(self) -> dict[str, float]:
        """The figures that the number of replicas goes by."""
        return wait_counts(self._figures.take())

    async def stop(self) -> None:
        """Drain, and end with everything that was started."""
        self._stopped = True
        self._process.stop()
        await self._life


def _bound(settings: Settings) -> socket.socket:
    """The first free port from the chosen one on: a node may have several replicas. Raises `CannotServe`."""
    last = min(settings.port + _PORTS - 1, _LAST_PORT)
    for port in range(settings.port, last + 1):
        try:
            return bind(settings.model_copy(update={"port": port}))
        except OSError as error:
            if settings.uds or error.errno != errno.EADDRINUSE:
                where = settings.uds or f"{settings.host}:{port}"
                raise CannotServe(f"Cannot listen on {where}: {error.strerror}.") from None
    raise CannotServe(f"No port from {settings.port} to {last} is free. Choose others with --port.")


class BehindRay:
    """An application as Ray's proxy calls it, which is not quite as a server would.

    Ray cancels the call of a client that has left. The application is told so instead, and ends the call itself: from a
    cancellation it would not know the cause, and count a failure. And Ray answers with the request's id as well.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._calls: set[asyncio.Task[None]] = set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        left = asyncio.Event()
        call = asyncio.ensure_future(self._app(scope, _receive_or_left(receive, left), _without_id(send)))
        self._calls.add(call)
        call.add_done_callback(self._calls.discard)
        try:
            await asyncio.shield(call)
        except asyncio.CancelledError:
            left.set()
            raise


def _receive_or_left(receive: Receive, left: asyncio.Event) -> Receive:
    async def receive_or_left() -> Message:
        message, leaving = asyncio.ensure_future(receive()), asyncio.ensure_future(left.wait())
        try:
            await asyncio.wait({message, leaving}, return_when=asyncio.FIRST_COMPLETED)
            return message.result() if message.done() else {"type": "http.disconnect"}
        finally:
            message.cancel()
            leaving.cancel()

    return receive_or_left


def _without_id(send: Send) -> Send:
    async def send_without_id(message: Message) -> None:
        if message["type"] == "http.response.start":
            message["headers"] = [header for header in message["headers"] if header[0] != _REQUEST_ID]
        await send(message)

    return send_without_id
