"""One attempt at one line of a batch: a request like any other, as its tenant's class `batch`."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Final

import structlog

from server.engine.calls import Call, Reply
from server.policy.refusals import GenerationFailed, Refusal
from server.policy.tenants import Tenant
from server.serving.requests import OpenRequest
from server.serving.service import Service
from server.serving.telling import told_body
from server.telemetry.traces import Traces

log = structlog.get_logger(__name__)

# Nobody waits for a line: it may stand at the gate for long, and rather waits than loses a part of its answer. The
# batch's own window is what ends it.
_HEADERS: Final = (
    (b"content-type", b"application/json"),
    (b"x-request-timeout", b"3600"),
    (b"x-degradation", b"none"),
)
_BAD_REQUEST: Final = 400
_ELSEWHERE: Final = "The fallback server did not answer this line."
_SOMETHING: Final = "Something went wrong on the server while it worked on this line."


@dataclass(frozen=True, slots=True)
class LineCall:
    """A line as a call of its batch's endpoint."""

    request_id: str
    endpoint: str
    tenant: Tenant
    end_user: str | None
    body: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Answered:
    """`latency_s`: from the moment the engine had it."""

    body: dict[str, Any]
    latency_s: float


@dataclass(frozen=True, slots=True)
class Refused:
    """Not this time, or never."""

    refusal: Refusal


class LineRunner:
    """Sends lines where the requests of clients go."""

    def __init__(self, service: Service, traces: Traces | None = None) -> None:
        self._service = service
        self._traces = traces or Traces()

    @property
    def draining(self) -> bool:
        """Whether the server stops and takes no new lines."""
        return self._service.requests.draining

    @property
    def ready(self) -> bool:
        return self._service.ready

    async def attempt(self, line: LineCall, on_admitted: Callable[[], None]) -> Answered | Refused:
        """Run a line once. `on_admitted` is called when it enters the engine, for several prompts each time."""
        started_s: float | None = None

        def admitted() -> None:
            nonlocal started_s
            started_s = time.perf_counter() if started_s is None else started_s
            on_admitted()

        opened = OpenRequest(
            line.request_id,
            line.endpoint,
            tenant=replace(line.tenant, traffic_class="batch"),
            end_user=line.end_user,
            on_admitted=admitted,
            of_batch=True,
        )
        call = Call("POST", line.endpoint, headers=_HEADERS, body=line.body)
        span = self._traces.request("batch line", {}, from_outside=False)
        with structlog.contextvars.bound_contextvars(request_id=line.request_id), span:
            try:
                async with self._service.requests.open(opened):
                    reply = await self._service.answer(call, opened)
                    body = _body(reply, opened)
            except Refusal as refusal:
                return Refused(opened.refusal or refusal)
            except Exception:  # an error of ours fails its line alone
                log.exception("batch line failed")
                return Refused(GenerationFailed(_SOMETHING))
        return Answered(body, 0.0 if started_s is None else time.perf_counter() - started_s)


def _body(reply: object, opened: OpenRequest) -> dict[str, Any]:
    assert isinstance(reply, Reply)  # a line cannot ask for a stream
    if reply.status >= _BAD_REQUEST:
        raise GenerationFailed(_ELSEWHERE)
    body = json.loads(told_body(reply.body, opened.edits) if opened.edits else reply.body)
    assert isinstance(body, dict)
    return body
