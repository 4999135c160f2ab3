"""What every HTTP exchange gets, whatever its route: a request id, an access-log line, its figures."""

import re
import time
import uuid
from typing import Final

import structlog
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api.errors import CLIENT_CLOSED_REQUEST
from server.serving.requests import OpenRequest
from server.telemetry.metrics import Metrics

log = structlog.get_logger("server.access")

_SANE_REQUEST_ID: Final = re.compile(r"[A-Za-z0-9._:\-]{1,128}")
_UNROUTED: Final = "unknown"
# Asked every few seconds by probes, scrapers and consoles; their lines would hide the others.
_PROBES: Final = ("/health", "/ping", "/metrics", "/load", "/admin/overview", "/console/")


class Exchange:
    """Plain ASGI middleware around the whole application."""

    def __init__(self, app: ASGIApp, *, metrics: Metrics, access_log: bool) -> None:
        self._app = app
        self._metrics = metrics
        self._access_log = access_log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = _request_id(Headers(scope=scope).get("x-request-id"))
        state = scope.setdefault("state", {})
        state["request_id"] = request_id
        status = 500
        id_header = (b"x-request-id", request_id.encode())

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], id_header]
            await send(message)

        started_s = time.perf_counter()
        with structlog.contextvars.bound_contextvars(request_id=request_id):
            try:
                await self._app(scope, receive, send_with_id)
            finally:
                self._record(scope, status, time.perf_counter() - started_s)

    def _record(self, scope: Scope, status: int, duration_s: float) -> None:
        opened: OpenRequest | None = scope["state"].get("open_request")
        if opened is not None and opened.client_left:
            status = CLIENT_CLOSED_REQUEST
        route = getattr(scope.get("route"), "path", _UNROUTED)
        self._metrics.http_request(scope["method"], route, status, duration_s)
        if self._access_log:
            write = log.debug if scope["path"].startswith(_PROBES) else log.info
            write(
                "request",
                method=scope["method"],
                path=scope["path"],
                status=status,
                prompt_tokens=opened.prompt_tokens if opened is not None else 0,
                duration_ms=round(duration_s * 1000, 1),
            )


def _request_id(given: str | None) -> str:
    """The client's own id if it is safe to log and to send back, else a new one."""
    return given if given is not None and _SANE_REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
