import asyncio
import contextlib
from collections.abc import AsyncGenerator

import pytest

from server.policy.refusals import Draining, GenerationFailed, Overloaded
from server.policy.tenants import Tenant
from server.serving.generation import Generation
from server.serving.requests import OpenRequest, OpenRequests, current_request
from tests.serving.fake_stack import demand, new_generation

pytestmark = pytest.mark.anyio

STOPPING = Draining("The server is stopping.")


def request(name: str = "a") -> OpenRequest:
    return OpenRequest(request_id=name, path="/v1/chat/completions")


async def hold(requests: OpenRequests, opened: OpenRequest, until: asyncio.Event) -> None:
    async with requests.open(opened):
        await until.wait()


async def ended(task: "asyncio.Task[None]") -> BaseException | None:
    """How a task ended; a cancelled one counts as an error like any other."""
    await asyncio.wait({task}, timeout=5)
    assert task.done()
    return asyncio.CancelledError() if task.cancelled() else task.exception()


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_what_runs_for_a_request_is_its_tenants_work() -> None:
    generation, requests = new_generation(), OpenRequests()
    opened = OpenRequest(request_id="a", path="/v1/responses", tenant=Tenant("search"))
    async with requests.open(opened):
        in_background = asyncio.create_task(_owner_later(generation))
        assert generation.owner() == "search"
    assert (await in_background, generation.owner()) == ("search", "anyone")


async def _owner_later(generation: Generation) -> str:
    await asyncio.sleep(0)
    return generation.owner()


class Engine:
    """A generator that holds something until it is closed, which takes `close_s`."""

    def __init__(self, close_s: float = 0.0) -> None:
        self.freed = 0
        self._close_s = close_s

    async def outputs(self) -> AsyncGenerator[str, None]:
        try:
            yield "first"
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(self._close_s)
            self.freed += 1


async def test_a_request_counts_from_open_to_closed() -> None:
    requests = OpenRequests()
    async with requests.open(request()):
        assert len(requests) == 1
    assert len(requests) == 0


async def test_the_open_request_is_known_to_what_runs_for_it_and_to_nothing_else() -> None:
    requests, mine = OpenRequests(), request()
    assert current_request() is None
    async with requests.open(mine):
        assert current_request() is mine
        assert await asyncio.create_task(_current()) is mine
    assert current_request() is None


async def _current() -> OpenRequest | None:
    return current_request()


async def test_two_requests_each_know_their_own() -> None:
    requests, met = OpenRequests(), asyncio.Barrier(2)

    async def known(mine: OpenRequest) -> bool:
        async with requests.open(mine):
            await met.wait()
            return current_request() is mine

    assert all(await asyncio.gather(known(request("a")), known(request("b"))))


async def test_draining_waits_for_the_open_requests() -> None:
    requests, done = OpenRequests(), asyncio.Event()
    running = asyncio.create_task(hold(requests, request(), done))
    await settle()
    draining = asyncio.create_task(requests.drain(5))
    await settle()
    assert not draining.done()
    done.set()
    assert await draining == 0
    assert await ended(running) is None


async def test_draining_refuses_new_requests_with_a_time_to_come_back() -> None:
    requests = OpenRequests()
    assert await requests.drain(0) == 0
    assert requests.draining
    with pytest.raises(Draining) as refused:
        async with requests.open(request()):
            pass
    assert refused.value.retry_after_s is not None
    assert len(requests) == 0


async def test_a_server_that_is_about_to_leave_still_takes_requests() -> None:
    requests = OpenRequests()
    requests.announce_leaving()
    async with requests.open(request()):
        assert (requests.leaving, requests.draining) == (True, False)
    await requests.drain(0)
    assert (requests.leaving, requests.draining) == (True, True)


async def test_a_drain_that_runs_out_of_time_says_how_many_are_left() -> None:
    requests, done = OpenRequests(), asyncio.Event()
    running = [asyncio.create_task(hold(requests, request(name), done)) for name in "ab"]
    await settle()
    assert await requests.drain(0.01) == 2
    done.set()
    await asyncio.gather(*running)


async def test_draining_an_idle_server_takes_no_time() -> None:
    async with asyncio.timeout(1):
        assert await OpenRequests().drain(60) == 0


async def test_ending_all_gives_every_request_the_refusal_and_waits_for_them() -> None:
    requests = OpenRequests()
    running = [asyncio.create_task(hold(requests, request(name), asyncio.Event())) for name in "ab"]
    await settle()
    await requests.end_all(STOPPING)
    assert len(requests) == 0
    assert [await ended(task) for task in running] == [STOPPING, STOPPING]


async def test_a_request_that_is_cancelled_by_its_own_side_stays_cancelled() -> None:
    requests = OpenRequests()
    running = asyncio.create_task(hold(requests, request(), asyncio.Event()))
    await settle()
    running.cancel()
    assert isinstance(await ended(running), asyncio.CancelledError)
    assert len(requests) == 0


async def test_a_request_that_fails_is_closed() -> None:
    requests = OpenRequests()
    with pytest.raises(ZeroDivisionError):
        async with requests.open(request()):
            raise ZeroDivisionError
    assert len(requests) == 0


async def test_a_generator_that_nobody_closed_is_closed_with_its_request() -> None:
    requests, engine = OpenRequests(), Engine()
    outputs = new_generation().generate(demand(), engine.outputs)
    async with requests.open(request()):
        assert await anext(outputs) == "first"
        assert engine.freed == 0
    assert engine.freed == 1


async def test_a_generator_is_closed_once_whoever_comes_first() -> None:
    requests, engine, opened = OpenRequests(), Engine(), request()
    async with requests.open(opened):
        outputs = new_generation().generate(demand(), engine.outputs)
        await anext(outputs)
        await outputs.aclose()
        assert (engine.freed, opened.running) == (1, set())
    assert engine.freed == 1


async def test_a_generation_adds_up_prompt_tokens_and_tells_when_it_produces() -> None:
    opened, generation, engine = request(), new_generation(), Engine()
    async with OpenRequests().open(opened):
        for prompt_tokens in (3, 4):
            outputs = generation.generate(demand(prompt_tokens), engine.outputs)
            await anext(outputs)
        assert opened.prompt_tokens == 7
        assert opened.producing
    assert engine.freed == 2


async def test_a_generation_that_is_refused_leaves_its_refusal_on_the_request() -> None:
    refusal, opened = Overloaded("No room."), request()

    async def outputs() -> AsyncGenerator[str, None]:
        if not opened.producing:
            raise refusal
        yield "never"

    with pytest.raises(Overloaded):
        async with OpenRequests().open(opened):
            await anext(new_generation().generate(demand(), outputs))
    assert opened.refusal is refusal
    assert not opened.producing


async def test_a_generation_of_the_servers_own_needs_no_request() -> None:
    outputs = new_generation().generate(demand(), Engine().outputs)
    assert await anext(outputs) == "first"
    await outputs.aclose()


async def cancelled_while_it_lets_go(requests: OpenRequests, engine: Engine) -> "asyncio.Task[None]":
    """A request that was cancelled, and whose generator is still being closed."""

    async def answer() -> None:
        async with requests.open(request()):
            outputs = new_generation().generate(demand(), engine.outputs)
            await anext(outputs)
            await asyncio.Event().wait()

    running = asyncio.create_task(answer())
    await settle()
    running.cancel()
    await settle()
    assert (len(requests), engine.freed) == (1, 0)
    return running


async def test_a_request_that_is_cancelled_again_while_it_lets_go_still_lets_go() -> None:
    requests, engine = OpenRequests(), Engine(close_s=0.05)
    running = await cancelled_while_it_lets_go(requests, engine)
    running.cancel()
    assert isinstance(await ended(running), asyncio.CancelledError)
    assert (len(requests), engine.freed) == (0, 1)


async def test_a_request_that_is_ended_while_it_lets_go_does_not_hold_up_the_end() -> None:
    requests, engine = OpenRequests(), Engine(close_s=0.05)
    running = await cancelled_while_it_lets_go(requests, engine)
    async with asyncio.timeout(2):
        await requests.end_all(STOPPING)
    await ended(running)
    assert (len(requests), engine.freed) == (0, 1)


async def test_a_generator_that_cannot_be_closed_does_not_keep_its_request_open() -> None:
    async def stubborn() -> AsyncGenerator[str, None]:
        try:
            yield "first"
        finally:
            raise GenerationFailed("It would not stop.")

    requests = OpenRequests()
    outputs = new_generation().generate(demand(), stubborn)
    with contextlib.suppress(GenerationFailed):
        async with requests.open(request()):
            await anext(outputs)
    assert len(requests) == 0
    assert await requests.drain(1) == 0


async def test_a_client_that_leaves_a_request_with_several_prompts_frees_all_of_them() -> None:
    """vLLM runs several prompts of one request as tasks, and does not wait for them when it is cancelled."""
    requests, freed = OpenRequests(), 0

    async def waiting() -> AsyncGenerator[str, None]:
        nonlocal freed
        try:
            await asyncio.Event().wait()
            yield "never"
        finally:
            await asyncio.sleep(0.01)  # the engine is told to abort
            freed += 1

    async def answer() -> None:
        async with requests.open(request()):
            prompts = [new_generation().generate(demand(), waiting) for _ in range(2)]
            steps = [asyncio.ensure_future(anext(outputs)) for outputs in prompts]
            try:
                await asyncio.wait(steps)
            finally:
                for step in steps:
                    step.cancel()

    running = asyncio.create_task(answer())
    await settle()
    running.cancel()
    assert isinstance(await ended(running), asyncio.CancelledError)
    assert len(requests) == 0
    await asyncio.sleep(0.05)
    assert freed == 2
