"""What becomes of a request whose engine dies: the response over stacks that a test kills."""

import asyncio
import json
from typing import TYPE_CHECKING, cast

import pytest
from starlette.types import Message

from server.api.answer import WireLimits
from server.engine.calls import Call, Reply
from server.policy.refusals import GenerationFailed, InvalidRequest
from server.serving.engine_slot import EngineSlot
from tests.api.scripted_client import CHAT, Desk, ScriptedClient, nothing_left_over
from tests.serving.fake_stack import DONE_FRAME, FakeStack, Operation, RecordingOperation, StreamingOperation

if TYPE_CHECKING:  # the engine room imports vLLM
    from server.engine.stack import Stack

pytestmark = pytest.mark.anyio

DEAD = GenerationFailed("EngineCore encountered an issue.")
STREAMED = b'{"stream": true}'


class Engines:
    """A slot whose engines die and are replaced when a test says so."""

    def __init__(self, operation: Operation) -> None:
        self.slot = EngineSlot()
        self.replace(operation)

    def replace(self, operation: Operation) -> None:
        self._stack = FakeStack({("POST", CHAT): operation}, uses_tools=False)
        self.slot.fill(cast("Stack", self._stack))

    def die(self) -> None:
        self._stack.alive = False
        self.slot.empty("replacing the engine")

    @property
    def stack(self) -> "Stack":
        return cast("Stack", self._stack)


async def greeting(_: Call) -> Reply:
    return Reply(b'{"hello": 1}', "application/json")


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


async def test_a_stream_that_has_sent_nothing_runs_again_on_the_next_engine() -> None:
    first, second = StreamingOperation(opening=("event: response.created\n\n",)), StreamingOperation()
    engines = Engines(first)
    desk, client = Desk(first, slot=engines.slot), ScriptedClient(body=STREAMED)
    async with nothing_left_over(desk):
        answer = desk.answer(client)
        await settle()
        engines.die()
        first.fail(DEAD)
        await settle()
        assert client.sent == []
        engines.replace(second)
        second.say("one")
        second.end()
        await answer
    assert (client.status, client.complete) == (200, True)
    assert client.text == f"data: one\n\n{DONE_FRAME}"  # nothing of the first attempt
    assert (first.freed, second.freed) == (1, 1)


async def test_a_whole_answer_runs_again_on_the_next_engine() -> None:
    failing = StreamingOperation()

    async def dies(call: Call) -> Reply:
        reply = await failing(call)
        _ = [frame async for frame in reply.frames]
        raise DEAD

    engines = Engines(dies)
    desk, client = Desk(dies, slot=engines.slot), ScriptedClient()
    answer = desk.answer(client)
    await settle()
    engines.die()
    failing.fail(DEAD)
    await settle()
    engines.replace(greeting)
    await answer
    assert (client.status, client.text) == (200, '{"hello": 1}')


async def test_a_stream_that_has_begun_ends_with_an_error_event() -> None:
    operation = StreamingOperation()
    engines = Engines(operation)
    desk, client = Desk(operation, slot=engines.slot), ScriptedClient(body=STREAMED)
    async with nothing_left_over(desk):
        answer = desk.answer(client)
        operation.say("one")
        await client.until_it_has("one")
        engines.die()
        operation.fail(DEAD)
        await asyncio.wait_for(answer, 1)
    assert client.complete
    assert client.text.startswith("data: one\n\n")
    assert '"code": "engine_lost"' in client.text
    assert client.text.endswith(DONE_FRAME)


async def test_a_request_in_the_engine_at_two_deaths_is_not_tried_a_third_time() -> None:
    operations = [StreamingOperation() for _ in range(2)]
    third = RecordingOperation()
    engines = Engines(operations[0])
    desk, client = Desk(operations[0], slot=engines.slot), ScriptedClient(body=STREAMED)
    answer = desk.answer(client)
    successors: list[Operation] = [operations[1], third]
    for operation, successor in zip(operations, successors, strict=True):
        await settle()
        engines.die()
        operation.fail(DEAD)
        await settle()
        engines.replace(successor)
    await answer
    error = json.loads(client.text)["error"]
    assert (client.status, error["code"]) == (500, "request_quarantined")
    assert "id-1" in error["message"]
    assert client.headers["x-should-retry"] == "false"
    assert third.calls == []


async def test_a_request_that_never_reached_an_engine_is_not_blamed_for_its_death() -> None:
    """It met dead engines three times, and was inside none of them."""

    async def refuse(_: Call) -> Reply:
        raise DEAD

    engines = Engines(refuse)
    desk, client = Desk(refuse, slot=engines.slot), ScriptedClient()
    engines.die()
    answer = desk.answer(client)
    for _ in range(3):
        await settle()
        engines.replace(refuse)
        engines._stack.alive = False  # it dies before the request is in it
    await settle()
    engines.replace(greeting)
    await answer
    assert client.status == 200


async def test_a_request_that_arrives_while_the_engine_is_replaced_waits_for_the_next() -> None:
    engines = Engines(greeting)
    engines.die()
    desk, client = Desk(greeting, slot=engines.slot), ScriptedClient()
    answer = desk.answer(client)
    await settle()
    assert client.sent == []
    engines.replace(greeting)
    await answer
    assert client.status == 200


async def test_a_stream_that_waits_for_an_engine_is_kept_alive() -> None:
    operation = StreamingOperation()
    engines = Engines(operation)
    engines.die()
    limits = WireLimits(100, keep_alive_s=0.02, slow_reader_timeout_s=60)
    desk, client = Desk(operation, limits=limits, slot=engines.slot), ScriptedClient(body=STREAMED)
    async with nothing_left_over(desk):
        answer = desk.answer(client)
        await client.until_it_has(": waiting\n\n: waiting\n\n")
        engines.replace(operation)
        operation.say("one")
        operation.end()
        await answer
    assert client.complete
    assert client.text.endswith(f"data: one\n\n{DONE_FRAME}")


async def test_a_client_that_leaves_while_it_waits_for_an_engine_leaves_nothing_open() -> None:
    engines = Engines(greeting)
    engines.die()
    desk, client = Desk(greeting, slot=engines.slot), ScriptedClient(body=STREAMED)
    async with nothing_left_over(desk):
        answer = desk.answer(client)
        await settle()
        client.leave()
        await answer
    assert client.sent == []


async def test_what_vllm_never_answers_is_woken_and_runs_again() -> None:
    async def forgotten(_: Call) -> Reply:
        await asyncio.Event().wait()
        raise AssertionError("nobody wakes it")

    engines = Engines(forgotten)
    desk, client = Desk(forgotten, slot=engines.slot), ScriptedClient()
    async with nothing_left_over(desk):
        answer = desk.answer(client)
        await settle()
        dead = engines.stack
        engines.die()
        desk.requests.wake_those_on(dead)
        await settle()
        engines.replace(greeting)
        await answer
    assert client.status == 200


async def test_a_woken_request_whose_client_leaves_at_the_same_moment_just_ends() -> None:
    async def forgotten(_: Call) -> Reply:
        await asyncio.Event().wait()
        raise AssertionError("nobody wakes it")

    engines = Engines(forgotten)
    desk, client = Desk(forgotten, slot=engines.slot), ScriptedClient()
    async with nothing_left_over(desk):
        answer = desk.answer(client)
        await settle()
        dead = engines.stack
        engines.die()
        client.leave()
        await asyncio.sleep(0)
        desk.requests.wake_those_on(dead)
        await asyncio.wait_for(answer, 2)
    assert client.sent == []


async def test_a_mistake_of_the_clients_stays_one_although_the_engine_is_dead() -> None:
    entered, may_fail = asyncio.Event(), asyncio.Event()

    async def refuse(_: Call) -> Reply:
        entered.set()
        await may_fail.wait()
        raise InvalidRequest("No.", param="messages")

    engines = Engines(refuse)
    desk, client = Desk(refuse, slot=engines.slot), ScriptedClient()
    answer = desk.answer(client)
    await entered.wait()
    engines.die()
    may_fail.set()
    await answer
    assert client.status == 400


async def test_a_failure_on_an_engine_that_lives_is_told_at_once() -> None:
    async def fail(_: Call) -> Reply:
        raise GenerationFailed("It broke.")

    client = await Desk(fail, slot=Engines(fail).slot).answered(ScriptedClient())
    assert client.status == 500


async def test_an_answer_that_is_on_its_way_out_does_not_care_about_its_engine() -> None:
    engines = Engines(greeting)
    desk = Desk(greeting, slot=engines.slot)
    dead = engines.stack

    def dies_at_the_head(message: Message) -> bool:
        if message["type"] == "http.response.start":
            engines.die()
            desk.requests.wake_those_on(dead)
        return False

    client = await desk.answered(ScriptedClient(leaves_at=dies_at_the_head))
    assert (client.status, client.text) == (200, '{"hello": 1}')
