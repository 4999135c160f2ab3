"""The one table from refusal to HTTP, and the two shapes an error body has."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, Final, Literal

from server.policy import refusals
from server.policy.refusals import Refusal

Dialect = Literal["openai", "responses", "anthropic", "ollama"]

# nginx's status for a client that went away; never sent, but it is what the log says.
CLIENT_CLOSED_REQUEST: Final = 499


@dataclass(frozen=True, slots=True)
class Wire:
    """How a refusal looks on the wire. `anthropic` is the type name in Anthropic's error shape."""

    status: int
    type: str
    code: str | None
    anthropic: str


_TABLE: Final[Mapping[type[Refusal], Wire]] = {
    refusals.InvalidRequest: Wire(400, "invalid_request_error", None, "invalid_request_error"),
    refusals.ClosedField: Wire(400, "invalid_request_error", "unsupported_parameter", "invalid_request_error"),
    refusals.ContextLengthExceeded: Wire(
        400, "invalid_request_error", "context_length_exceeded", "invalid_request_error"
    ),
    refusals.CostAboveLimit: Wire(400, "invalid_request_error", "tokens_above_limit", "invalid_request_error"),
    refusals.BodyTooLarge: Wire(413, "invalid_request_error", "request_too_large", "request_too_large"),
    refusals.InvalidApiKey: Wire(401, "invalid_request_error", "invalid_api_key", "authentication_error"),
    refusals.OperatorsOnly: Wire(403, "invalid_request_error", "operators_only", "permission_error"),
    refusals.StoreUnavailable: Wire(503, "server_error", "store_unavailable", "overloaded_error"),
    refusals.ModelNotFound: Wire(404, "invalid_request_error", "model_not_found", "not_found_error"),
    refusals.NotFound: Wire(404, "invalid_request_error", "not_found", "not_found_error"),
    refusals.Unsupported: Wire(404, "invalid_request_error", "unsupported_endpoint", "not_found_error"),
    refusals.Conflict: Wire(409, "invalid_request_error", "conflict", "invalid_request_error"),
    refusals.MethodNotAllowed: Wire(405, "invalid_request_error", "method_not_allowed", "invalid_request_error"),
    refusals.UnprocessableContent: Wire(422, "invalid_request_error", "unprocessable_content", "invalid_request_error"),
    refusals.RateLimited: Wire(429, "rate_limit_error", "rate_limit_exceeded", "rate_limit_error"),
    refusals.Overloaded: Wire(503, "server_error", "server_overloaded", "overloaded_error"),
    refusals.NotReady: Wire(503, "server_error", "engine_not_ready", "overloaded_error"),
    refusals.Draining: Wire(503, "server_error", "server_draining", "overloaded_error"),
    refusals.StorageFull: Wire(507, "server_error", "storage_full", "api_error"),
    refusals.GenerationFailed: Wire(500, "server_error", "internal_error", "api_error"),
    refusals.EngineLost: Wire(503, "server_error", "engine_lost", "overloaded_error"),
    refusals.Quarantined: Wire(500, "server_error", "request_quarantined", "api_error"),
    refusals.UpstreamLost: Wire(502, "server_error", "upstream_lost", "api_error"),
    refusals.Closed: Wire(503, "server_error", "server_closed", "overloaded_error"),
    refusals.NotDegraded: Wire(503, "server_error", "degraded_service", "overloaded_error"),
}


def wire(refusal: Refusal) -> Wire:
    """The wire form of a refusal: its own row, or that of the nearest class above it."""
    return next(_TABLE[kind] for kind in type(refusal).__mro__ if kind in _TABLE)


def status(refusal: Refusal) -> int:
    return wire(refusal).status


def reason(refusal: Refusal) -> str:
    """The refusal as figures and logs name it: its code, where it has one."""
    return wire(refusal).code or "invalid_request"


def body(refusal: Refusal, dialect: Dialect) -> dict[str, Any]:
    """The error object, as OpenAI, Anthropic or Ollama writes it."""
    form = wire(refusal)
    if dialect == "ollama":
        return {"error": refusal.message}
    if dialect == "anthropic":
        return {"type": "error", "error": {"type": form.anthropic, "message": refusal.message}}
    error = {"message": refusal.message, "type": form.type, "param": refusal.param, "code": form.code}
    return {"error": error}


def encoded(refusal: Refusal, dialect: Dialect) -> bytes:
    return _json(body(refusal, dialect))


def _json(value: Mapping[str, Any]) -> bytes:
    """UTF-8; half a surrogate pair out of a client's JSON has none and stays the escape it came as."""
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "backslashreplace")


def event(refusal: Refusal, dialect: Dialect) -> bytes:
    """The frames that end a stream which failed after its head was sent."""
    if dialect == "openai":
        return b"data: " + encoded(refusal, dialect) + b"\n\ndata: [DONE]\n\n"
    if dialect == "ollama":
        return encoded(refusal, dialect) + b"\n"
    error = body(refusal, dialect)
    if dialect == "responses":
        error = {"type": "error", **{key: error["error"][key] for key in ("code", "message", "param")}}
    return b"event: error\ndata: " + _json(error) + b"\n\n"


def headers(refusal: Refusal) -> dict[str, str]:
    """`Retry-After` in whole seconds (rounded up) and in milliseconds, where waiting helps."""
    extra = {"www-authenticate": "Bearer"} if status(refusal) == HTTPStatus.UNAUTHORIZED else {}
    if not refusal.should_retry:
        extra["x-should-retry"] = "false"
    if refusal.retry_after_s is None:
        return extra
    milliseconds = math.ceil(refusal.retry_after_s * 1000)
    return {**extra, "retry-after": str(math.ceil(milliseconds / 1000)), "retry-after-ms": str(milliseconds)}
