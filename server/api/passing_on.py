"""Passes requests on to the process that keeps what a server has only once, and its answers back.

Both ways as a stream: a large upload or a long answer is never held here.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import aclosing
from pathlib import Path
from typing import Final

import httpx
import structlog
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api import errors
from server.api.body import ClientLeft
from server.api.disconnect import CancelOnDisconnect
from server.api.ollama import OLLAMA_PREFIX
from server.api.routes import OPERATION_ROUTES
from server.api.sending import WatchedSend
from server.policy.refusals import NotReady, Refusal

log = structlog.get_logger(__name__)

Header = tuple[bytes, bytes]

_RESPONSES: Final = "/v1/responses"
# What every process answers for itself, beside the routes of the engine.
_ABOUT_A_PROCESS: Final = ("/health", "/health/live", "/health/ready", "/ping", "/version")
_TRY_AGAIN: Final = "The server is starting or stopping. Please try again."
_RETRY_AFTER_S: Final = 1.0
_CONNECT_TIMEOUT_S: Final = 5.0
# About one connection and not about what goes over it: RFC 9110, 7.6.1. A server answers `expect` by itself.
_HOP_BY_HOP: Final = frozenset(
    {
        b"connection", b"expect", b"keep-alive", b"proxy-authenticate", b"proxy-authorization", b"proxy-connection",
        b"te", b"trailer", b"transfer-encoding", b"upgrade",
    }
)  # fmt: skip
_FORWARDED_FOR: Final = b"x-forwarded-for"
_FORWARDED_PROTO: Final = b"x-forwarded-proto"
# The other side takes both for the truth, so nobody but this side may say them.
_OURS_TO_SAY: Final = frozenset({_FORWARDED_FOR, _FORWARDED_PROTO})


def answered_here(*, keeps_responses: bool, root_path: str = "") -> Callable[[str], bool]:
    """Tells which paths a further process answers itself: those of the engine, which it shares.

    `keeps_responses`: answers of `/v1/responses` stay in the process that gave them, to be asked for again.
    """
    engines = [route.path for route in OPERATION_ROUTES if not route.operators]
    exact = frozenset({path for path in engines if "{" not in path}.union(_ABOUT_A_PROCESS))
    below = (OLLAMA_PREFIX, "/v1/models/", f"{_RESPONSES}/")
    prefix = root_path.rstrip("/")

    def is_answered_here(path: str) -> bool:
        if prefix and path.startswith(f"{prefix}/"):
            path = path.removeprefix(prefix)
        if keeps_responses and path.startswith(_RESPONSES):
            return False
        return path in exact or path.startswith(below)

    return is_answered_here


class PassingOn:
    """Plain ASGI middleware around a whole application, which answers the paths that `is_answered_here` names.

    Any other request goes to the HTTP server behind the Unix socket `uds`. That one has to take `X-Forwarded-For` and
    `X-Forwarded-Proto` from everybody who can open its socket (uvicorn: `forwarded_allow_ips="*"`). A client that
    leaves an answer unread for `slow_reader_timeout_s` counts as gone.
    """

    def __init__(
        self, app: ASGIApp, uds: Path, is_answered_here: Callable[[str], bool], slow_reader_timeout_s: float
    ) -> None:
        self._app = app
        self._is_answered_here = is_answered_here
        self._slow_reader_timeout_s = slow_reader_timeout_s
        # The transport and no client: that would add headers, and hand one caller's cookies to the next.
        self._first = httpx.AsyncHTTPTransport(uds=str(uds), limits=httpx.Limits(max_connections=None))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or self._is_answered_here(scope["path"]):
            await self._app(scope, receive, send)
            return
        upload = _Upload(receive)
        try:
            async with (
                CancelOnDisconnect(upload.receive_after) as client,
                WatchedSend(send, send, self._slow_reader_timeout_s, client.leave) as watched,
            ):
                await self._pass_on(scope, upload, watched, client)
        except ClientLeft:
            log.debug("a client left in its upload")

    async def close(self) -> None:
        """Close the connections."""
        await self._first.aclose()

    async def _pass_on(self, scope: Scope, upload: _Upload, send: Send, client: CancelOnDisconnect) -> None:
        try:
            response = await self._first.handle_async_request(_request(scope, upload))
        except httpx.TransportError as error:
            log.warning("the first process does not answer", reason=str(error) or type(error).__name__)
            client.finish()
            await _refuse(NotReady(_TRY_AGAIN, retry_after_s=_RETRY_AFTER_S), send)
            return
        finally:
            upload.over()
        async with aclosing(response):
            await send(_head(response.status_code, _carried(response.headers.raw, frozenset({b"date"}))))
            try:
                async for part in response.aiter_raw():
                    await send({"type": "http.response.body", "body": part, "more_body": True})
            except httpx.TransportError as error:
                # An answer that is not ended is one whose connection the server cuts, so nobody takes it for whole.
                log.warning("an answer of the first process broke off", reason=str(error) or type(error).__name__)
                return
        client.finish()
        await send({"type": "http.response.body"})


class _Upload:
    """A request's body as it comes, and then what the server says about its client."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._over = asyncio.Event()

    async def __aiter__(self) -> AsyncIterator[bytes]:
        """Raises `ClientLeft`."""
        more = True
        while more:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                raise ClientLeft
            more = message.get("more_body", False)
            if part := message.get("body", b""):
                yield part
        self.over()

    def over(self) -> None:
        """Nobody reads the body any more."""
        self._over.set()

    async def receive_after(self) -> Message:
        """What comes after the body."""
        await self._over.wait()
        return await self._receive()


def _request(scope: Scope, upload: _Upload) -> httpx.Request:
    """The same request for the other side. Its target stands as it came, with every escape."""
    names = {name for name, _ in scope["headers"]}
    chunked = b"transfer-encoding" in names
    has_body = chunked or b"content-length" in names
    if not has_body:
        upload.over()
    left_out = _OURS_TO_SAY | {b"content-length"} if chunked else _OURS_TO_SAY
    target: bytes = scope["raw_path"]
    if scope["query_string"]:
        target += b"?" + scope["query_string"]
    return httpx.Request(
        scope["method"],
        "http://first",
        headers=[*_carried(scope["headers"], left_out), *_origin(scope)],
        content=upload if has_body else None,
        extensions={"target": target, "timeout": httpx.Timeout(None, connect=_CONNECT_TIMEOUT_S).as_dict()},
    )


def _origin(scope: Scope) -> list[Header]:
    """Who the client is, as this side has found out, and how it came."""
    said = [(_FORWARDED_PROTO, scope["scheme"].encode())]
    client = scope.get("client")
    return said if client is None else [*said, (_FORWARDED_FOR, client[0].encode())]


def _carried(headers: Iterable[Header], left_out: frozenset[bytes]) -> list[Header]:
    """The headers that go further than one connection, but for some."""
    given = [(name.lower(), value) for name, value in headers]
    named = {part.strip().lower() for name, value in given if name == b"connection" for part in value.split(b",")}
    return [(name, value) for name, value in given if name not in _HOP_BY_HOP | named | left_out]


def _head(status: int, headers: list[Header]) -> Message:
    return {"type": "http.response.start", "status": status, "headers": headers}


async def _refuse(refusal: Refusal, send: Send) -> None:
    body = errors.encoded(refusal, "openai")
    more = {**errors.headers(refusal), "content-type": "application/json", "content-length": str(len(body))}
    headers = [(name.encode(), value.encode()) for name, value in more.items()]
    await send(_head(errors.status(refusal), headers))
    await send({"type": "http.response.body", "body": body})
