"""The story of a charge, on a real Redis."""

import asyncio
import gc
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from redis.asyncio import Redis

from server.engine.calls import Call
from server.policy.bodies import MaxTokensDefaults
from server.policy.limits import Cost, standings
from server.policy.refusals import CostAboveLimit, Overloaded, RateLimited
from server.policy.tenants import ANYONE, Limits, Tenant
from server.serving.charging import Charging, Pricing, scopes_of
from server.serving.generation import Generation
from server.serving.requests import OpenRequest, OpenRequests
from server.serving.service import BodyRules, Service
from server.store.connection import connect
from server.store.limit_script import LimitScript
from server.store.limiter import Charge, Limiter
from server.store.redis_server import EmbeddedRedis
from server.store.usage import TokenCounts, UsageBook
from server.telemetry.metrics import Metrics
from server.telemetry.requests import RequestFigures
from server.telemetry.tenants import KINDS
from tests.serving.fake_stack import (
    FakeProgress,
    FakeStack,
    RecordingOperation,
    demand,
    new_fitter,
    new_gate,
    new_guards,
    open_demand,
    slot_with,
)
from tests.store.running_redis import running_redis, until

pytestmark = pytest.mark.anyio

TEAM = Tenant("team", limits=Limits(requests_per_minute=5, tokens_per_day=1000))


@pytest.fixture(scope="module")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with running_redis(tmp_path_factory.mktemp("redis")) as embedded:
        yield embedded


class Parts:
    def __init__(self, redis: Redis, pricing: Pricing) -> None:
        self.redis = redis
        self.limiter = Limiter(LimitScript(redis), "a-replica")
        self.registry = CollectorRegistry()
        self.metrics = Metrics(self.registry)
        self.charging = Charging(self.limiter, "a-replica", pricing, self.metrics)
        self.generation = Generation(new_fitter(), new_gate(), self.charging)

    async def left(self, tenant: Tenant = TEAM) -> dict[str, int]:
        """What is left of each rate, when every settle has arrived."""
        await until(lambda: self.limiter.untold == 0)
        scopes = scopes_of(tenant, None)
        verdict = await self.limiter.charge(Charge(scopes, Cost()))
        return {one.rate.unit: one.remaining for one in standings(verdict.moments[0], scopes[0].limits, verdict.now_us)}


@asynccontextmanager
async def parts(embedded: EmbeddedRedis, pricing: Pricing | None = None) -> AsyncIterator[Parts]:
    redis: Redis = Redis.from_url(embedded.url)
    async with aclosing(redis):
        await redis.flushall()
        yield Parts(redis, pricing or Pricing())


def request(tenant: Tenant = TEAM, **given: Any) -> OpenRequest:
    return OpenRequest("a", "/v1/chat/completions", tenant=tenant, model_name="m", asked_max_tokens=16, **given)


def saying(*words: str, then: Exception | None = None) -> Any:
    async def outputs() -> AsyncGenerator[str, None]:
        for word in words:
            yield word
        if then is not None:
            raise then

    return outputs


async def run(parts: Parts, opened: OpenRequest, *demands: Any) -> None:
    async with OpenRequests().open(opened):
        for one in demands:
            async for _ in parts.generation.generate(one, saying("a", "b")):
                pass


async def test_a_request_is_charged_what_it_used_and_one_request(embedded: EmbeddedRedis) -> None:
    async with parts(embedded) as p:
        await run(p, request(), demand(100, FakeProgress(completion_tokens=5)))
        assert await p.left() == {"requests": 4, "tokens": 895}
        book = UsageBook(p.redis)
        assert (await book.read("team")).day == {"m": TokenCounts(1, 100, 0, 5)}


async def test_what_it_used_is_in_the_metrics_and_in_its_own_figures(embedded: EmbeddedRedis) -> None:
    async with parts(embedded) as p:
        await run(p, opened := request(), demand(100, FakeProgress(completion_tokens=5, cached_tokens=64)))
        await run(p, request(ANYONE), demand(7, FakeProgress(completion_tokens=1)))
        await run(p, request(of_batch=True), demand(3, FakeProgress(completion_tokens=2)))
        await run(p, request(ANYONE), demand(1000, FakeProgress(in_engine=False)))
        total = p.metrics.tenants.tokens
        assert [total("team", "online", kind) for kind in KINDS] == [100, 64, 5]
        assert [total("anyone", "online", kind) for kind in KINDS] == [7, 0, 1]
        assert [total("team", "batch", kind) for kind in KINDS] == [3, 0, 2]
        figures = opened.figures
        assert (figures.cached_tokens, figures.completion_tokens, figures.sequences) == (64, 5, 1)
        assert figures.queue_wait_s is not None


async def test_an_attempt_that_starts_over_leaves_none_of_its_figures(embedded: EmbeddedRedis) -> None:
    async with parts(embedded) as p, OpenRequests().open(opened := request()):
        outputs = p.generation.generate(demand(100, FakeProgress(completion_tokens=5)), saying("a", "b"))
        await anext(outputs)
        await opened.start_over()
        assert opened.figures == RequestFigures()
        assert p.metrics.tenants.tokens("team", "online", "completion") == 5  # the engine did that work all the same
        await outputs.aclose()


async def test_while_it_runs_its_whole_answer_is_reserved(embedded: EmbeddedRedis) -> None:
    async with parts(embedded) as p, OpenRequests().open(opened := request()):
        outputs = p.generation.generate(demand(100), saying("a", "b"))
        await anext(outputs)
        assert opened.headers["x-ratelimit-remaining-tokens"] == "884"
        assert opened.headers["x-ratelimit-limit-requests"] == "5"
        assert (await p.left())["tokens"] == 884
        await outputs.aclose()
        assert (await p.left())["tokens"] == 900


async def test_a_stream_that_is_left_is_settled_when_its_request_is_closed(embedded: EmbeddedRedis) -> None:
    """vLLM does not close its generators when a stream is left early."""
    async with parts(embedded) as p:
        async with OpenRequests().open(request()):
            outputs = p.generation.generate(demand(100, FakeProgress(completion_tokens=1)), saying("a", "b"))
            await anext(outputs)
        assert await p.left() == {"requests": 4, "tokens": 899}
        del outputs
        gc.collect()
        await asyncio.sleep(0.01)
        assert await p.left() == {"requests": 4, "tokens": 899}


async def test_several_prompts_are_one_request_and_each_its_tokens(embedded: EmbeddedRedis) -> None:
    async with parts(embedded) as p:
        await run(p, request(), demand(10), demand(20), demand(30))
        assert await p.left() == {"requests": 4, "tokens": 940}


async def test_prompts_side_by_side_need_one_place(embedded: EmbeddedRedis) -> None:
    tenant = replace(TEAM, limits=Limits(concurrency=1))
    async with parts(embedded) as p, OpenRequests().open(request(tenant)):
        both = [p.generation.generate(demand(), saying("a", "b")) for _ in range(2)]
        assert await asyncio.gather(*(anext(outputs) for outputs in both)) == ["a", "a"]
        with pytest.raises(RateLimited, match="1 request at the same time"):
            await run(p, request(tenant), demand())  # another client
        for outputs in both:
            await outputs.aclose()


async def test_a_place_is_free_again_when_its_request_is_over(embedded: EmbeddedRedis) -> None:
    tenant = replace(TEAM, limits=Limits(concurrency=1))
    async with parts(embedded) as p:
        for _ in range(5):
            await run(p, request(tenant), demand(), demand())


async def test_what_the_engine_never_had_costs_nothing(embedded: EmbeddedRedis) -> None:
    async with parts(embedded) as p:
        async with OpenRequests().open(request()):
            refused = demand(100, FakeProgress(in_engine=False))
            with pytest.raises(Overloaded):
                await anext(p.generation.generate(refused, saying(then=Overloaded("No room."))))
        assert await p.left() == {"requests": 5, "tokens": 1000}
        assert (await UsageBook(p.redis).read("team")).day == {}


async def test_cached_prompt_tokens_cost_what_the_operator_says(embedded: EmbeddedRedis) -> None:
    async with parts(embedded, Pricing(cached_token_price=0.5)) as p:
        await run(p, request(), demand(100, FakeProgress(cached_tokens=60, completion_tokens=10)))
        assert (await p.left())["tokens"] == 1000 - 40 - 30 - 10


async def test_an_answer_of_open_length_reserves_little_and_pays_the_rest_afterwards(embedded: EmbeddedRedis) -> None:
    async with parts(embedded, Pricing(open_reserve_tokens=50)) as p:
        opened = replace(request(), asked_max_tokens=None)
        async with OpenRequests().open(opened):
            whole_window = open_demand(100, FakeProgress(completion_tokens=700))
            outputs = p.generation.generate(whole_window, saying("a", "b"))
            await anext(outputs)
            assert opened.headers["x-ratelimit-remaining-tokens"] == "850"
            await outputs.aclose()
        assert (await p.left())["tokens"] == 200


async def test_an_answer_of_open_length_is_not_refused_for_what_it_might_have_asked(embedded: EmbeddedRedis) -> None:
    async with parts(embedded) as p:
        opened = replace(request(), asked_max_tokens=None)
        await run(p, opened, open_demand(100, FakeProgress(completion_tokens=5)))
        assert (await p.left())["tokens"] == 895


async def test_a_refusal_says_which_limit_and_when_and_leaves_no_trace(embedded: EmbeddedRedis) -> None:
    async with parts(embedded) as p:
        await run(p, request(), demand(900))
        opened = request()
        with pytest.raises(RateLimited, match="Your team has reached the limit of 1,000 tokens per day") as refused:
            await run(p, opened, demand(200))
        assert refused.value.retry_after_s == pytest.approx(116 * 86.4, rel=0.01)
        assert opened.headers["x-ratelimit-remaining-tokens"] == "100"
        assert await p.left() == {"requests": 4, "tokens": 100}
        assert p.registry.get_sample_value("tidegate_limit_refusals_total", {"limit": "tokens_per_day"}) == 1


async def test_a_cost_above_the_limit_is_no_matter_of_waiting(embedded: EmbeddedRedis) -> None:
    async with parts(embedded) as p:
        with pytest.raises(CostAboveLimit, match=r"needs 1,016 tokens .* limit of 1,000 tokens per day"):
            await run(p, request(), demand(1000))
        assert await p.left() == {"requests": 5, "tokens": 1000}


async def test_an_end_user_is_held_to_their_own_limit_and_the_team_to_its(embedded: EmbeddedRedis) -> None:
    tenant = replace(TEAM, trusted=True, end_user_limits=Limits(tokens_per_day=150))
    async with parts(embedded) as p:
        await run(p, request(tenant, end_user="ann"), demand(100))
        with pytest.raises(RateLimited, match="You have reached the limit of 150"):
            await run(p, request(tenant, end_user="ann"), demand(100))
        await run(p, request(tenant, end_user="bob"), demand(100))
        assert (await p.left())["tokens"] == 800


async def test_work_that_goes_on_after_its_answer_is_charged_to_the_same_tenant(embedded: EmbeddedRedis) -> None:
    async with parts(embedded) as p:
        opened = request(detached=True)
        async with OpenRequests().open(opened):
            outputs = p.generation.generate(demand(100), saying("a", "b"))
            await anext(outputs)
        assert (await p.left())["tokens"] == 884
        await outputs.aclose()
        assert (await p.left())["tokens"] == 900


async def test_whoever_was_refused_a_moment_ago_is_refused_without_redis_or_tokens(
    embedded: EmbeddedRedis, tmp_path: Path
) -> None:
    operation = RecordingOperation()
    stack = FakeStack({("POST", "/v1/chat/completions"): operation})
    tenant = replace(TEAM, limits=Limits(requests_per_minute=1, tokens_per_minute=1000))
    async with parts(embedded) as p:
        rules = BodyRules(frozenset(), MaxTokensDefaults())
        slot = slot_with(stack)
        guards = replace(new_guards(slot), charging=p.charging)
        service = Service(slot, OpenRequests(), rules, new_fitter(), guards)
        await run(p, request(tenant), demand(10))
        with pytest.raises(RateLimited):
            await run(p, request(tenant), demand(10))
        nobody = Limiter(LimitScript(connect(f"unix://{tmp_path}/nobody")), "a-replica")
        p.charging._limiter = nobody  # whoever asks Redis now would get another answer
        opened = request(tenant)
        with pytest.raises(RateLimited) as refused:
            await service.answer(Call("POST", "/v1/chat/completions", body={"messages": [], "max_tokens": 5}), opened)
        assert refused.value.retry_after_s == pytest.approx(60, abs=2)
        assert opened.headers["x-ratelimit-remaining-requests"] == "0"
        assert operation.calls == []
        await service.answer(
            Call("POST", "/v1/chat/completions", body={"messages": []}),
            request(Tenant("another team", limits=TEAM.limits)),
        )
        assert len(operation.calls) == 1


async def test_a_refusal_for_many_tokens_keeps_nobody_out_who_asks_for_few(embedded: EmbeddedRedis) -> None:
    async with parts(embedded) as p:
        await run(p, request(), demand(900))
        with pytest.raises(RateLimited):
            await run(p, request(), demand(500))
        p.charging.check(request())
        with pytest.raises(RateLimited):
            p.charging.check(replace(request(), asked_max_tokens=101))


async def test_without_redis_the_answer_says_that_limits_are_local(tmp_path: Path) -> None:
    p = Parts(Redis.from_url(f"unix://{tmp_path}/nobody", retry=None), Pricing())
    for _ in range(4):
        await run(p, opened := request(), demand(10))
    assert opened.headers["x-ratelimit-mode"] == "local"
    assert p.charging.mode == "local"
    assert p.registry.get_sample_value("tidegate_limits_local") == 1


async def test_anyone_is_served_without_a_word_to_redis(tmp_path: Path) -> None:
    p = Parts(Redis.from_url(f"unix://{tmp_path}/nobody"), Pricing())
    for _ in range(5):
        await run(p, opened := OpenRequest("a", "/"), demand(10))
    assert not any(name.startswith("x-ratelimit") for name in opened.headers)
    assert (p.limiter.untold, p.charging.mode) == (0, "redis")


async def test_a_tenant_without_limits_has_its_usage_kept(embedded: EmbeddedRedis) -> None:
    async with parts(embedded) as p:
        await run(p, opened := request(Tenant("free")), demand(10, FakeProgress(completion_tokens=2)))
        await until(lambda: p.limiter.untold == 0)
        assert not any(name.startswith("x-ratelimit") for name in opened.headers)
        assert (await UsageBook(p.redis).read("free", datetime.now(UTC))).month == {"m": TokenCounts(1, 10, 0, 2)}
