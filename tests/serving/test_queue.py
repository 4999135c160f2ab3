import asyncio
import random
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field

import pytest
from prometheus_client import CollectorRegistry

from server.policy.admission import Admission
from server.policy.objectives import Objectives, Unloaded
from server.policy.refusals import InvalidRequest, Overloaded
from server.policy.reservations import Capacity
from server.policy.running_cap import RunningCap
from server.policy.tenants import Tenant, TrafficClass
from server.policy.terms import Terms
from server.serving.generation import Generation
from server.serving.queue import Gate, Surroundings
from server.serving.requests import OpenRequest, OpenRequests
from server.telemetry.admission import AdmissionMetrics
from tests.serving.fake_stack import FakeProgress, demand, new_charging, new_fitter

pytestmark = pytest.mark.anyio

UNLOADED = Unloaded(ttft_s=0.1, tpot_s=0.03, prefill_tokens_per_s=10_000)


@dataclass
class Bench:
    """A gate with so many places, and engine requests that run until the test ends them."""

    places: int = 1
    ttft_slo_s: float = 30.0
    registry: CollectorRegistry = field(default_factory=CollectorRegistry)
    requests: OpenRequests = field(default_factory=OpenRequests)
    started: list[str] = field(default_factory=list)
    ended: list[str] = field(default_factory=list)
    go_on: dict[str, asyncio.Event] = field(default_factory=dict)

    def __post_init__(self) -> None:
        admission = Admission(Objectives({"default": self.ttft_slo_s, "critical": self.ttft_slo_s}))
        self.gate = Gate(admission, AdmissionMetrics(self.registry), Surroundings(jitter=lambda: 0.5))
        self.open()
        self.generation = Generation(new_fitter(), self.gate, new_charging())

    def open(self) -> None:
        self.gate.open(Capacity(100_000, 16, self.places), UNLOADED)
        self.gate.admission.cap = RunningCap(self.places, self.places, starting=False)

    @property
    def nothing_held(self) -> bool:
        admission = self.gate.admission
        return (admission.ledger.reserved, admission.ledger.sequences, len(admission.backlog)) == (0, 0, 0)

    def request(
        self, name: str, traffic_class: TrafficClass = "default", timeout_s: float | None = None
    ) -> OpenRequest:
        tenant = Tenant(name.rstrip("0123456789"), traffic_class)
        return OpenRequest(name, "/v1/chat/completions", tenant, terms=Terms(traffic_class, timeout_s))

    async def outputs(self, name: str, silent: bool) -> AsyncGenerator[str, None]:
        self.started.append(name)
        try:
            if not silent:
                yield "first"
            await self.go_on.setdefault(name, asyncio.Event()).wait()
            yield "last"
        finally:
            self.ended.append(name)
            await asyncio.sleep(0)  # the engine is told to abort

    def run(self, opened: OpenRequest, silent: bool = False) -> "asyncio.Task[list[str]]":
        """One client's request with one engine request; `silent` produces nothing until it is told to go on."""
        name = opened.request_id

        async def answer() -> list[str]:
            async with self.requests.open(opened):
                outputs = self.generation.generate(demand(), lambda: self.outputs(name, silent))
                return [output async for output in outputs]

        return asyncio.create_task(answer())

    def finish(self, name: str) -> None:
        self.go_on.setdefault(name, asyncio.Event()).set()

    def metric(self, name: str, **labels: str) -> float:
        return self.registry.get_sample_value(name, labels) or 0.0


async def settle() -> None:
    for _ in range(12):
        await asyncio.sleep(0)


async def until(reached: Callable[[], bool]) -> None:
    """Turn by turn, so that nothing after the moment has happened yet."""
    for _ in range(100):
        if reached():
            return
        await asyncio.sleep(0)
    raise AssertionError("it never came to that")


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


async def test_several_prompts_of_one_request_do_not_wait_for_each_other() -> None:
    bench = Bench(places=1)
    async with bench.requests.open(bench.request("a1")):
        prompts = [bench.generation.generate(demand(), lambda i=i: bench.outputs(f"p{i}", False)) for i in range(3)]  # type: ignore[misc]
        for i in range(3):
            bench.finish(f"p{i}")

        async def whole(outputs: AsyncGenerator[str, None]) -> list[str]:
            return [output async for output in outputs]

        async with asyncio.timeout(2):
            answers = await asyncio.gather(*map(whole, prompts))
    assert answers == [["first", "last"]] * 3
    assert bench.nothing_held


async def test_a_client_that_leaves_while_some_of_its_prompts_wait_leaves_nothing() -> None:
    """vLLM runs several prompts as tasks, and does not wait for them when the request is cancelled."""
    bench = Bench(places=1)
    steps: list[asyncio.Future[str]] = []

    async def answer() -> None:
        async with bench.requests.open(bench.request("a1")):
            prompts = [bench.generation.generate(demand(), lambda: bench.outputs("p", True)) for _ in range(3)]
            steps.extend(asyncio.ensure_future(anext(outputs)) for outputs in prompts)
            await asyncio.Event().wait()

    task = asyncio.create_task(answer())
    await settle()
    task.cancel()
    await asyncio.wait({task})
    assert bench.nothing_held
    await asyncio.wait(steps)
    assert all(step.cancelled() for step in steps)


async def test_what_belongs_to_an_answer_that_has_begun_goes_in_at_once() -> None:
    """A beam search asks the engine again for every token."""
    bench = Bench(places=1)
    opened = bench.request("a1")
    bench.finish("p")
    async with bench.requests.open(opened):
        for _ in range(2):
            outputs = bench.generation.generate(demand(), lambda: bench.outputs("p", False))
            assert [output async for output in outputs] == ["first", "last"]
            if not opened.headers.get("seen"):
                opened.headers["seen"] = "yes"
                other = bench.run(bench.request("b1"))
                await settle()
                assert bench.started == ["p", "b1"]
    bench.finish("b1")
    await other
    assert bench.nothing_held


async def test_a_request_that_expires_in_the_queue_is_refused_with_a_time_to_come_back() -> None:
    bench = Bench(places=1)
    one = bench.run(bench.request("a1"))
    await settle()
    bench.gate.admission.rates = bench.gate.admission.rates.released(0.001)  # it looks like a short wait
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
    bench.gate.admission.rates = bench.gate.admission.rates.released(60)
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


async def test_a_critical_request_gets_the_place_of_batch_work_which_then_runs_again() -> None:
    bench = Bench(places=1)
    batch = bench.run(bench.request("jobs1", "batch"), silent=True)
    await settle()
    critical = bench.run(bench.request("vip1", "critical"))
    await settle()
    assert bench.started == ["jobs1", "vip1"]
    assert bench.ended == ["jobs1"]
    bench.finish("vip1")
    assert await critical == ["first", "last"]
    bench.finish("jobs1")
    assert await batch == ["last"]
    assert bench.started == ["jobs1", "vip1", "jobs1"]
    assert bench.nothing_held
    assert bench.metric("tidegate_batch_evictions_total") == 1


async def test_batch_work_whose_client_leaves_while_it_is_put_back_is_gone() -> None:
    bench = Bench(places=1)
    batch = bench.run(bench.request("jobs1", "batch"), silent=True)
    await settle()
    critical = bench.run(bench.request("vip1", "critical"))
    await until(lambda: bench.gate.admission.ledger.evicted_sequences() > 0)
    batch.cancel()
    await asyncio.wait({batch})
    assert batch.cancelled()
    bench.finish("vip1")
    await critical
    assert bench.started == ["jobs1", "vip1"]
    assert bench.nothing_held


async def test_batch_work_gives_its_place_up_also_before_its_first_turn() -> None:
    bench = Bench(places=1)
    first = bench.run(bench.request("a1"))
    await settle()
    batch = bench.run(bench.request("jobs1", "batch"), silent=True)
    await settle()
    bench.finish("a1")
    await until(first.done)
    critical = bench.run(bench.request("vip1", "critical"))
    await settle()
    bench.finish("vip1")
    bench.finish("jobs1")
    assert await critical == ["first", "last"]
    assert await batch == ["last"]
    assert bench.nothing_held


async def test_a_tenant_is_charged_what_was_really_used() -> None:
    bench = Bench()
    bench.finish("a1")
    opened = bench.request("a1")
    async with bench.requests.open(opened):
        asked = demand(7, FakeProgress(completion_tokens=5, cached_tokens=4))
        async for _ in bench.generation.generate(asked, lambda: bench.outputs("a1", False)):
            pass
    assert bench.gate.admission.counters["a"] == 3 + 2 * 5


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


async def test_a_call_of_many_prompts_is_finished_once_it_was_taken() -> None:
    bench = Bench(places=1, ttft_slo_s=1)
    bench.gate.admission.rates = bench.gate.admission.rates.released(0.3)
    bench.finish("p")

    async def whole() -> list[str]:
        return [output async for output in bench.generation.generate(demand(), lambda: bench.outputs("p", False))]

    async with bench.requests.open(bench.request("a1")):
        async with asyncio.timeout(5):
            answers = await asyncio.gather(*(whole() for _ in range(40)))
    assert len(answers) == 40
    assert bench.nothing_held


async def test_another_call_of_the_tenant_passes_the_rest_of_a_call_of_many_prompts() -> None:
    bench = Bench(places=1)

    async def whole(name: str) -> list[str]:
        return [output async for output in bench.generation.generate(demand(), lambda: bench.outputs(name, True))]

    async with bench.requests.open(bench.request("a1")):
        prompts = [asyncio.create_task(whole(f"p{i}")) for i in range(4)]
        await settle()
        other = bench.run(bench.request("a2"))
        await settle()
        for name in ("a2", "p0", "p1", "p2", "p3"):
            bench.finish(name)
        await other
        await asyncio.gather(*prompts)
    assert bench.started[:2] == ["p0", "a2"]
    assert bench.nothing_held


async def test_the_time_without_an_engine_counts_against_nobodys_deadline() -> None:
    bench = Bench(places=1, ttft_slo_s=0.3)
    bench.gate.close()
    task = bench.run(bench.request("a1"))
    await asyncio.sleep(0.5)
    assert not task.done()
    bench.open()
    bench.finish("a1")
    assert await task == ["first", "last"]
