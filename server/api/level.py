"""The operator's switch: `/admin/level`."""

from collections.abc import Awaitable, Callable
from typing import Final

from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.datastructures import Headers

from server.api.body import ClientLeft, parse_json_object, read_body
from server.policy.ladder import Level
from server.policy.refusals import InvalidRequest, NotReady
from server.serving.ladder import LadderWatch
from server.store.level import PinsUnreachable

_MAX_BODY_BYTES: Final = 16 << 10
_HOUR_S: Final = 3600.0
_LONGEST_S: Final = 30 * 24 * _HOUR_S
_STORE_RETRY_AFTER_S: Final = 2.0


class LevelForm(BaseModel):
    """The body of `PUT /admin/level`. `by` is who pins, for the audit log."""

    model_config = ConfigDict(extra="forbid")

    level: int = Field(ge=Level.NORMAL, le=Level.CLOSED, strict=True)
    reason: str = Field(min_length=1, max_length=500, pattern=r"\S")
    ttl_s: float = Field(_HOUR_S, gt=0, le=_LONGEST_S, allow_inf_nan=False)
    by: str = Field("operator", min_length=1, max_length=100)


def level_router(ladder: LadderWatch, operators: Callable[[Request], Awaitable[None]]) -> APIRouter:
    """Reads, pins and unpins the level. `operators` is the dependency that lets only operators pass."""
    router = APIRouter(prefix="/admin/level", tags=["operator"], dependencies=[Depends(operators)])

    @router.get("")
    async def get() -> Response:
        """The level that counts, and why."""
        return JSONResponse(ladder.status())

    @router.put("")
    async def put(request: Request) -> Response:
        """Hold a level for a while, whatever the pressure."""
        form = await _form(request)
        if form.level == Level.FALLBACK and not ladder.has_fallback:
            raise InvalidRequest("Level 4 needs a fallback, and none is configured (--fallback-url).", param="level")
        try:
            await ladder.pin(Level(form.level), form.reason, form.ttl_s, _who(form.by, request))
        except PinsUnreachable as error:
            raise _unreachable() from error
        return JSONResponse(ladder.status())

    @router.delete("")
    async def delete(request: Request) -> Response:
        """Let pressure decide again."""
        try:
            await ladder.unpin(_who(request.query_params.get("by", "operator"), request))
        except PinsUnreachable as error:
            raise _unreachable() from error
        return JSONResponse(ladder.status())

    return router


async def _form(request: Request) -> LevelForm:
    headers = Headers(scope=request.scope)
    try:
        body = parse_json_object(await read_body(request.receive, headers, _MAX_BODY_BYTES), headers)
    except ClientLeft as left:
        raise InvalidRequest("The request ended before its body was complete.") from left
    try:
        return LevelForm.model_validate(body)
    except ValidationError as error:
        problem = error.errors(include_url=False, include_input=False)[0]
        field = ".".join(str(part) for part in problem["loc"])
        raise InvalidRequest(f"`{field}`: {problem['msg']}. Nothing was changed.", param=field) from error


def _who(name: str, request: Request) -> str:
    return name if request.client is None else f"{name} ({request.client.host})"


def _unreachable() -> NotReady:
    return NotReady(
        "The level is kept in Redis, and Redis does not answer. Nothing was changed; please try again.",
        retry_after_s=_STORE_RETRY_AFTER_S,
    )
