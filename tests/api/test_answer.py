"""The response that owns its request, called as an ASGI server calls it."""

import asyncio
import json

import pytest

from server.api.answer import WireLimits
from server.api.errors import Dialect
from server.engine.calls import Call, Reply
from server.policy.refusals import Draining, GenerationFailed, InvalidRequest, RateLimited
from server.policy.tenants import Tenant
from server.serving.engine_slot import EngineSlot
from tests.api.scripted_client import (
    Desk,
    ScriptedClient,
    left_behind,
    nothing_left_over,
)
from tests.serving.fake_stack import DONE_FRAME, ERROR_FRAME, RecordingOperation, StreamingOperation

pytestmark = pytest.mark.anyio

TOOLS = b'{"messages": [], "tools": [{"type": "function"}]}'
STOPPING = Draining("The server is stopping.")
SLOWED_DOWN = RateLimited("Slow down.", retry_after_s=1.5)


async def greeting(_: Call) -> Reply:
    return Reply(b'{"hello": 1}', "application/json", {"x-from-the-engine": "yes"})


async def test_a_whole_reply_is_sent_with_its_length_and_headers() -> None:
    desk = Desk(greeting)
    async with nothing_left_over(desk):
        client = await desk.answered(ScriptedClient(body=TOOLS))
    assert (client.status, client.text) == (200, '{"hello": 1}')
    assert client.headers == {
        "content-type": "application/json",
        "content-length": "12",
        "x-from-the-engine": "yes",
        "x-tools-ignored": "1",
    }
    assert not left_behind(client)


@pytest.mark.parametrize(
    ("method", "sent", "seen"), [("GET", b"", None), ("POST", b"{}", {}), ("POST", b'{"model": "m"}', {"model": "m"})]
)
async def test_the_operation_gets_the_clients_body(method: str, sent: bytes, seen: dict[str, str] | None) -> None:
    operation = RecordingOperation()
    await Desk(operation).answered(ScriptedClient(method, body=sent))
    assert operation.calls[0].body == seen


async def test_the_request_belongs_to_the_tenant_that_was_found() -> None:
    client = ScriptedClient()
    client.scope["state"].update(tenant=Tenant("search"), end_user="u-1")
    await Desk(RecordingOperation()).answered(client)
    opened = client.scope["state"]["open_request"]
    assert (opened.tenant, opened.end_user) == (Tenant("search"), "u-1")


async def test_a_post_without_a_body_is_an_empty_object() -> None:
    operation, client = RecordingOperation(), ScriptedClient(body=b"")
    client.scope["headers"] = []
    await Desk(operation).answered(client)
    assert operation.calls[0].body == {}


async def test_a_stream_arrives_frame_by_frame() -> None:
    operation = StreamingOperation()
    desk, client = Desk(operation), ScriptedClient(body=TOOLS)
    async with nothing_left_over(desk):
        answer = desk.answer(client)
        operation.say("one")
        await client.until_it_has("data: one\n\n")
        assert "two" not in client.text
        operation.say("two")
        await client.until_it_has("data: two\n\n")
        operation.end()
        await answer
    assert client.complete
    assert client.text == f"data: one\n\ndata: two\n\n{DONE_FRAME}"
    headers = client.headers
    assert float(headers.pop("x-queue-wait")) < 1
    assert headers == {
        "content-type": "text/event-stream",
        "cache-control": "no-cache",
        "x-accel-buffering": "no",
        "x-tools-ignored": "1",
        "x-queue-position": "0",
    }
    assert not left_behind(client)


async def test_frames_before_the_engines_first_output_go_out_with_it_in_order() -> None:
    operation = StreamingOperation(opening=("event: response.created\n\n", b"event: response.in_progress\n\n"))
    desk, client = Desk(operation), ScriptedClient()
    answer = desk.answer(client)
    await asyncio.sleep(0.01)
    assert client.sent == []
    operation.say("one")
    operation.end()
    await answer
    assert client.text.startswith("event: response.created\n\nevent: response.in_progress\n\ndata: one\n\n")


async def test_a_stream_of_frames_that_need_no_engine_is_sent() -> None:
    operation = StreamingOperation(opening=("data: stored\n\n",))
    operation.end()
    client = await Desk(operation).answered(ScriptedClient())
    assert (client.status, client.text) == (200, f"data: stored\n\n{DONE_FRAME}")


async def test_frames_of_a_get_are_not_held_back() -> None:
    operation = StreamingOperation(opening=("data: stored\n\n",))
    desk, client = Desk(operation), ScriptedClient("GET", body=b"")
    answer = desk.answer(client)
    await client.until_it_has("stored")
    operation.end()
    await answer


async def test_a_refusal_before_the_first_output_is_a_status_although_frames_were_made() -> None:
    operation = StreamingOperation(opening=("event: response.created\n\n",))
    desk = Desk(operation)
    operation.fail(SLOWED_DOWN)
    async with nothing_left_over(desk):
        client = await desk.answered(ScriptedClient(body=TOOLS))
    assert client.status == 429
    assert json.loads(client.text)["error"]["message"] == "Slow down."
    assert client.headers["content-length"] == str(len(client.text))
    expected = {"retry-after": "2", "retry-after-ms": "1500", "x-tools-ignored": "1"}
    assert expected.items() <= client.headers.items()


async def test_an_error_frame_that_comes_first_is_a_status() -> None:
    desk = Desk(StreamingOperation(opening=(ERROR_FRAME,)))
    async with nothing_left_over(desk):
        client = await desk.answered(ScriptedClient())
    assert (client.status, json.loads(client.text)["error"]["message"]) == (400, "vLLM's words")


ENDINGS: dict[Dialect, str] = {
    "openai": 'data: {"error": {"message": "It stopped.", "type": "server_error", "param": null, '
    '"code": "internal_error"}}\n\ndata: [DONE]\n\n',
    "responses": 'event: error\ndata: {"type": "error", "code": "internal_error", "message": "It stopped.", '
    '"param": null}\n\n',
    "anthropic": 'event: error\ndata: {"type": "error", "error": {"type": "api_error", "message": "It stopped."}}\n\n',
}


@pytest.mark.parametrize("dialect", ENDINGS)
async def test_an_error_in_mid_stream_is_an_event_in_the_dialect_of_the_route(dialect: Dialect) -> None:
    operation = StreamingOperation()
    desk = Desk(operation, dialect)
    operation.say("one")
    operation.fail(GenerationFailed("It stopped."))
    async with nothing_left_over(desk):
        client = await desk.answered(ScriptedClient())
    assert (client.status, client.text) == (200, f"data: one\n\n{ENDINGS[dialect]}")


async def test_an_operation_that_refuses_answers_with_the_refusal() -> None:
    async def refuse(_: Call) -> Reply:
        raise InvalidRequest("No.", param="messages")

    desk = Desk(refuse, "anthropic")
    async with nothing_left_over(desk):
        client = await desk.answered(ScriptedClient())
    assert client.status == 400
    assert json.loads(client.text) == {"type": "error", "error": {"type": "invalid_request_error", "message": "No."}}


async def test_a_refusal_keeps_its_kind_when_vllm_makes_an_error_of_its_own_out_of_it() -> None:
    operation = StreamingOperation()
    operation.fail(SLOWED_DOWN)

    async def whole(call: Call) -> Reply:
        reply = await operation(call)
        frames = [frame async for frame in reply.frames]
        assert frames == [ERROR_FRAME, DONE_FRAME]
        raise InvalidRequest("vLLM's words")

    client = await Desk(whole).answered(ScriptedClient())
    assert client.status == 429


@pytest.mark.parametrize("streams", [True, False])
async def test_an_unexpected_error_is_a_500_that_gives_nothing_away(streams: bool) -> None:
    operation = StreamingOperation()
    operation.fail(ZeroDivisionError("the secret"))

    async def whole(_: Call) -> Reply:
        raise ZeroDivisionError("the secret")

    desk = Desk(operation if streams else whole)
    async with nothing_left_over(desk):
        client = await desk.answered(ScriptedClient())
    assert client.status == 500
    assert "secret" not in client.text
    assert "Traceback" not in client.text
    assert json.loads(client.text)["error"]["code"] == "internal_error"


async def test_a_body_over_the_cap_is_refused() -> None:
    client = await Desk(greeting).answered(ScriptedClient(body=b" " * 101))
    assert client.status == 413


async def test_a_draining_server_refuses_with_a_time_to_come_back() -> None:
    desk = Desk(greeting)
    await desk.requests.drain(0)
    client = await desk.answered(ScriptedClient())
    assert (client.status, json.loads(client.text)["error"]["code"]) == (503, "server_draining")
    assert int(client.headers["retry-after"]) >= 1


async def test_a_server_that_still_loads_says_what_it_does_and_when_to_come_back() -> None:
    slot = EngineSlot()
    slot.enter("loading the model")
    client = await Desk(greeting, slot=slot).answered(ScriptedClient())
    assert (client.status, json.loads(client.text)["error"]["code"]) == (503, "engine_not_ready")
    assert "loading the model" in client.text
    assert int(client.headers["retry-after"]) >= 1


async def test_ending_all_requests_ends_a_stream_with_an_error_event() -> None:
    operation = StreamingOperation()
    desk, client = Desk(operation), ScriptedClient()
    async with nothing_left_over(desk):
        answer = desk.answer(client)
        operation.say("one")
        await client.until_it_has("one")
        await desk.requests.end_all(STOPPING)
        await answer
    assert client.complete
    assert client.text.startswith("data: one\n\n")
    assert "The server is stopping." in client.text
    assert client.text.endswith(DONE_FRAME)
    assert not left_behind(client)


async def test_ending_all_requests_refuses_one_that_has_sent_nothing_yet() -> None:
    desk, client = Desk(StreamingOperation()), ScriptedClient()
    async with nothing_left_over(desk):
        answer = desk.answer(client)
        await asyncio.sleep(0.01)
        await desk.requests.end_all(STOPPING)
        await answer
    assert (client.status, client.complete) == (503, True)


QUICK = WireLimits(100, keep_alive_s=0.02, slow_reader_timeout_s=60)


async def test_a_stream_that_waits_is_kept_alive_by_comments_until_its_first_frame() -> None:
    operation = StreamingOperation(opening=("event: response.created\n\n",))
    desk, client = Desk(operation, limits=QUICK), ScriptedClient()
    async with nothing_left_over(desk):
        answer = desk.answer(client)
        await client.until_it_has(": waiting\n\n: waiting\n\n")
        operation.say("one")
        await client.until_it_has("one")
        await asyncio.sleep(5 * QUICK.keep_alive_s)
        operation.end()
        await answer
    assert (client.status, client.headers["content-type"], client.complete) == (200, "text/event-stream", True)
    comments, _, rest = client.text.partition("event: response.created\n\n")
    assert comments.replace(": waiting\n\n", "") == ""
    assert rest == f"data: one\n\n{DONE_FRAME}"


async def test_a_refusal_after_a_comment_is_an_event() -> None:
    operation = StreamingOperation()
    desk, client = Desk(operation, limits=QUICK), ScriptedClient()
    async with nothing_left_over(desk):
        answer = desk.answer(client)
        await client.until_it_has(": waiting")
        operation.fail(SLOWED_DOWN)
        await answer
    assert (client.status, client.complete) == (200, True)
    assert '"message": "Slow down."' in client.text
    assert client.text.endswith(DONE_FRAME)


async def test_a_client_that_leaves_after_a_comment_frees_the_engine() -> None:
    operation = StreamingOperation()
    desk, client = Desk(operation, limits=QUICK), ScriptedClient()
    async with nothing_left_over(desk):
        answer = desk.answer(client)
        await client.until_it_has(": waiting")
        client.leave()
        await answer
    assert (operation.freed, left_behind(client)) == (1, True)


async def test_only_event_streams_know_comments() -> None:
    operation = StreamingOperation(media_type="audio/wav")
    desk, client = Desk(operation, limits=QUICK), ScriptedClient()
    answer = desk.answer(client)
    await asyncio.sleep(5 * QUICK.keep_alive_s)
    assert client.sent == []
    operation.end()
    await answer
