"""The levels' effects on calls, through the service."""

import json
from typing import Any

import pytest

from server.engine.calls import Call, Reply, StreamReply
from server.policy.bodies import MaxTokensDefaults
from server.policy.ladder import LadderRules, Level, Pin
from server.policy.refusals import Closed, NotDegraded, Overloaded
from server.policy.tenants import Tenant
from server.serving.engine_slot import EngineSlot
from server.serving.fallback import Upstream
from server.serving.ladder import LadderWatch, LocalPins
from server.serving.requests import OpenRequest, OpenRequests
from server.serving.service import BodyRules, Service
from tests.serving.fake_stack import FakeStack, RecordingOperation, new_fitter, new_guards, slot_with
from tests.serving.fault_proxy import WHOLE, FaultProxy

pytestmark = pytest.mark.anyio

CHAT = "/v1/chat/completions"
BATCH_TEAM = Tenant("nightly", traffic_class="batch")


class Desk:
    """A service at a level, with one operation on every route asked for."""

    def __init__(self, slot: EngineSlot | None = None, **resilience: Any) -> None:
        self.operation = RecordingOperation()
        routes = (CHAT, "/tokenize", "/v1/embeddings")
        self.stack = FakeStack({("POST", route): self.operation for route in routes})
        self.slot = slot or slot_with(self.stack)
        self._pins = LocalPins()
        parts = new_guards(self.slot, pins=self._pins, restart_wait_s=0.01, **resilience)
        assert isinstance(parts.degradation.ladder, LadderWatch)
        self.ladder = parts.degradation.ladder
        rules = BodyRules(frozenset(), MaxTokensDefaults())
        self._service = Service(self.slot, OpenRequests(), rules, new_fitter(), parts)

    async def at(self, level: Level) -> "Desk":
        await self._pins.write(Pin(level, "a test", "the test", 60))
        await self.ladder.look()
        return self

    async def ask(
        self, body: dict[str, Any], route: str = CHAT, wish: str | None = None, tenant: Tenant | None = None
    ) -> tuple[Reply | StreamReply, OpenRequest]:
        opened = OpenRequest("id-1", route) if tenant is None else OpenRequest("id-1", route, tenant)
        headers = () if wish is None else ((b"x-degradation", wish.encode()),)
        return await self._service.answer(Call("POST", route, headers, body=body), opened), opened

    @property
    def seen(self) -> dict[str, Any] | None:
        return self.operation.calls[-1].body


async def test_at_level_zero_nothing_changes_and_nothing_is_said() -> None:
    desk = await Desk().at(Level.NORMAL)
    _, opened = await desk.ask({"messages": [], "n": 3})
    assert desk.seen == {"messages": [], "n": 3}
    assert opened.headers == {}


async def test_level_one_shortens_the_answer_and_says_so() -> None:
    desk = await Desk().at(Level.ECONOMY)
    _, opened = await desk.ask({"messages": [], "n": 3})
    assert desk.seen == {"messages": [], "n": 1, "max_completion_tokens": 512}
    assert opened.headers == {"x-degradation-level": "1", "x-degradation-applied": "max_tokens=512,n=1"}
    assert opened.context_factor == 1.0


async def test_level_two_halves_the_context_too() -> None:
    desk = await Desk().at(Level.SHORT_CONTEXT)
    _, opened = await desk.ask({"messages": [], "max_tokens": 9})
    assert opened.context_factor == 0.5
    assert opened.headers == {"x-degradation-level": "2"}


async def test_level_three_takes_no_batch_work() -> None:
    desk = await Desk().at(Level.ESSENTIAL)
    with pytest.raises(Overloaded) as refused:
        await desk.ask({"messages": []}, tenant=BATCH_TEAM)
    assert refused.value.retry_after_s is not None
    await desk.ask({"messages": []})
    await (await desk.at(Level.SHORT_CONTEXT)).ask({"messages": []}, tenant=BATCH_TEAM)


async def test_level_five_refuses_with_a_time_to_come_back() -> None:
    desk = await Desk().at(Level.CLOSED)
    with pytest.raises(Closed) as refused:
        await desk.ask({"messages": []})
    assert refused.value.retry_after_s is not None
    assert desk.operation.calls == []


async def test_what_costs_next_to_nothing_is_answered_at_every_level() -> None:
    desk = await Desk().at(Level.CLOSED)
    await desk.ask({"prompt": "hi"}, "/tokenize")
    assert len(desk.operation.calls) == 1


async def test_a_client_that_wants_no_degraded_answer_is_refused_rather_than_cut_short() -> None:
    desk = await Desk().at(Level.ECONOMY)
    with pytest.raises(NotDegraded):
        await desk.ask({"messages": []}, wish="none")
    _, opened = await desk.ask({"messages": [], "max_tokens": 9}, wish="none")  # nothing would be taken from it
    assert opened.headers == {"x-degradation-level": "1"}


async def test_pooling_is_refused_at_level_five_and_unchanged_below() -> None:
    desk = await Desk().at(Level.FALLBACK)
    await desk.ask({"input": "hi"}, "/v1/embeddings")
    assert desk.seen == {"input": "hi"}
    with pytest.raises(Closed):
        await (await desk.at(Level.CLOSED)).ask({"input": "hi"}, "/v1/embeddings")


async def test_the_canned_reply_is_for_those_who_take_one() -> None:
    desk = await Desk(canned_reply="We are closed today.").at(Level.CLOSED)
    reply, opened = await desk.ask({"messages": [], "model": "m"}, wish="canned")
    assert isinstance(reply, Reply)
    answer = json.loads(reply.body)
    assert answer["choices"][0]["message"] == {"role": "assistant", "content": "We are closed today."}
    assert opened.headers == {"x-degradation-level": "5", "x-degradation-applied": "canned_reply"}
    with pytest.raises(Closed):
        await desk.ask({"messages": []})
    with pytest.raises(Closed):
        await desk.ask({"input": "hi"}, "/v1/embeddings", wish="canned")


async def test_the_canned_reply_streams_where_a_stream_is_asked_for() -> None:
    desk = await Desk(canned_reply="Closed.").at(Level.CLOSED)
    reply, opened = await desk.ask({"messages": [], "stream": True}, wish="canned")
    assert isinstance(reply, StreamReply)
    frames = [str(frame) async for frame in reply.frames]
    assert json.loads(frames[0].removeprefix("data: "))["choices"][0]["delta"]["content"] == "Closed."
    assert frames[-1] == "data: [DONE]\n\n"
    assert opened.producing


async def test_without_a_canned_reply_nobody_gets_one() -> None:
    desk = await Desk().at(Level.CLOSED)
    with pytest.raises(Closed):
        await desk.ask({"messages": []}, wish="canned")


async def test_at_level_four_calls_go_to_the_fallback() -> None:
    proxy = FaultProxy()
    async with proxy.running():
        desk = await Desk(upstreams=[Upstream("other", proxy.url)]).at(Level.FALLBACK)
        reply, opened = await desk.ask({"messages": [], "max_tokens": 9})
        assert isinstance(reply, Reply)
        assert reply.body == WHOLE
        assert opened.headers == {"x-degradation-level": "4", "x-degradation-applied": "fallback=other"}
        assert desk.operation.calls == []
        await desk.ask({"prompt": "hi"}, "/tokenize")  # an upstream knows nothing of our tokens
        assert len(desk.operation.calls) == 1


async def test_at_level_four_a_client_that_wants_no_degraded_answer_is_refused() -> None:
    desk = await Desk(upstreams=[Upstream("other", "http://127.0.0.1:9/v1")]).at(Level.FALLBACK)
    with pytest.raises(NotDegraded):
        await desk.ask({"messages": [], "max_tokens": 9}, wish="none")


async def test_at_a_pinned_level_four_with_no_upstream_left_the_server_is_overloaded() -> None:
    desk = await Desk(upstreams=[Upstream("other", "http://127.0.0.1:9/v1")]).at(Level.FALLBACK)
    with pytest.raises(Overloaded):
        await desk.ask({"messages": [], "max_tokens": 9})


async def test_under_pressure_with_no_upstream_left_the_engine_takes_what_it_can() -> None:
    upstreams = [Upstream("other", "http://127.0.0.1:9/v1")]
    desk = Desk(upstreams=upstreams, pressure=lambda: 9.0, rules=LadderRules(Level.FALLBACK, up_after_s=0, dwell_s=0))
    while desk.ladder.level < Level.FALLBACK:
        await desk.ladder.look()
    await desk.ask({"messages": [], "max_tokens": 9})
    assert len(desk.operation.calls) == 1


async def test_while_the_engine_is_down_the_fallback_answers() -> None:
    proxy = FaultProxy()
    async with proxy.running():
        desk = Desk(upstreams=[Upstream("other", proxy.url)])
        desk.stack.alive = False
        reply, opened = await desk.ask({"messages": [], "max_tokens": 9})
        assert isinstance(reply, Reply)
        assert reply.body == WHOLE
        assert opened.headers["x-degradation-level"] == "4"
