"""The gate asked from another front-end, over a real Unix socket."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from server.hub import messages
from server.hub.connection import Connection, connect, listening
from server.policy.forecast import NO_PART, Rates
from server.policy.refusals import InvalidRequest, Overloaded
from server.policy.tenants import Tenant, TrafficClass
from server.policy.terms import Terms
from server.serving.distant_gate import DistantGate, DistantSlot
from server.serving.generation import Generation
from server.serving.guests import Guests
from server.serving.requests import OpenRequest
from server.telemetry.traces import Traces
from tests.serving.fake_stack import FakeProgress, demand, new_charging, new_fitter
from tests.serving.gate_bench import Bench, settle

pytestmark = pytest.mark.anyio


@dataclass
class Far:
    """A front-end whose gate is another's. It has the bench's ways, and its engine requests are the bench's."""

    bench: Bench
    connection: Connection
    gate: DistantGate
    guests: list[Guests]
    left: list[list[str]]
    generation: Generation = field(init=False)

    def __post_init__(self) -> None:
        self.generation = Generation(new_fitter(), self.gate, new_charging())

    def run(self, opened: OpenRequest, silent: bool = False) -> "asyncio.Task[list[str]]":
        name = opened.request_id

        async def answer() -> list[str]:
            async with self.bench.requests.open(opened):
                outputs = self.generation.generate(demand(), lambda: self.bench.outputs(name, silent))
                return [output async for output in outputs]

        return asyncio.create_task(answer())


@asynccontextmanager
async def far(bench: Bench, folder: Path) -> AsyncIterator[Far]:
    guests: list[Guests] = []
    left: list[list[str]] = []

    async def talk(connection: Connection) -> None:
        one = Guests(bench.gate, connection.send)
        guests.append(one)
        async for message in connection.received():
            if isinstance(message, messages.Stepped):
                one.prefilled(message.prefilled)
            one.hear(message)
        left.append(one.leave_all())

    async with listening(folder / "hub", talk):
        connection = await connect(folder / "hub")
        gate = DistantGate(connection.send, Traces())

        async def listen() -> None:
            async for message in connection.received():
                gate.hear(message)

        listener = asyncio.create_task(listen())
        try:
            yield Far(bench, connection, gate, guests, left)
        finally:
            listener.cancel()
            await connection.close()


async def until(holds: object, what: str = "it never came to that") -> None:
    """Real sockets take real turns."""
    assert callable(holds)
    for _ in range(400):
        if holds():
            return
        await asyncio.sleep(0.005)
    raise AssertionError(what)


def _untold(slot: DistantSlot) -> None:
    del slot


def request(name: str, traffic_class: TrafficClass = "default") -> OpenRequest:
    return OpenRequest(name, "/v1/chat/completions", Tenant("far", traffic_class), terms=Terms(traffic_class))


async def test_a_place_is_asked_for_waited_for_and_given_back(tmp_path: Path) -> None:
    bench = Bench(places=1)
    async with far(bench, tmp_path) as there:
        near = bench.run(bench.request("near1"))
        await settle()
        opened = request("f1")
        distant = there.run(opened)
        await until(lambda: len(bench.gate.admission.backlog) == 1)
        assert bench.started == ["near1"]
        bench.finish("near1")
        await until(lambda: bench.started == ["near1", "f1"], "the place was not passed on")
        assert there.guests[0].running == 1
        bench.finish("f1")
        assert await near == await distant == ["first", "last"]
        assert opened.headers["x-queue-position"] == "1"
        assert float(opened.headers["x-queue-wait"]) > 0
        assert opened.figures.queue_wait_s is not None
        await until(lambda: bench.nothing_held)
        assert bench.metric("tidegate_queue_wait_seconds_count", **{"class": "default"}) == 2


async def test_a_refusal_comes_back_as_it_was_raised(tmp_path: Path) -> None:
    bench = Bench(places=1, ttft_slo_s=0.3)
    async with far(bench, tmp_path) as there:
        running = [there.run(request(f"f{i}")) for i in range(4)]
        await until(lambda: bool(bench.started))
        with pytest.raises(Overloaded) as refused:
            await asyncio.gather(*running)
        assert refused.value.retry_after_s is not None
        assert "requests like this one wait at most 0.3 s" in refused.value.message
        bench.finish("f0")
        await asyncio.gather(*running, return_exceptions=True)
        await until(lambda: bench.nothing_held)


async def test_what_cannot_be_is_refused_as_the_clients_own_mistake(tmp_path: Path) -> None:
    async with far(Bench(), tmp_path) as there:
        opened = request("f1")
        opened.asked_max_tokens = 16
        with pytest.raises(InvalidRequest) as refused:
            async with there.gate.slot(opened, demand(n=10_000)):
                pass
        assert refused.value.param == "n"


async def test_the_door_is_asked_unless_the_gate_is_calm(tmp_path: Path) -> None:
    bench = Bench(places=1, ttft_slo_s=0.3)
    async with far(bench, tmp_path) as there:
        asked = there.gate.knock(request("f1"), 0)
        assert asked is not None
        await asked
        running = there.run(request("f2"))
        await until(lambda: bool(bench.started))
        bench.gate.admission.rates = Rates(residence_s=60.0, ended=100)
        asked = there.gate.knock(request("f3"), 0)
        assert asked is not None
        with pytest.raises(Overloaded):
            await asked
        assert bench.metric("tidegate_overload_refusals_total", **{"class": "default", "where": "door"}) == 1
        there.gate.calm = True
        assert there.gate.knock(request("f4"), 0) is None
        bench.finish("f2")
        await running


async def test_a_client_that_leaves_the_queue_leaves_nothing(tmp_path: Path) -> None:
    bench = Bench(places=1)
    async with far(bench, tmp_path) as there:
        one, two = there.run(request("f1")), there.run(request("f2"))
        await until(lambda: len(bench.gate.admission.backlog) == 1)
        two.cancel()
        await until(lambda: len(bench.gate.admission.backlog) == 0)
        one.cancel()
        await until(lambda: bench.nothing_held)
        await asyncio.wait({one, two})


async def test_batch_work_gives_its_place_up_and_runs_again(tmp_path: Path) -> None:
    bench = Bench(places=1)
    async with far(bench, tmp_path) as there:
        batch = there.run(request("b1", "batch"), silent=True)
        await until(lambda: bench.started == ["b1"])
        critical = bench.run(bench.request("near1", "critical"))
        await until(lambda: bench.started == ["b1", "near1"], "the batch work kept its place")
        assert bench.ended == ["b1"]
        bench.finish("near1")
        await critical
        await until(lambda: bench.started == ["b1", "near1", "b1"], "it did not run again")
        bench.finish("b1")
        assert await batch == ["last"]
        await until(lambda: bench.nothing_held)


async def test_batch_work_that_its_client_has_seen_some_of_stays(tmp_path: Path) -> None:
    bench = Bench(places=1)
    async with far(bench, tmp_path) as there:
        batch = there.run(request("b1", "batch"))
        await until(lambda: bench.started == ["b1"])
        await asyncio.sleep(0.02)  # its first output is told
        critical = bench.run(bench.request("near1", "critical"))
        await asyncio.sleep(0.05)
        assert bench.started == ["b1"]
        bench.finish("b1")
        bench.finish("near1")
        assert await batch == await critical == ["first", "last"]
        await until(lambda: bench.nothing_held)


async def test_an_eviction_that_crosses_the_first_output_is_taken_back(tmp_path: Path) -> None:
    """The gate has told it to go before it hears that the client has seen some of it."""
    bench = Bench(places=1)
    async with far(bench, tmp_path) as there:
        there.gate.streamed = _untold  # type: ignore[method-assign]
        batch = there.run(request("b1", "batch"))
        await until(lambda: bench.started == ["b1"])
        await asyncio.sleep(0.02)
        (held,) = bench.gate._running.values()
        critical = bench.run(bench.request("near1", "critical"))
        await settle()
        assert held.held is not None
        assert held.held.evicted
        there.connection.send(messages.Streamed(1))
        await until(lambda: held.held is not None and not held.held.evicted)
        bench.finish("b1")
        bench.finish("near1")
        assert await batch == await critical == ["first", "last"]


async def test_a_front_end_that_is_gone_holds_nothing_and_its_engine_requests_are_known(tmp_path: Path) -> None:
    bench = Bench(places=2)
    async with far(bench, tmp_path) as there:
        tasks = [there.run(request(f"f{i}")) for i in range(4)]
        await until(lambda: len(bench.started) == 2)
        there.connection.send(messages.Started(1, "engine-1"))
        await until(lambda: bool(there.guests[0]._slots[1].engine_requests))
        await there.connection.close()
        await until(lambda: bench.nothing_held, "a dead front-end holds places")
        assert there.left == [["engine-1"]]
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


async def test_the_gate_hears_of_prompts_that_the_engine_is_through_with(tmp_path: Path) -> None:
    bench = Bench()
    async with far(bench, tmp_path) as there:
        progress = FakeProgress()
        async with there.gate.slot(request("f1"), demand(progress=progress)):
            assert there.gate.take_prefilled() == ()
            progress.prefilled = True
            done = there.gate.take_prefilled()
            assert there.gate.take_prefilled() == ()
            there.connection.send(messages.Stepped(NO_PART, prefilled=done))
            await until(lambda: there.guests[0]._slots[1].prefilled)
        await until(lambda: bench.nothing_held)
