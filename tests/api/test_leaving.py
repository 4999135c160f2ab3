"""A client that leaves, at every moment of its request: nothing is left open."""

import asyncio
from collections.abc import Callable

import pytest
from starlette.types import Message

from server.engine.calls import Call, Reply
from server.policy.refusals import InvalidRequest, RateLimited
from tests.api.scripted_client import (
    Desk,
    ScriptedClient,
    at_frame,
    at_the_end,
    at_the_head,
    left_behind,
    nothing_left_over,
)
from tests.serving.fake_stack import StreamingOperation

pytestmark = pytest.mark.anyio

SLOWED_DOWN = RateLimited("Slow down.", retry_after_s=1.5)


async def greeting(_: Call) -> Reply:
    return Reply(b'{"hello": 1}', "application/json", {"x-from-the-engine": "yes"})


async def test_a_client_that_leaves_in_its_body_starts_nothing() -> None:
    operation, client = StreamingOperation(), ScriptedClient()
    client.receive_first({"type": "http.request", "body": b"{", "more_body": True}, {"type": "http.disconnect"})
    desk = Desk(operation)
    async with nothing_left_over(desk):
        await desk.answer(client)
    assert (client.sent, operation.started, left_behind(client)) == ([], 0, True)


async def test_a_client_that_leaves_while_its_operation_waits_cancels_it() -> None:
    cancelled = 0

    async def waiting(_: Call) -> Reply:
        nonlocal cancelled
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled += 1
            await asyncio.sleep(0)  # letting go may await
            raise
        raise AssertionError("nobody wakes it")

    desk, client = Desk(waiting), ScriptedClient()
    async with nothing_left_over(desk):
        answer = desk.answer(client)
        await asyncio.sleep(0.01)
        client.leave()
        await answer
    assert (client.sent, cancelled, left_behind(client)) == ([], 1, True)


async def test_an_operation_that_makes_an_error_of_its_cancellation_refuses_nobody() -> None:
    """vLLM does so where the answer is not streamed."""

    async def waiting(_: Call) -> Reply:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError as cancelled:
            raise InvalidRequest("Client disconnected") from cancelled
        raise AssertionError("nobody wakes it")

    desk, client = Desk(waiting), ScriptedClient()
    async with nothing_left_over(desk):
        answer = desk.answer(client)
        await asyncio.sleep(0.01)
        client.leave()
        await answer
        assert answer.cancelling() == 0
    assert (client.sent, left_behind(client)) == ([], True)
    assert "refusal" not in client.scope["state"]


@pytest.mark.parametrize("opening", [(), ("event: response.created\n\n",)])
async def test_a_client_that_leaves_before_the_first_output_frees_the_engine(opening: tuple[str, ...]) -> None:
    operation = StreamingOperation(opening=opening)
    desk, client = Desk(operation), ScriptedClient()
    async with nothing_left_over(desk):
        answer = desk.answer(client)
        await asyncio.sleep(0.01)
        client.leave()
        await answer
    assert (client.sent, operation.started, operation.freed, left_behind(client)) == ([], 1, 1, True)


async def test_a_client_that_leaves_between_two_outputs_frees_the_engine() -> None:
    operation = StreamingOperation()
    desk, client = Desk(operation), ScriptedClient()
    async with nothing_left_over(desk):
        answer = desk.answer(client)
        operation.say("one")
        await client.until_it_has("one")
        client.leave()
        await answer
    assert (operation.freed, left_behind(client)) == (1, True)
    assert not client.complete


@pytest.mark.parametrize("leaves_at", [at_the_head, at_frame("one"), at_frame("two"), at_frame("[DONE]")])
async def test_a_client_that_leaves_while_a_frame_goes_out_frees_the_engine(
    leaves_at: Callable[[Message], bool],
) -> None:
    operation = StreamingOperation()
    desk, client = Desk(operation), ScriptedClient(leaves_at=leaves_at)
    operation.say("one", "two")
    operation.end()
    async with nothing_left_over(desk):
        await desk.answer(client)
    assert (operation.freed, left_behind(client)) == (1, True)
    assert not client.complete


async def test_a_client_that_leaves_at_the_last_byte_has_its_answer() -> None:
    operation = StreamingOperation()
    desk, client = Desk(operation), ScriptedClient(leaves_at=at_the_end)
    operation.say("one")
    operation.end()
    async with nothing_left_over(desk):
        await desk.answer(client)
    assert (client.complete, operation.freed, left_behind(client)) == (True, 1, False)


@pytest.mark.parametrize(("leaves_at", "left"), [(at_the_head, True), (at_the_end, False)])
async def test_a_client_that_leaves_during_a_whole_reply_leaves_nothing_open(
    leaves_at: Callable[[Message], bool], left: bool
) -> None:
    desk, client = Desk(greeting), ScriptedClient(leaves_at=leaves_at)
    async with nothing_left_over(desk):
        await desk.answer(client)
    assert left_behind(client) == left


async def test_a_client_that_leaves_while_its_refusal_goes_out_ends_quietly() -> None:
    operation = StreamingOperation()
    operation.fail(SLOWED_DOWN)
    desk, client = Desk(operation), ScriptedClient(leaves_at=at_the_head)
    async with nothing_left_over(desk):
        await desk.answer(client)
    assert (client.status, client.complete) == (429, True)
