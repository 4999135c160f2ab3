"""OpenAI's Batches API."""

from collections.abc import Awaitable, Callable
from dataclasses import asdict
from typing import Any, Final

from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import JSONResponse

from server.api.body import ClientLeft, parse_json_object, read_body
from server.api.files import expiry_s, tenant_of
from server.api.paging import cut_from, page
from server.policy.batches import ENDPOINTS, Batch, Status
from server.policy.refusals import InvalidRequest
from server.serving.batch_desk import BatchDesk, Order

_MAX_BODY_BYTES: Final = 64 << 10
_MOST_LISTED: Final = 100
_LISTED: Final = 20
_WINDOW: Final = "24h"
_FIELDS: Final = frozenset({"input_file_id", "endpoint", "completion_window", "metadata", "output_expires_after"})
_MOST_METADATA: Final = 16
_LONGEST_KEY: Final = 64
_LONGEST_VALUE: Final = 512
# The state behind each of OpenAI's times.
_TIMES: Final[tuple[tuple[str, Status], ...]] = (
    ("in_progress_at", "in_progress"),
    ("finalizing_at", "finalizing"),
    ("completed_at", "completed"),
    ("failed_at", "failed"),
    ("expired_at", "expired"),
    ("cancelling_at", "cancelling"),
    ("cancelled_at", "cancelled"),
)
_ORDER_BODY: Final = {
    "required": True,
    "content": {
        "application/json": {
            "schema": {
                "type": "object",
                "required": ["input_file_id", "endpoint", "completion_window"],
                "properties": {
                    "input_file_id": {"type": "string"},
                    "endpoint": {"type": "string", "enum": list(ENDPOINTS)},
                    "completion_window": {"type": "string", "enum": [_WINDOW]},
                    "metadata": {"type": "object", "additionalProperties": {"type": "string"}},
                    "output_expires_after": {"type": "object"},
                },
            }
        }
    },
}


def batches_router(desk: BatchDesk, authenticate: Callable[[Request], Awaitable[None]]) -> APIRouter:
    """`/v1/batches` and below."""
    router = APIRouter(prefix="/v1/batches", tags=["batches"], dependencies=[Depends(authenticate)])

    @router.post("", openapi_extra={"requestBody": _ORDER_BODY})
    async def create(request: Request) -> Response:
        """Run the requests of an uploaded file when the server has room for them."""
        return JSONResponse(shown(await desk.create(tenant_of(request), await _order(request))))

    @router.get("")
    async def batches(request: Request) -> Response:
        """The tenant's batches, newest first; `limit` and `after` choose among them."""
        cut = cut_from({**request.query_params, "order": "desc"}, _MOST_LISTED, default=_LISTED)
        found, more = await desk.page(tenant_of(request), cut)
        return JSONResponse(page([shown(batch) for batch in found], more))

    @router.get("/{batch_id}")
    async def batch(batch_id: str, request: Request) -> Response:
        return JSONResponse(shown(await desk.batch(tenant_of(request), batch_id)))

    @router.post("/{batch_id}/cancel")
    async def cancel(batch_id: str, request: Request) -> Response:
        """End it: what is answered by then is kept, and lines in the engine are finished."""
        return JSONResponse(shown(await desk.cancel(tenant_of(request), batch_id)))

    return router


async def _order(request: Request) -> Order:
    """The body of a new batch. Raises `InvalidRequest`."""
    try:
        raw = await read_body(request.receive, request.headers, _MAX_BODY_BYTES)
    except ClientLeft as left:
        raise InvalidRequest("The request ended before its body was complete.") from left
    body = parse_json_object(raw, request.headers)
    if unknown := sorted(set(body) - _FIELDS):
        raise InvalidRequest(f"Unknown parameter: '{unknown[0]}'.", param=unknown[0])
    for name in ("input_file_id", "endpoint", "completion_window"):
        if name not in body:
            raise InvalidRequest(f"Missing required parameter: '{name}'.", param=name)
        if not isinstance(body[name], str):
            raise InvalidRequest(f"Invalid type for '{name}': expected a string.", param=name)
    if body["endpoint"] not in ENDPOINTS:
        message = f"`endpoint` must be one of {', '.join(ENDPOINTS)}."
        raise InvalidRequest(message, param="endpoint")
    if body["completion_window"] != _WINDOW:
        raise InvalidRequest(f"`completion_window` must be `{_WINDOW}`.", param="completion_window")
    expires = body.get("output_expires_after")
    if expires is not None and not isinstance(expires, dict):
        raise InvalidRequest("`output_expires_after` must be an object.", param="output_expires_after")
    return Order(
        input_file_id=body["input_file_id"],
        endpoint=body["endpoint"],
        metadata=_metadata(body.get("metadata")),
        output_expires_after_s=expiry_s(expires, "output_expires_after"),
        end_user=getattr(request.state, "end_user", None),
    )


def _metadata(given: Any) -> dict[str, str] | None:
    if given is None:
        return None
    good = (
        isinstance(given, dict)
        and len(given) <= _MOST_METADATA
        and all(len(key) <= _LONGEST_KEY for key in given)
        and all(isinstance(value, str) and len(value) <= _LONGEST_VALUE for value in given.values())
    )
    if not good:
        message = (
            f"`metadata` holds at most {_MOST_METADATA} pairs: keys of up to {_LONGEST_KEY} characters, and strings "
            f"of up to {_LONGEST_VALUE}."
        )
        raise InvalidRequest(message, param="metadata")
    return dict(given)


def shown(batch: Batch) -> dict[str, Any]:
    """A batch as OpenAI shows it."""
    usage = batch.usage
    errors = {"object": "list", "data": [asdict(error) for error in batch.errors]} if batch.errors else None
    return {
        "id": batch.id,
        "object": "batch",
        "endpoint": batch.endpoint,
        "model": batch.model,
        "errors": errors,
        "input_file_id": batch.input_file_id,
        "completion_window": _WINDOW,
        "status": batch.status,
        "output_file_id": batch.output_file_id,
        "error_file_id": batch.error_file_id,
        "created_at": batch.created_at,
        "expires_at": batch.expires_at,
        **{name: batch.times.get(status) for name, status in _TIMES},
        "request_counts": asdict(batch.counts),
        "usage": {
            "input_tokens": usage.input_tokens,
            "input_tokens_details": {"cached_tokens": usage.cached_tokens},
            "output_tokens": usage.output_tokens,
            "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
            "total_tokens": usage.input_tokens + usage.output_tokens,
        },
        "metadata": batch.metadata,
    }
