"""Who is calling: the tenant behind the key of a request, and the operator behind the operator key."""

import hashlib
import secrets
from typing import Final

import structlog
from fastapi import Request

from server.api.edge import Edge
from server.policy.refusals import InvalidApiKey
from server.policy.tenants import ANYONE, OPERATOR, Tenant, is_plain_end_user
from server.serving.access import Access

# Open WebUI's names for the person at the keyboard; the first that is there counts.
_END_USER_HEADERS: Final = ("x-openwebui-user-id", "x-openwebui-user-email", "x-openwebui-user-name")
_NO_OPERATOR: Final = "This route is the operator's: send the operator key as `Authorization: Bearer <key>`."


class OperatorKey:
    """The operator's key; with none given nobody is the operator."""

    def __init__(self, key: str | None) -> None:
        self._digest = None if key is None else _digest(key)

    def matches(self, key: str) -> bool:
        return self._digest is not None and secrets.compare_digest(_digest(key), self._digest)


class Callers:
    """The FastAPI dependency of every route that reaches the engine.

    It leaves the tenant and its end user in the request's state, where the response that owns the request finds them.
    """

    def __init__(self, access: Access, operator: OperatorKey, edge: Edge) -> None:
        self._access = access
        self._operator = operator
        self._edge = edge

    async def __call__(self, request: Request) -> None:
        """Raises `InvalidApiKey`, `StoreUnavailable`, and `RateLimited` after too many failed logins."""
        key = presented_key(request)
        self._edge.before_login(request, key)
        try:
            tenant = OPERATOR if self._operator.matches(key) else await self._access.caller(key)
        except InvalidApiKey:
            if key:
                self._edge.login_failed(request)
            raise
        if key:
            self._edge.login_worked(request, key)
        request.state.tenant = tenant
        request.state.end_user = end_user(request, tenant)
        if tenant is not ANYONE:
            structlog.contextvars.bind_contextvars(tenant=tenant.name)


class Operators:
    """The FastAPI dependency of the operator's routes."""

    def __init__(self, operator: OperatorKey, edge: Edge) -> None:
        self._operator = operator
        self._edge = edge

    async def __call__(self, request: Request) -> None:
        """Raises `InvalidApiKey`, and `RateLimited` for an address that asks too much or fails too often."""
        key = presented_key(request)
        self._edge.before_login(request, key)
        await self._edge.operator_request(request)
        if not self._operator.matches(key):
            if key:
                self._edge.login_failed(request)
            raise InvalidApiKey(_NO_OPERATOR)
        self._edge.login_worked(request, key)
        structlog.contextvars.bind_contextvars(tenant=OPERATOR.name)


def presented_key(request: Request) -> str:
    """The bearer token, or Anthropic's `x-api-key`; empty when there is none."""
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return token.strip()
    return request.headers.get("x-api-key", "")


def end_user(request: Request, tenant: Tenant) -> str | None:
    """For whom a trusted tenant sends the request; a name that could not stand in a log is replaced by its digest."""
    if not tenant.trusted:
        return None
    given = next((value for name in _END_USER_HEADERS if (value := request.headers.get(name, "").strip())), None)
    if given is None or is_plain_end_user(given):
        return given
    return _digest(given).hex()[:32]


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
