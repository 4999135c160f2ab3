"""The fallback upstreams, against an upstream of our own that fails in every way."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from server.engine.calls import Call, Reply, StreamReply
from server.policy.breaker import BreakerRules
from server.policy.refusals import UpstreamLost
from server.serving.fallback import Fallback, Upstream
from server.serving.requests import OpenRequest
from server.telemetry.resilience import ResilienceMetrics
from tests.serving.fault_proxy import FRAMES, WHOLE, Fault, FaultProxy

pytestmark = pytest.mark.anyio

CHAT = "/v1/chat/completions"
TIMEOUTS = {"connect_timeout_s": 0.5, "first_byte_timeout_s": 0.3, "idle_timeout_s": 0.3, "whole_answer_timeout_s": 0.3}


def call(stream: bool = True, **body: Any) -> Call:
    return Call("POST", CHAT, body={"model": "ours", "messages": [], "stream": stream, **body})


def request() -> OpenRequest:
    return OpenRequest(request_id="id-1", path=CHAT)


@asynccontextmanager
async def upstreams(
    *proxies: FaultProxy, chance: Callable[[], float] = lambda: 0.5, **fields: Any
) -> AsyncIterator[Fallback]:
    """A fallback onto these proxies, named a, b, c in their order."""
    async with AsyncExitStack() as running:
        for proxy in proxies:
            await running.enter_async_context(proxy.running())
        chosen = [
            Upstream(name=name, url=proxy.url, **{**TIMEOUTS, **fields})
            for name, proxy in zip("abc", proxies, strict=False)
        ]
        fallback = Fallback(chosen, ResilienceMetrics(CollectorRegistry()), chance, BreakerRules(3, 0.1, 1.0))
        yield fallback
        await fallback.close()


async def frames_of(reply: Reply | StreamReply | None) -> bytes:
    assert isinstance(reply, StreamReply)
    frames = [frame async for frame in reply.frames]
    await reply.frames.aclose()
    return b"".join(frame for frame in frames if isinstance(frame, bytes))


async def test_a_stream_passes_through_byte_for_byte() -> None:
    opened = request()
    async with upstreams(FaultProxy()) as fallback:
        reply = await fallback.answer(call(), opened)
        assert opened.producing
        assert await frames_of(reply) == b"".join(FRAMES)
    assert opened.headers["x-degradation-applied"] == "fallback=a"


async def test_frames_are_passed_on_as_they_come() -> None:
    async with upstreams(FaultProxy()) as fallback:
        reply = await fallback.answer(call(), request())
        assert isinstance(reply, StreamReply)
        assert await anext(reply.frames) == FRAMES[0]
        await reply.frames.aclose()


async def test_a_whole_answer_passes_through_byte_for_byte() -> None:
    async with upstreams(FaultProxy()) as fallback:
        reply = await fallback.answer(call(stream=False), request())
    assert isinstance(reply, Reply)
    assert (reply.body, reply.status, reply.media_type) == (WHOLE, 200, "application/json")


async def test_the_upstream_is_asked_with_its_own_key_and_its_own_name_for_the_model() -> None:
    proxy = FaultProxy()
    async with upstreams(proxy, api_key="their-key", models={"ours": "theirs", "*": "any"}) as fallback:
        await fallback.answer(call(stream=False, truncation="auto"), request())
        await fallback.answer(Call("POST", CHAT, body={"messages": []}), request())
    (path, headers, body), (_, _, unnamed) = proxy.seen
    assert path == "/v1/chat/completions"
    assert headers["authorization"] == "Bearer their-key"
    assert headers["x-request-id"] == "id-1"
    assert body == {"model": "theirs", "messages": [], "stream": False}
    assert unnamed["model"] == "any"


async def test_the_upstream_gets_the_trace_and_the_figures_its_name() -> None:
    proxy, headers = FaultProxy(), {"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"}
    async with proxy.running():
        metrics, only = ResilienceMetrics(CollectorRegistry()), Upstream(name="a", url=proxy.url)
        fallback = Fallback([only], metrics, lambda: 0.5, trace_headers=lambda: headers)
        await fallback.answer(call(stream=False), opened := request())
        await fallback.close()
    ((_, seen, _),) = proxy.seen
    assert seen["traceparent"] == headers["traceparent"]
    assert opened.figures.upstream == "a"


async def test_a_clients_own_key_is_not_given_away() -> None:
    proxy = FaultProxy()
    async with upstreams(proxy) as fallback:
        asked = Call("POST", CHAT, ((b"authorization", b"Bearer secret"), (b"x-api-key", b"secret")), body={})
        await fallback.answer(asked, request())
    assert "secret" not in str(proxy.seen)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("fault", ["refuse", "hang", "status"])
async def test_a_failure_before_the_first_byte_goes_to_the_next_upstream(fault: Fault, stream: bool) -> None:
    async with upstreams(FaultProxy(fault), FaultProxy(), whole_answer_timeout_s=0.5) as fallback:
        opened = request()
        reply = await fallback.answer(call(stream), opened)
        assert reply is not None
        assert opened.headers["x-degradation-applied"] == "fallback=b"
        if isinstance(reply, StreamReply):
            assert await frames_of(reply) == b"".join(FRAMES)


@pytest.mark.parametrize(("fault", "stream"), [("empty", True), ("cut_whole", False)])
async def test_an_answer_that_never_begins_or_is_cut_before_it_was_passed_on_goes_to_the_next(
    fault: Fault, stream: bool
) -> None:
    async with upstreams(FaultProxy(fault), FaultProxy()) as fallback:
        assert await fallback.answer(call(stream), request()) is not None


async def test_when_all_upstreams_fail_there_is_no_answer() -> None:
    async with upstreams(FaultProxy("refuse"), FaultProxy("status", status=429)) as fallback:
        assert await fallback.answer(call(), request()) is None


@pytest.mark.parametrize("status", [400, 413, 422])
async def test_what_the_client_did_wrong_is_passed_on(status: int) -> None:
    second = FaultProxy()
    async with upstreams(FaultProxy("status", status=status), second) as fallback:
        reply = await fallback.answer(call(), request())
    assert isinstance(reply, Reply)
    assert (reply.status, b"their words" in reply.body) == (status, True)
    assert second.seen == []


@pytest.mark.parametrize("fault", ["cut", "hang_midway"])
async def test_a_failure_after_the_first_byte_ends_the_stream_with_a_refusal(fault: Fault) -> None:
    second = FaultProxy()
    async with upstreams(FaultProxy(fault), second) as fallback:
        reply = await fallback.answer(call(), request())
        assert isinstance(reply, StreamReply)
        assert await anext(reply.frames) == FRAMES[0]
        with pytest.raises(UpstreamLost):
            await anext(reply.frames)
        await reply.frames.aclose()
    assert second.seen == []


async def test_an_upstream_that_fails_is_left_out_for_a_while() -> None:
    broken, good = FaultProxy("status"), FaultProxy()
    async with upstreams(broken, good) as fallback:
        for _ in range(6):
            await fallback.answer(call(stream=False), request())
        assert len(broken.seen) == 3
        await asyncio.sleep(0.15)
        broken.fault = "none"
        opened = request()
        await fallback.answer(call(stream=False), opened)
        assert opened.headers["x-degradation-applied"] == "fallback=a"
    assert len(good.seen) == 6


@pytest.mark.parametrize("reads_first", [True, False])
async def test_a_client_that_leaves_frees_the_upstream(reads_first: bool) -> None:
    proxy = FaultProxy("hang_midway")
    async with upstreams(proxy, first_byte_timeout_s=60, idle_timeout_s=60) as fallback:
        reply = await fallback.answer(call(), request())
        assert isinstance(reply, StreamReply)
        if reads_first:
            await anext(reply.frames)
        await reply.frames.aclose()
        await until(lambda: proxy.open_connections == 0)


async def test_a_client_that_leaves_before_the_first_byte_frees_the_upstream() -> None:
    proxy = FaultProxy("hang")
    async with upstreams(proxy, first_byte_timeout_s=60) as fallback:
        asking = asyncio.create_task(fallback.answer(call(), request()))
        await until(lambda: bool(proxy.seen))
        asking.cancel()
        await asyncio.wait({asking})
        assert asking.cancelled()
        await until(lambda: proxy.open_connections == 0)


@pytest.mark.parametrize(("draws", "asked"), [([0.0, 0.5, 0.009, 0.011], 2), ([0.9] * 4, 0)])
async def test_a_share_of_the_calls_goes_there_although_all_is_well(draws: Sequence[float], asked: int) -> None:
    proxy, drawn = FaultProxy(), iter(draws)
    async with upstreams(proxy, chance=lambda: next(drawn), canary_share=0.01) as fallback:
        replies = [await fallback.canary(call(stream=False), request()) for _ in draws]
    assert len(proxy.seen) == asked == sum(reply is not None for reply in replies)


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(3):
        while not holds():  # noqa: ASYNC110  # nothing tells when a connection is gone
            await asyncio.sleep(0.01)
