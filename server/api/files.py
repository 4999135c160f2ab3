"""OpenAI's Files API, for the inputs and outputs of batches."""

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any, Final

from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import FileResponse, JSONResponse
from starlette.requests import ClientDisconnect

from server.api.errors import CLIENT_CLOSED_REQUEST
from server.api.paging import cut_from, page
from server.api.uploads import Form, read_upload
from server.policy.refusals import InvalidRequest
from server.policy.tenants import ANYONE, Tenant
from server.serving.file_desk import About, FileDesk
from server.store.file_records import StoredFile

_MOST_LISTED: Final = 10_000
_SHORTEST_KEPT_S: Final = 3600
_LONGEST_KEPT_S: Final = 30 * 24 * 3600
_ANCHOR: Final = "created_at"
_UPLOAD_BODY: Final = {
    "required": True,
    "content": {
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "required": ["file", "purpose"],
                "properties": {
                    "file": {"type": "string", "format": "binary"},
                    "purpose": {"type": "string", "enum": ["batch"]},
                    "expires_after[anchor]": {"type": "string", "enum": [_ANCHOR]},
                    "expires_after[seconds]": {
                        "type": "integer",
                        "minimum": _SHORTEST_KEPT_S,
                        "maximum": _LONGEST_KEPT_S,
                    },
                },
            }
        }
    },
}


def files_router(desk: FileDesk, authenticate: Callable[[Request], Awaitable[None]]) -> APIRouter:
    """`/v1/files` and below."""
    router = APIRouter(prefix="/v1/files", tags=["files"], dependencies=[Depends(authenticate)])

    @router.post("", openapi_extra={"requestBody": _UPLOAD_BODY})
    async def upload(request: Request) -> Response:
        """Keep a file; `purpose` is `batch`."""
        try:
            async with desk.receiving(tenant_of(request)) as incoming:
                form = await read_upload(request.headers, _chunks(request), incoming.write)
                return JSONResponse(shown(await incoming.keep(_about(form))))
        except ClientDisconnect:
            return Response(status_code=CLIENT_CLOSED_REQUEST)

    @router.get("")
    async def files(request: Request) -> Response:
        """The tenant's files, newest first; `purpose`, `limit`, `order` and `after` choose among them."""
        query = request.query_params
        cut = cut_from(query, _MOST_LISTED, default=_MOST_LISTED)
        found, more = await desk.page(tenant_of(request), query.get("purpose") or None, cut)
        return JSONResponse(page([shown(file) for file in found], more))

    @router.get("/{file_id}")
    async def file(file_id: str, request: Request) -> Response:
        return JSONResponse(shown(await desk.file(tenant_of(request), file_id)))

    @router.get("/{file_id}/content")
    async def content(file_id: str, request: Request) -> Response:
        """The file as it was sent, or as a batch wrote it."""
        found, path = await desk.content(tenant_of(request), file_id)
        return FileResponse(path, media_type="application/octet-stream", filename=found.filename)

    @router.delete("/{file_id}")
    async def delete(file_id: str, request: Request) -> Response:
        await desk.delete(tenant_of(request), file_id)
        return JSONResponse({"id": file_id, "object": "file", "deleted": True})

    return router


def tenant_of(request: Request) -> Tenant:
    """Whose request it is, as authentication left it."""
    tenant = getattr(request.state, "tenant", ANYONE)
    assert isinstance(tenant, Tenant)
    return tenant


def shown(file: StoredFile) -> dict[str, Any]:
    """A file as OpenAI shows it."""
    return {
        "id": file.id,
        "object": "file",
        "bytes": file.size,
        "created_at": file.created_at,
        "expires_at": file.expires_at,
        "filename": file.filename,
        "purpose": file.purpose,
        "status": "processed",
        "status_details": None,
    }


def expiry_s(given: Mapping[str, Any] | None, param: str) -> int | None:
    """The seconds in an `expires_after`. Raises `InvalidRequest`."""
    if given is None:
        return None
    anchor, seconds = given.get("anchor"), given.get("seconds")
    if anchor != _ANCHOR:
        raise InvalidRequest(f"`{param}.anchor` must be `{_ANCHOR}`.", param=param)
    if not isinstance(seconds, int) or isinstance(seconds, bool) or not _SHORTEST_KEPT_S <= seconds <= _LONGEST_KEPT_S:
        message = f"`{param}.seconds` must be a whole number from {_SHORTEST_KEPT_S} to {_LONGEST_KEPT_S}."
        raise InvalidRequest(message, param=param)
    return seconds


async def _chunks(request: Request) -> AsyncIterator[bytes]:
    async for chunk in request.stream():
        if chunk:
            yield chunk


def _about(form: Form) -> About:
    """What the form says about its file. Raises `InvalidRequest`."""
    if not form.has_file:
        raise InvalidRequest("Missing required parameter: 'file'.", param="file")
    if "purpose" not in form.fields:
        raise InvalidRequest("Missing required parameter: 'purpose'.", param="purpose")
    anchor, seconds = (form.fields.get(f"expires_after[{name}]") for name in ("anchor", "seconds"))
    expires: dict[str, Any] | None = None
    if anchor is not None or seconds is not None:
        expires = {"anchor": anchor, "seconds": int(seconds) if seconds and seconds.isdecimal() else None}
    return About(form.filename or "upload.jsonl", form.fields["purpose"], expiry_s(expires, "expires_after"))
