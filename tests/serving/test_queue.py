import asyncio
import random

import pytest

from server.policy.forecast import Rates, Step
from server.policy.refusals import InvalidRequest, Overloaded
from tests.serving.fake_stack import FakeProgress, demand
from tests.serving.gate_bench import Bench, settle, until

pytestmark = pytest.mark.anyio


async def test_a_request_waits_for_a_place_and_is_told_how_long_it_did() -> None:
    bench = Bench(places=1)
    first, second = bench.request("a1"), bench.request("a2")
    one = bench.run(first)
    await settle()
    two = bench.run(second)
    await settle()
    assert bench.started == ["a1"]
    bench.finish("a1")
    bench.finish("a2")
    assert await one == await two == ["first", "last"]
    assert first.headers["x-queue-position"] == "0"
    assert second.headers["x-queue-position"] == "1"
    assert float(second.headers["x-queue-wait"]) >= 0
    assert bench.nothing_held
    assert bench.metric("tidegate_queue_wait_seconds_count", **{"class": "default"}) == 2


async def test_the_age_of_what_has_waited_longest_is_shown_by_class() -> None:
    bench = Bench(places=1)
    tasks = [bench.run(bench.request(name)) for name in ("a1", "a2")]
    await settle()
    await asyncio.sleep(0.05)
    tasks.append(bench.run(bench.request("a3")))
    await settle()
    assert bench.metric("tidegate_queue_age_seconds", **{"class": "default"}) >= 0.05
    assert bench.metric("tidegate_queue_age_seconds", **{"class": "critical"}) == 0
    for name in ("a1", "a2", "a3"):
        bench.finish(name)
    await asyncio.gather(*tasks)
    assert bench.metric("tidegate_queue_age_seconds", **{"class": "default"}) == 0


async def test_a_place_is_free_again_the_moment_a_request_ends() -> None:
    bench = Bench(places=2)
    tasks = [bench.run(bench.request(f"a{i}")) for i in range(6)]
    await settle()
    for i in range(6):
        assert bench.gate.admission.ledger.sequences <= 2
        bench.finish(f"a{i}")
        await settle()
    assert [await task for task in tasks] == [["first", "last"]] * 6
    assert bench.nothing_held


async def test_a_client_that_leaves_the_queue_leaves_nothing() -> None:
    bench = Bench(places=1)
    one, two = bench.run(bench.request("a1")), bench.run(bench.request("a2"))
    await settle()
    two.cancel()
    await asyncio.wait({two})
    assert bench.started == ["a1"]
    assert len(bench.gate.admission.backlog) == 0
    bench.finish("a1")
    await one
    assert bench.nothing_held


async def test_a_client_that_leaves_in_the_moment_it_is_let_in_gives_the_place_to_the_next() -> None:
    bench = Bench(places=1)
    tasks = [bench.run(bench.request(f"a{i}")) for i in range(3)]
    await settle()
    admission, held = bench.gate.admission, bench.gate.admission.ledger
    assert (len(held), len(admission.backlog)) == (1, 2)
    tasks[0].cancel()
    await until(lambda: len(admission.backlog) < 2)
    tasks[1].cancel()  # it has been granted the place, and has not had its turn yet
    await settle()
    assert "a1" not in bench.started
    assert bench.started == ["a0", "a2"]
    bench.finish("a2")
    await tasks[2]
    assert bench.nothing_held


@pytest.mark.parametrize("seed", range(8))
async def test_a_storm_of_disconnects_leaves_exactly_nothing(seed: int) -> None:
    chance = random.Random(seed)
    bench = Bench(places=3)
    tasks = []
    for i in range(60):
        name = chance.choice("abc") + str(i)
        opened = bench.request(name, chance.choice(("critical", "default", "batch")))
        tasks.append(bench.run(opened, silent=chance.random() < 0.5))
        for _ in range(chance.randrange(4)):
            await asyncio.sleep(0)
        leaving = chance.choice(tasks)
        if not leaving.cancelling():
            leaving.cancel()
        if chance.random() < 0.3:
            bench.finish(name)
    for task in tasks:
        if not task.cancelling():
            task.cancel()
        await asyncio.sleep(0)
    await asyncio.wait(tasks)
    assert len(bench.requests) == 0
    assert bench.nothing_held
    assert sorted(bench.started) == sorted(bench.ended)


async def test_a_request_that_expires_in_the_queue_is_refused_with_a_time_to_come_back() -> None:
    bench = Bench(places=1)
    one = bench.run(bench.request("a1"))
    await settle()
    bench.gate.admission.rates = Rates(residence_s=0.001, ended=100)  # it looks like a short wait
    two = bench.run(bench.request("a2", timeout_s=0.2))
    with pytest.raises(Overloaded) as refused:
        await asyncio.wait_for(two, 2)
    assert refused.value.retry_after_s is not None
    assert refused.value.retry_after_s >= 1
    assert "try again" in refused.value.message
    assert bench.metric("tidegate_overload_refusals_total", **{"class": "default", "where": "queue"}) == 1
    bench.finish("a1")
    await one
    assert bench.nothing_held


async def test_what_would_wait_too_long_is_refused_at_the_door_and_on_arrival() -> None:
    bench = Bench(places=1, ttft_slo_s=1)
    one = bench.run(bench.request("a1"))
    await settle()
    bench.gate.admission.rates = Rates(residence_s=60, ended=100)
    opened = bench.request("a2")
    with pytest.raises(Overloaded) as refused:
        bench.gate.knock(opened, 0)
    assert not refused.value.should_retry
    with pytest.raises(Overloaded):
        await bench.run(opened)
    assert bench.metric("tidegate_overload_refusals_total", **{"class": "default", "where": "door"}) == 1
    assert bench.metric("tidegate_overload_refusals_total", **{"class": "default", "where": "arrival"}) == 1
    bench.finish("a1")
    await one
    assert bench.nothing_held


async def test_more_answers_than_the_cache_holds_are_refused_with_the_numbers() -> None:
    bench = Bench()
    opened = bench.request("a1")
    opened.asked_max_tokens = 60_000
    asked = demand()
    object.__setattr__(asked, "max_tokens", 60_000)
    object.__setattr__(asked, "n", 2)
    with pytest.raises(InvalidRequest, match=r"2 answers of 60000 tokens.*100000") as refused:
        async with bench.gate.slot(opened, asked):
            pass
    assert refused.value.param == "n"


async def test_a_tenant_is_charged_what_was_really_used() -> None:
    bench = Bench()
    bench.finish("a1")
    opened = bench.request("a1")
    async with bench.requests.open(opened):
        asked = demand(7, FakeProgress(completion_tokens=5, cached_tokens=4))
        async for _ in bench.generation.generate(asked, lambda: bench.outputs("a1", False)):
            pass
    assert bench.gate.admission.counters["a"] == 3 + 2 * 5


async def test_a_pause_after_a_client_has_left_is_no_time_that_a_prompt_took() -> None:
    """The engine does not tell of it, so its next step seems to have taken so long."""
    bench = Bench()
    left = bench.run(bench.request("a1"))
    await settle()
    bench.gate.stepped(Step(1, 0, 0.1, prefilling=True, duration_s=0.01))
    left.cancel()
    await settle()
    stayed = bench.run(bench.request("a2"))
    await settle()
    bench.gate.stepped(Step(1, 0, 0.1, prefilling=True, prefilled_tokens=1000, generated_tokens=1, duration_s=600.0))
    rate = bench.gate.admission.rates.prefill_tokens_per_s(None)
    assert rate == 0 or rate > 1000
    assert bench.gate.admission.rates.decode_tokens_per_s > 0.02
    bench.finish("a2")
    await stayed


async def test_without_an_engine_requests_wait_for_the_next_one() -> None:
    bench = Bench()
    bench.gate.close()
    task = bench.run(bench.request("a1"))
    await settle()
    assert bench.started == []
    bench.open()
    bench.finish("a1")
    assert await task == ["first", "last"]


async def test_the_page_shows_what_waits_and_what_is_promised() -> None:
    bench = Bench(places=1)
    tasks = [bench.run(bench.request(f"a{i}", "batch" if i else "default")) for i in range(3)]
    await settle()
    assert bench.metric("tidegate_requests_waiting", **{"class": "batch"}) == 2
    assert bench.metric("tidegate_requests_running", **{"class": "default"}) == 1
    assert bench.metric("tidegate_kv_reserved_tokens") > 0
    assert bench.metric("tidegate_kv_capacity_tokens") == 100_000
    for i in range(3):
        bench.finish(f"a{i}")
    await asyncio.gather(*tasks)
    assert bench.metric("tidegate_kv_reserved_tokens") == 0


async def test_the_time_without_an_engine_counts_against_nobodys_deadline() -> None:
    bench = Bench(places=1, ttft_slo_s=0.3)
    bench.gate.close()
    task = bench.run(bench.request("a1"))
    await asyncio.sleep(0.5)
    assert not task.done()
    bench.open()
    bench.finish("a1")
    assert await task == ["first", "last"]
