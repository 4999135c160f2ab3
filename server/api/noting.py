"""Notes what was refused and what was shortened, when a request ends, for the operator's console."""

from typing import Final

from starlette.types import Scope

from server.api import errors
from server.policy.edits import Edits
from server.policy.refusals import InvalidRequest, Refusal, UnprocessableContent
from server.serving.requests import OpenRequest
from server.telemetry.recent import Happening, Notes

_UNROUTED: Final = "unknown"
# The words of these may be vLLM's or pydantic's, who quote what the client sent.
_QUOTING: Final = (InvalidRequest, UnprocessableContent)
_TOLD: Final = 200


def note(recent: Notes, scope: Scope, refusal: Refusal | None, opened: OpenRequest | None) -> None:
    """Note one exchange that is over."""
    if refusal is not None:
        recent.note(_refused(refusal, scope))
    if opened is not None and opened.edits:
        recent.note(_shortened(opened.edits, scope))


def _refused(refusal: Refusal, scope: Scope) -> Happening:
    form = errors.wire(refusal)
    quotes = type(refusal) in _QUOTING
    detail = f"param: {refusal.param}" if quotes and refusal.param else "" if quotes else refusal.message
    return Happening(
        kind="refusal",
        code=form.code or form.type,
        route=_route(scope),
        tenant=_tenant(scope),
        status=form.status,
        detail=detail,
        request_id=scope["state"]["request_id"],
    )


def _shortened(edits: Edits, scope: Scope) -> Happening:
    parts = [edits.header(), f"max_tokens {edits.max_tokens[0]} → {edits.max_tokens[1]}" if edits.max_tokens else None]
    return Happening(
        kind="truncation",
        code=str(edits.applied()[0]["type"]),
        route=_route(scope),
        tenant=_tenant(scope),
        status=_TOLD,
        detail="; ".join(part for part in parts if part),
        request_id=scope["state"]["request_id"],
    )


def _route(scope: Scope) -> str:
    return str(getattr(scope.get("route"), "path", _UNROUTED))


def _tenant(scope: Scope) -> str:
    tenant = scope["state"].get("tenant")
    return "" if tenant is None else str(tenant.name)
