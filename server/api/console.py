"""The operator's console: its page and scripts, which anyone may read, and the one route that gives it its figures."""

from pathlib import Path
from typing import Final

from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import JSONResponse, RedirectResponse
from fastapi.staticfiles import StaticFiles

from server.api.auth import Operators
from server.serving.overview import Overview

_FILES: Final = Path(__file__).with_name("console_files")
_INDEX: Final = "index.html"
# Nothing from elsewhere, nothing inline, no frame around it, and no text that becomes markup.
_POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
)
_HEADERS: Final = {
    "content-security-policy": _POLICY,
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-cache",  # asked for again each time, and not sent again if it is the same
}


def overview_router(overview: Overview, operators: Operators) -> APIRouter:
    """`/admin/overview`."""
    router = APIRouter(prefix="/admin/overview", tags=["operator"], dependencies=[Depends(operators)])

    @router.get("")
    async def take() -> Response:
        """What the server is doing now. Counters count from the start: ask twice for rates."""
        return JSONResponse(await overview.take(), headers={"cache-control": "no-store"})

    return router


def console_router() -> APIRouter:
    """`/console`. The page holds no data; it asks for the operator key."""
    router, files = APIRouter(), StaticFiles(directory=_FILES)

    @router.get("/console", include_in_schema=False)
    async def console() -> Response:
        """The page's own addresses are relative, and need the slash. So is this one: a proxy may add a prefix."""
        return RedirectResponse("console/")

    @router.api_route("/console/{name:path}", methods=["GET", "HEAD"], include_in_schema=False)
    async def file(name: str, request: Request) -> Response:
        response = await files.get_response(name or _INDEX, request.scope)
        response.headers.update(_HEADERS)
        return response

    return router
