"""Engine requests that belong together, and those that give their place up."""

import asyncio
from collections.abc import AsyncGenerator

import pytest

from server.policy.forecast import Rates
from tests.serving.fake_stack import demand
from tests.serving.gate_bench import Bench, settle, until

pytestmark = pytest.mark.anyio


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
    await until(lambda: bench.gate.admission.ledger.given_up(()).places > 0)
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


async def test_a_call_of_many_prompts_is_finished_once_it_was_taken() -> None:
    bench = Bench(places=1, ttft_slo_s=1)
    bench.gate.admission.rates = Rates(residence_s=0.3, ended=100)
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
