"""What every HTTP exchange gets, whatever its route: a request id, an access-log line, its figures, its span."""

import re
import time
import uuid
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, Final

import structlog
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api import errors
from server.api.noting import note
from server.api.sending import SEND_BODY
from server.policy.refusals import Refusal
from server.policy.tenants import TrafficClass
from server.serving.requests import OpenRequest
from server.serving.service import GATED_ROUTES
from server.telemetry.metrics import Metrics
from server.telemetry.recent import Notes
from server.telemetry.requests import Ended, RequestMetrics
from server.telemetry.tenants import Outcome
from server.telemetry.traces import Traced, Traces

log = structlog.get_logger("server.access")

_SANE_REQUEST_ID: Final = re.compile(r"[A-Za-z0-9._:\-]{1,128}")
_UNROUTED: Final = "unknown"
_OUTCOMES: Final[Mapping[int, Outcome]] = {
    HTTPStatus.TOO_MANY_REQUESTS: "limited",
    errors.CLIENT_CLOSED_REQUEST: "left",
}
_UNTRACED: Final = Traced()
# Asked every few seconds by probes, scrapers and consoles; their lines and spans would hide the others.
_PROBES: Final = ("/health", "/ping", "/metrics", "/load", "/admin/overview", "/console/")


@dataclass(frozen=True, slots=True)
class Reporting:
    """Where exchanges are reported."""

    metrics: Metrics
    requests: RequestMetrics
    traces: Traces
    recent: Notes
    access_log: bool


class Exchange:
    """Plain ASGI middleware around the whole application."""

    def __init__(self, app: ASGIApp, reporting: Reporting) -> None:
        self._app = app
        self._to = reporting

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        request_id = _request_id(headers.get("x-request-id"))
        state = scope.setdefault("state", {})
        state["request_id"], state[SEND_BODY] = request_id, send
        status = 500
        id_header = (b"x-request-id", request_id.encode())

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], id_header]
            await send(message)

        started_s = time.perf_counter()
        with structlog.contextvars.bound_contextvars(request_id=request_id), self._span(scope, headers) as traced:
            try:
                await self._app(scope, receive, send_with_id)
            finally:
                self._record(_Seen(scope, status, started_s, time.perf_counter()), traced)

    def _span(self, scope: Scope, headers: Headers) -> AbstractContextManager[Traced]:
        if scope["path"].startswith(_PROBES):
            return nullcontext(_UNTRACED)
        return self._to.traces.request(scope["method"], headers)

    def _record(self, seen: "_Seen", traced: Traced) -> None:
        opened, scope = seen.opened, seen.scope
        self._to.metrics.http_request(scope["method"], seen.route, seen.status, seen.duration_s)
        if seen.refusal is not None:
            self._to.metrics.refused(errors.reason(seen.refusal))
        note(self._to.recent, scope, seen.refusal, opened)
        if opened is not None and scope["method"] == "POST" and seen.route in GATED_ROUTES:
            self._to.requests.ended(seen.ended(opened))
            self._to.metrics.tenants.ended(opened.tenant.name, _outcome(seen.outcome))
        if traced.recording:
            failed = None if seen.outcome < HTTPStatus.INTERNAL_SERVER_ERROR else seen.reason or str(seen.outcome)
            traced.ended(f"{scope['method']} {seen.route}", seen.attributes(), failed)
        if self._to.access_log:
            write = log.debug if scope["path"].startswith(_PROBES) else log.info
            write("request", **seen.line(), **({"trace_id": traced.trace_id} if traced.recording else {}))


class _Seen:
    """One exchange that is over. Times are moments on the clock of `time.perf_counter`."""

    def __init__(self, scope: Scope, status: int, started_s: float, ended_s: float) -> None:
        self.scope = scope
        self.opened: OpenRequest | None = scope["state"].get("open_request")
        self.refusal: Refusal | None = scope["state"].get("refusal")
        left = self.opened is not None and self.opened.client_left
        self.status = errors.CLIENT_CLOSED_REQUEST if left else status
        self.route: str = getattr(scope.get("route"), "path", _UNROUTED)
        self.duration_s = ended_s - started_s
        self._started_s = started_s

    @property
    def outcome(self) -> int:
        """The status, or that of the refusal which ended a stream whose head was out already."""
        if self.refusal is None or self.status == errors.CLIENT_CLOSED_REQUEST:
            return self.status
        return errors.status(self.refusal)

    @property
    def reason(self) -> str | None:
        return None if self.refusal is None else errors.reason(self.refusal)

    def ended(self, opened: OpenRequest) -> Ended:
        return Ended(
            route=self.route,
            traffic_class=_class_of(opened),
            status=self.outcome,
            duration_s=self.duration_s,
            ttft_s=self._ttft_s(opened),
            tpot_s=opened.figures.tpot_s,
        )

    def line(self) -> dict[str, Any]:
        """What the log says: whose request, what it used, how long it took, and never what is in it."""
        said = {
            "method": self.scope["method"],
            "path": self.scope["path"],
            "status": self.status,
            "duration_ms": _ms(self.duration_s),
        }
        if self.refusal is not None:
            said["refusal"] = self.reason
        if self.opened is None:
            return said
        opened, figures = self.opened, self.opened.figures
        said |= {
            "tenant": opened.tenant.name,
            "class": _class_of(opened),
            "model": opened.model_name,
            "prompt_tokens": opened.prompt_tokens,
            "cached_tokens": figures.cached_tokens,
            "completion_tokens": figures.completion_tokens,
            "queue_wait_ms": _ms(figures.queue_wait_s),
            "ttft_ms": _ms(self._ttft_s(opened)),
            "tpot_ms": _ms(figures.tpot_s),
            "degradation_level": figures.level,
        }
        if figures.upstream is not None:
            said["upstream"] = figures.upstream
        return said

    def attributes(self) -> dict[str, str | int | None]:
        """The same for the span, by the names of OpenTelemetry's conventions where there are any."""
        said: dict[str, str | int | None] = {
            "http.request.method": self.scope["method"],
            "http.route": self.route,
            "url.path": self.scope["path"],
            "http.response.status_code": self.status,
        }
        if self.opened is not None:
            said |= {
                "tidegate.request_id": self.opened.request_id,
                "tidegate.tenant": self.opened.tenant.name,
                "tidegate.class": _class_of(self.opened),
                "tidegate.degradation_level": self.opened.figures.level,
                "tidegate.fallback": self.opened.figures.upstream,
                "gen_ai.response.model": self.opened.model_name or None,
                "gen_ai.usage.input_tokens": self.opened.prompt_tokens,
                "gen_ai.usage.output_tokens": self.opened.figures.completion_tokens,
            }
        return said

    def _ttft_s(self, opened: OpenRequest) -> float | None:
        first_s = opened.figures.first_frame_s
        return None if first_s is None else first_s - self._started_s


def _outcome(status: int) -> Outcome:
    if status < HTTPStatus.BAD_REQUEST:
        return "answered"
    if status >= HTTPStatus.INTERNAL_SERVER_ERROR:
        return "failed"
    return _OUTCOMES.get(status, "refused")


def _class_of(opened: OpenRequest) -> TrafficClass:
    """What it came to the gate as; what was refused before that, as its tenant's class."""
    return opened.tenant.traffic_class if opened.arrived_s is None else opened.terms.traffic_class


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1000, 1)


def _request_id(given: str | None) -> str:
    """The client's own id if it is safe to log and to send back, else a new one."""
    return given if given is not None and _SANE_REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
