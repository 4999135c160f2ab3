"""The operator API: tenants, their keys and what they used. It never shows a key but once, when it is made."""

import math
from typing import Any, Final, TypeVar

from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field, ValidationError

from server.api.auth import Operators
from server.api.body import ClientLeft, parse_json_object, read_body
from server.policy.refusals import InvalidRequest
from server.policy.tenants import Key, Tenant
from server.serving.tenant_desk import NewKey, TenantDesk, TenantEntry
from server.store.tenant_forms import Form, TenantForm, place, sentence, written

_MAX_BODY_BYTES: Final = 64 << 10
_LONGEST_S: Final = 10 * 365 * 24 * 3600.0
_LIMITS_FIELDS: Final = ("limits", "end_user_limits")


class NewTenantForm(TenantForm):
    """A tenant with its name."""

    name: str


class NewKeyForm(Form):
    """`expires_in_s` None: until it is revoked."""

    expires_in_s: float | None = Field(None, gt=0, le=_LONGEST_S, allow_inf_nan=False)


class RotationForm(NewKeyForm):
    """`grace_s`: for how long the former keys go on working."""

    grace_s: float = Field(0, ge=0, le=_LONGEST_S, allow_inf_nan=False)


FormT = TypeVar("FormT", bound=Form)


def operators_router(desk: TenantDesk, operators: Operators) -> APIRouter:
    """`/admin/tenants` and below."""
    router = APIRouter(prefix="/admin/tenants", tags=["operator"], dependencies=[Depends(operators)])

    @router.get("")
    async def tenants() -> Response:
        """Every tenant with its keys."""
        return JSONResponse({"object": "list", "data": [_shown(entry) for entry in await desk.entries()]})

    @router.post("", openapi_extra=_body(NewTenantForm))
    async def create(request: Request) -> Response:
        """Add a tenant; it has no key yet. The first tenant closes an open server."""
        form = await _read(request, NewTenantForm)
        tenant = form.tenant(form.name)
        await desk.create(tenant)
        return JSONResponse(_shown(TenantEntry(tenant, declared=False)), status_code=201)

    @router.get("/{name}")
    async def tenant(name: str) -> Response:
        return JSONResponse(_shown(await desk.entry(name)))

    @router.patch("/{name}", openapi_extra=_body(TenantForm))
    async def change(name: str, request: Request) -> Response:
        """Change what the body names; null takes a limit away."""
        changes = await _object(request)
        await desk.change(name, lambda before: _merged(before, changes))
        return JSONResponse(_shown(await desk.entry(name)))

    @router.delete("/{name}")
    async def delete(name: str) -> Response:
        """Forget a tenant and revoke its keys."""
        await desk.delete(name)
        return JSONResponse({"object": "tenant.deleted", "name": name, "deleted": True})

    _add_key_routes(router, desk)
    return router


def _add_key_routes(router: APIRouter, desk: TenantDesk) -> None:
    @router.post("/{name}/keys", openapi_extra=_body(NewKeyForm))
    async def add_key(name: str, request: Request) -> Response:
        """Give a tenant one more key, which is shown in this answer and never again."""
        form = await _read(request, NewKeyForm)
        return _made(await desk.add_key(name, form.expires_in_s))

    @router.delete("/{name}/keys")
    async def revoke_all(name: str) -> Response:
        return _revoked(await desk.revoke(name, None))

    @router.delete("/{name}/keys/{key_id}")
    async def revoke(name: str, key_id: str) -> Response:
        return _revoked(await desk.revoke(name, key_id))

    @router.post("/{name}/rotate", openapi_extra=_body(RotationForm))
    async def rotate(name: str, request: Request) -> Response:
        """Give a tenant a new key in place of all it had."""
        form = await _read(request, RotationForm)
        return _made(await desk.rotate(name, form.grace_s, form.expires_in_s))


def _body(form: type[BaseModel]) -> dict[str, Any]:
    """The body for the API's document; it is read by hand, after the key was checked and under a cap."""
    schema = form.model_json_schema(ref_template="#/components/schemas/{model}")
    definitions = schema.pop("$defs", {})
    for name, definition in definitions.items():
        schema = _inlined(schema, f"#/components/schemas/{name}", definition)
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def _inlined(schema: Any, reference: str, definition: dict[str, Any]) -> Any:
    if isinstance(schema, dict):
        if schema.get("$ref") == reference:
            return definition
        return {key: _inlined(value, reference, definition) for key, value in schema.items()}
    return [_inlined(value, reference, definition) for value in schema] if isinstance(schema, list) else schema


async def _object(request: Request) -> dict[str, Any]:
    try:
        raw = await read_body(request.receive, request.headers, _MAX_BODY_BYTES)
    except ClientLeft as left:
        raise InvalidRequest("The request ended before its body was complete.") from left
    return parse_json_object(raw, request.headers) if raw else {}


async def _read(request: Request, form: type[FormT]) -> FormT:
    return _checked(form, await _object(request))


def _checked(form: type[FormT], body: dict[str, Any]) -> FormT:
    try:
        return form.model_validate(body)
    except ValidationError as error:
        raise InvalidRequest(sentence(error), param=".".join(place(error)) or None) from error


def _merged(before: Tenant, changes: dict[str, Any]) -> Tenant:
    """The tenant with the changes; limits are changed one by one, and null for all of them takes them all away."""
    fields = written(before)
    for name, value in changes.items():
        if name in _LIMITS_FIELDS and isinstance(value, dict):
            value = {**(fields[name] or {}), **value}
        fields[name] = {} if name == "limits" and value is None else value
    if changes.get("trusted") is False and "end_user_limits" not in changes:
        fields["end_user_limits"] = None
    return _checked(TenantForm, fields).tenant(before.name)


def _shown(entry: TenantEntry) -> dict[str, Any]:
    return {
        "object": "tenant",
        "name": entry.tenant.name,
        **written(entry.tenant),
        "source": "file" if entry.declared else "redis",
        "keys": [_shown_key(key) for key in entry.keys],
    }


def _shown_key(key: Key) -> dict[str, Any]:
    """Times in whole seconds since 1970."""
    return {
        "id": key.key_id,
        "created_at": math.floor(key.created_s),
        "expires_at": None if key.expires_s is None else math.floor(key.expires_s),
        "last_used_at": None if key.last_used_s is None else math.floor(key.last_used_s),
    }


def _made(made: NewKey) -> Response:
    body = {"object": "key", "tenant": made.key.tenant, **_shown_key(made.key), "key": made.secret}
    return JSONResponse(body, status_code=201, headers={"cache-control": "no-store"})


def _revoked(key_ids: list[str]) -> Response:
    return JSONResponse({"object": "keys.revoked", "ids": key_ids})
