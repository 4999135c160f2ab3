"""The response that owns its request.

Nothing is acquired before `__call__`: a client that leaves at any moment cancels the one task that holds everything,
and the cleanup runs in that task.
"""

import asyncio
import time
from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager, aclosing, nullcontext
from dataclasses import dataclass
from typing import Final

import structlog
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from server.api import errors
from server.api.body import ClientLeft, parse_json_object, read_body
from server.api.disconnect import CancelOnDisconnect
from server.api.errors import Dialect
from server.api.sending import SEND_BODY, WatchedSend
from server.api.waiting import Reminder
from server.engine.calls import Call, DirectFrames, Frame, Reply, StreamReply
from server.policy.refusals import GenerationFailed, Refusal
from server.policy.tenants import ANYONE
from server.serving.requests import OpenRequest
from server.serving.service import Service
from server.serving.telling import told_body, told_frame

log = structlog.get_logger(__name__)

_SSE_HEADERS: Final = {"cache-control": "no-cache", "x-accel-buffering": "no"}
_WAITING: Final = b": waiting\n\n"


@dataclass(frozen=True, slots=True)
class WireLimits:
    """`keep_alive_s`: how long a stream may wait for its first frame before its head and a comment are sent.

    `slow_reader_timeout_s`: how long a client may leave what it was sent unread before its request is ended.
    """

    max_body_bytes: int
    keep_alive_s: float
    slow_reader_timeout_s: float


class OwnedResponse(Response):
    """Runs one call when the server asks for the answer, and sends it."""

    def __init__(self, service: Service, limits: WireLimits, request: Request, route: str, dialect: Dialect) -> None:
        self.background = None
        self._service = service
        self._limits = limits
        self._request = request
        self._route = route
        self._dialect = dialect
        self._head_sent = False
        self._sent = False  # whether a part of the answer is out, beyond comments

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._send = send
        state = scope["state"]
        opened = OpenRequest(
            state["request_id"],
            self._route,
            tenant=state.get("tenant", ANYONE),
            end_user=state.get("end_user"),
            producing=scope["method"] == "GET",
        )
        state["open_request"] = opened
        try:
            call = await self._read(receive)
            async with (
                CancelOnDisconnect(receive) as self._client,
                self._watched(send, state.pop(SEND_BODY, send)) as self._connection,
                self._service.requests.open(opened),
            ):
                self._send = self._connection
                await self._answer(call, opened)
            opened.client_left = self._client.client_left
        except Refusal as refusal:
            await self._refuse(refusal, opened)
        except ClientLeft:
            opened.client_left = True

    def _watched(self, send: Send, send_body: Send) -> WatchedSend:
        return WatchedSend(send, send_body, self._limits.slow_reader_timeout_s, self._client.leave)

    async def _read(self, receive: Receive) -> Call:
        request = self._request
        headers = Headers(scope=request.scope)
        body = None
        if request.method == "POST":
            raw = await read_body(receive, headers, self._limits.max_body_bytes)
            await self._service.turnstile.turn(len(raw))
            body = parse_json_object(raw, headers) if raw or "content-type" in headers else {}
        return Call(
            method=request.method,
            route=self._route,
            headers=tuple(request.scope["headers"]),
            path_params=request.path_params,
            query=dict(request.query_params) if request.scope["query_string"] else {},
            body=body,
        )

    async def _answer(self, call: Call, opened: OpenRequest) -> None:
        """Answer on one engine after another, until one lives long enough or a part of the answer is out."""
        while True:
            if self._service.slot.down:
                async with self._kept_alive(self._expected_media_type(call), opened):
                    await self._service.engine_for(call, opened)
            try:
                await self._attempt(call, opened)
            except GenerationFailed as failure:
                await self._service.recovery.after(failure, opened, sent=self._sent)
            except asyncio.CancelledError:
                if not opened.was_woken():
                    raise
                failed = GenerationFailed("The model stopped while it worked on this request.")
                await self._service.recovery.after(failed, opened, sent=self._sent)
            else:
                return

    async def _attempt(self, call: Call, opened: OpenRequest) -> None:
        try:
            reply = await self._reply(call, opened)
            if isinstance(reply, StreamReply):
                await self._stream(reply, opened)
            else:
                await self._whole(reply, opened)
        except Refusal as refusal:
            raise (opened.refusal or refusal) from refusal
        except Exception as error:
            if not opened.lost_its_engine:
                log.exception("request failed")
            raise GenerationFailed("Something went wrong on the server. Please try again.") from error

    async def _reply(self, call: Call, opened: OpenRequest) -> Reply | StreamReply:
        """What answers the call. A dialect that says answers in words of its own does so here."""
        return await self._service.answer(call, opened)

    def _expected_media_type(self, call: Call) -> str:
        """In what a client may be kept waiting."""
        return "text/event-stream" if call.body is not None and call.body.get("stream") is True else ""

    async def _whole(self, reply: Reply, opened: OpenRequest) -> None:
        body = told_body(reply.body, opened.edits) if opened.edits else reply.body
        headers = {**reply.headers, **opened.headers, "content-length": str(len(body))}
        self._sent = True
        opened.leave_engine()
        await self._start(reply.status, reply.media_type, headers)
        self._client.finish()
        await self._send({"type": "http.response.body", "body": body})

    async def _stream(self, reply: StreamReply, opened: OpenRequest) -> None:
        """Send frames as they come; the head goes with the first frame that the engine made.

        Frames that precede the engine's first output are held back, so that a refusal can still be a status.
        """
        held: list[bytes] = []
        flowing = False
        send, refusal_in = self._send, reply.refusal_in
        async with self._kept_alive(reply.media_type, opened) as waiting, aclosing(reply.frames) as frames:
            async for frame in frames:
                if (refusal := refusal_in(frame)) is not None:
                    raise refusal
                data = _bytes(told_frame(frame, opened.edits) if opened.edits else frame)
                if flowing:
                    await send({"type": "http.response.body", "body": data, "more_body": True})
                    continue
                held.append(data)
                if opened.producing:
                    if waiting is not None:
                        await waiting.stop()
                    self._sent = flowing = True
                    opened.figures.first_frame_s = time.perf_counter()
                    await self._send_frames(b"".join(held), reply.media_type, opened)
                    held.clear()
                    if isinstance(frames, DirectFrames):
                        frames.flow_to(self._connection.write)
        opened.figures.last_frame_s = time.perf_counter()
        opened.leave_engine()
        await self._send_frames(b"".join(held), reply.media_type, opened)
        self._client.finish()
        await self._end()

    def _kept_alive(self, media_type: str, opened: OpenRequest) -> AbstractAsyncContextManager[Reminder | None]:
        """Inside it, comments go out while the client waits: proxies cut a stream whose first token is long in coming.

        Only event streams can carry comments.
        """
        if not media_type.startswith("text/event-stream"):
            return nullcontext()
        return Reminder(self._limits.keep_alive_s, lambda: self._send_frames(_WAITING, media_type, opened))

    async def _send_frames(self, frames: bytes, media_type: str, opened: OpenRequest) -> None:
        if not self._head_sent:
            await self._start(200, media_type, {**_SSE_HEADERS, **opened.headers})
        await self._send({"type": "http.response.body", "body": frames, "more_body": True})

    async def _refuse(self, refusal: Refusal, opened: OpenRequest) -> None:
        self._request.state.refusal = refusal
        log.info("refused", reason=type(refusal).__name__, detail=refusal.message)
        if self._head_sent:
            await self._send_frames(errors.event(refusal, self._dialect), "", opened)
            await self._end()
            return
        payload = errors.encoded(refusal, self._dialect)
        headers = {**opened.headers, **errors.headers(refusal), "content-length": str(len(payload))}
        await self._start(errors.status(refusal), "application/json", headers)
        await self._send({"type": "http.response.body", "body": payload})

    async def _start(self, status: int, media_type: str, headers: Mapping[str, str]) -> None:
        self._head_sent = True
        raw = [(b"content-type", media_type.encode())]
        raw += [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
        await self._send({"type": "http.response.start", "status": status, "headers": raw})

    async def _end(self) -> None:
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})


def _bytes(frame: Frame) -> bytes:
    return frame.encode() if isinstance(frame, str) else frame
