"""Answers from other OpenAI-compatible servers, while the engine is down or has too much to do.

An upstream's answer passes through byte for byte. Until its first byte is there, the next upstream may be asked
instead; after that a failure ends the stream.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import httpx
import structlog

from server.engine.calls import Call, Frame, Reply, StreamReply
from server.policy.breaker import Breaker, BreakerRules
from server.policy.refusals import Refusal, UpstreamLost
from server.serving.requests import OpenRequest
from server.telemetry.resilience import ResilienceMetrics

log = structlog.get_logger(__name__)

# What any OpenAI-compatible server may know.
FALLBACK_ROUTES: Final = frozenset(
    {"/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages", "/v1/embeddings"}
)
_API_PREFIX: Final = "/v1"
_EVENT_STREAM: Final = "text/event-stream"
_ANY_MODEL: Final = "*"
# The client's own mistakes: another upstream would say the same. Anything else from 400 up is the upstream's.
_PASSED_ON: Final = frozenset({400, 413, 422})
# Ours alone, and an error for OpenAI's own servers.
_OWN_FIELDS: Final = ("truncation",)
_RESPONSES: Final = "/v1/responses"
_BREAKER_RULES: Final = BreakerRules()


@dataclass(frozen=True, slots=True)
class Upstream:
    """One server to fall back on.

    `url` is its base, with the version (`https://host/v1`). A stream may take `first_byte_timeout_s` to begin and then
    `idle_timeout_s` between two parts; an answer that is no stream has `whole_answer_timeout_s` altogether. `models`
    maps our model names to its own, `*` any other. `canary_share` (0 to 1) of all calls goes there also when nothing
    is wrong, so that it is known to work.
    """

    name: str
    url: str
    api_key: str | None = field(default=None, repr=False)
    models: Mapping[str, str] = field(default_factory=dict)
    connect_timeout_s: float = 5.0
    first_byte_timeout_s: float = 30.0
    idle_timeout_s: float = 60.0
    whole_answer_timeout_s: float = 300.0
    canary_share: float = 0.0


class UpstreamFailed(Exception):
    """An upstream gave no answer; the next one may."""


class Fallback:
    """The upstreams in their order, each behind its own circuit breaker."""

    def __init__(
        self,
        upstreams: Sequence[Upstream],
        metrics: ResilienceMetrics,
        chance: Callable[[], float],
        breaker: BreakerRules = _BREAKER_RULES,
        trace_headers: Callable[[], Mapping[str, str]] = dict,
    ) -> None:
        self._lines = [_Line(upstream, metrics, breaker, trace_headers) for upstream in upstreams]
        self._chance = chance

    def __bool__(self) -> bool:
        return bool(self._lines)

    @staticmethod
    def knows(call: Call) -> bool:
        """Whether a call is one that an upstream may answer."""
        return call.method == "POST" and call.route in FALLBACK_ROUTES

    async def answer(self, call: Call, request: OpenRequest) -> Reply | StreamReply | None:
        """The answer of the first upstream that gives one, or None. Raises `Refusal` for what it refuses by right."""
        return await self._first_of(self._lines, call, request)

    async def canary(self, call: Call, request: OpenRequest) -> Reply | StreamReply | None:
        """Now and then an upstream's answer although all is well; mostly None."""
        chosen = [line for line in self._lines if line.upstream.canary_share > self._chance()]
        return await self._first_of(chosen[:1], call, request)

    async def close(self) -> None:
        """Close the connections."""
        for line in self._lines:
            await line.close()

    async def _first_of(self, lines: Sequence[_Line], call: Call, request: OpenRequest) -> Reply | StreamReply | None:
        for line in lines:
            if not line.allows():
                continue
            try:
                reply = await line.answer(call, request)
            except UpstreamFailed as failure:
                log.warning("fallback upstream failed", upstream=line.upstream.name, reason=str(failure))
                continue
            request.degraded(f"fallback={line.upstream.name}")
            request.figures.upstream = line.upstream.name
            return reply
        return None


class _Line:
    """The connections to one upstream and its breaker."""

    def __init__(
        self,
        upstream: Upstream,
        metrics: ResilienceMetrics,
        rules: BreakerRules,
        trace_headers: Callable[[], Mapping[str, str]],
    ) -> None:
        self.upstream = upstream
        self._metrics = metrics
        self._trace_headers = trace_headers
        self._breaker = Breaker(rules)
        self._client = httpx.AsyncClient(limits=httpx.Limits(max_connections=None), follow_redirects=False)
        self._show()

    def allows(self) -> bool:
        return self._breaker.allows(time.monotonic())

    async def close(self) -> None:
        await self._client.aclose()

    async def answer(self, call: Call, request: OpenRequest) -> Reply | StreamReply:
        """The upstream's answer, whole, or from its first byte on. Raises `UpstreamFailed`."""
        self._breaker = self._breaker.passed()
        upstream = self.upstream
        try:
            async with asyncio.timeout(
                upstream.first_byte_timeout_s if _streams(call) else upstream.whole_answer_timeout_s
            ):
                response = await self._client.send(self._request(call, request), stream=True)
                return await self._reply(response, request)
        except (httpx.HTTPError, TimeoutError) as error:
            self._note("failed", well=False)
            raise UpstreamFailed(str(error) or type(error).__name__) from error
        except UpstreamFailed:
            self._note("failed", well=False)
            raise
        except asyncio.CancelledError:
            self._breaker = self._breaker.abandoned()
            raise

    async def _reply(self, response: httpx.Response, request: OpenRequest) -> Reply | StreamReply:
        media_type = response.headers.get("content-type", "application/json")
        streams = response.status_code == httpx.codes.OK and media_type.startswith(_EVENT_STREAM)
        opened = False
        try:
            if response.status_code >= httpx.codes.BAD_REQUEST and response.status_code not in _PASSED_ON:
                raise UpstreamFailed(f"status {response.status_code}")
            chunks = response.aiter_raw()
            if streams:
                first = await anext(chunks, None)
                if first is None:
                    raise UpstreamFailed("an empty stream")
                opened = True
                frames = UpstreamFrames(first, chunks, response, self._ended)
                request.producing = True
                return StreamReply(frames, media_type, _never_refuses)
            body = b"".join([chunk async for chunk in chunks])
        finally:
            if not opened:
                await response.aclose()
        refused = response.status_code >= httpx.codes.BAD_REQUEST
        self._note("refused" if refused else "answered", well=True)
        return Reply(body, media_type, status=response.status_code)

    def _request(self, call: Call, request: OpenRequest) -> httpx.Request:
        headers = {
            "content-type": "application/json",
            "accept-encoding": "identity",  # so that frames are passed on as they come
            "x-request-id": request.request_id,
            **self._trace_headers(),
        }
        if self.upstream.api_key is not None:
            headers["authorization"] = f"Bearer {self.upstream.api_key}"
        url = self.upstream.url.rstrip("/") + call.route.removeprefix(_API_PREFIX)
        body = json.dumps(_mapped(call, self.upstream.models)).encode("utf-8", "backslashreplace")
        timeout = httpx.Timeout(
            self.upstream.idle_timeout_s if _streams(call) else None, connect=self.upstream.connect_timeout_s
        )
        return self._client.build_request("POST", url, headers=headers, content=body, timeout=timeout)

    def _ended(self, outcome: str) -> None:
        """A stream has ended: `answered`, `cut` by the upstream, or `left` by the client."""
        if outcome == "left":
            self._breaker = self._breaker.abandoned()
            self._metrics.fallback_request(self.upstream.name, outcome)
        else:
            self._note(outcome, well=outcome == "answered")

    def _note(self, outcome: str, *, well: bool) -> None:
        self._metrics.fallback_request(self.upstream.name, outcome)
        self._breaker = self._breaker.succeeded() if well else self._breaker.failed(time.monotonic())
        self._show()

    def _show(self) -> None:
        self._metrics.fallback_is(self.upstream.name, up=self._breaker.closed)


class UpstreamFrames:
    """An upstream's stream as it comes. An object and no generator: it is closed also if nobody ever reads it."""

    def __init__(
        self,
        first: bytes,
        rest: AsyncIterator[bytes],
        response: httpx.Response,
        ended: Callable[[str], None],
    ) -> None:
        self._first: bytes | None = first
        self._rest = rest
        self._response = response
        self._ended: Callable[[str], None] | None = ended

    def __aiter__(self) -> UpstreamFrames:
        return self

    async def __anext__(self) -> Frame:
        if self._first is not None:
            first, self._first = self._first, None
            return first
        try:
            return await anext(self._rest)
        except StopAsyncIteration:
            self._tell("answered")
            raise
        except httpx.HTTPError as error:
            self._tell("cut")
            raise UpstreamLost("The answer broke off. Please send the request again.") from error

    async def aclose(self) -> None:
        self._tell("left")
        await self._response.aclose()

    def _tell(self, outcome: str) -> None:
        """Tell how it ended, once."""
        if self._ended is not None:
            self._ended(outcome)
            self._ended = None


def _streams(call: Call) -> bool:
    return (call.body or {}).get("stream") is True


def _mapped(call: Call, models: Mapping[str, str]) -> dict[str, Any]:
    """The body for an upstream: its own name for the model, and no field that only we know."""
    body = dict(call.body or {})
    if call.route != _RESPONSES:
        for name in _OWN_FIELDS:
            body.pop(name, None)
    asked = body.get("model")
    theirs = models.get(asked if isinstance(asked, str) else "", models.get(_ANY_MODEL))
    return body if theirs is None else {**body, "model": theirs}


def _never_refuses(frame: Frame) -> Refusal | None:
    del frame
    return None
