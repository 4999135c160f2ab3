import asyncio
from typing import Any

import pytest

from server.api.answer import WireLimits
from server.api.sending import WatchedSend
from tests.api.scripted_client import Desk, ScriptedClient, nothing_left_over
from tests.serving.fake_stack import StreamingOperation

pytestmark = pytest.mark.anyio

IMPATIENT = WireLimits(1000, keep_alive_s=60, slow_reader_timeout_s=0.04)


class ClientThatStopsReading(ScriptedClient):
    """Takes the first frame, and then no more: the server's buffer is full."""

    async def send(self, message: Any) -> None:
        await super().send(message)
        if b"one" in message.get("body", b""):
            await asyncio.Event().wait()


async def test_a_client_that_does_not_read_is_let_go_and_frees_the_engine() -> None:
    operation = StreamingOperation()
    operation.say("one", "two")
    desk, client = Desk(operation, limits=IMPATIENT), ClientThatStopsReading()
    async with nothing_left_over(desk):
        await asyncio.wait_for(desk.answer(client), 2)
    assert operation.freed == 1
    assert client.scope["state"]["open_request"].client_left


async def test_a_client_that_reads_slowly_but_steadily_is_served() -> None:
    """Each message goes out in time, and all together do not."""

    class Slow(ScriptedClient):
        async def send(self, message: Any) -> None:
            await asyncio.sleep(0.15)
            await super().send(message)

    operation = StreamingOperation()
    operation.say("one", "two", "three", "four")
    operation.end()
    client = await Desk(operation, limits=WireLimits(1000, keep_alive_s=60, slow_reader_timeout_s=0.5)).answered(Slow())
    assert "four" in client.text


async def test_a_stream_that_waits_for_its_engine_is_not_a_slow_reader() -> None:
    operation = StreamingOperation()
    desk, client = Desk(operation, limits=IMPATIENT), ScriptedClient()
    answering = desk.answer(client)
    operation.say("one")
    await client.until_it_has("one")
    await asyncio.sleep(0.15)
    operation.end()
    await asyncio.wait_for(answering, 2)
    assert client.complete


async def test_the_watch_ends_with_the_answer() -> None:
    stalls: list[None] = []

    async def send(_: Any) -> None:
        """Takes everything."""

    async with WatchedSend(send, send, 0.02, lambda: stalls.append(None)) as watched:
        await watched({"type": "http.response.body"})
    await asyncio.sleep(0.05)
    assert stalls == []


def full(room: asyncio.Event, sent: list[Any]) -> Any:
    async def send(message: Any) -> None:
        await room.wait()
        await asyncio.sleep(0)
        sent.append(message)

    return send


async def write_to(send: Any, body: bytes) -> Any:
    async with WatchedSend(send, send, 60, lambda: None) as watched:
        return watched.write(body)


async def test_a_frame_to_a_connection_with_room_is_sent_at_once() -> None:
    client = ScriptedClient()
    assert await write_to(client.send, b"one") is None
    assert client.text == "one"


async def test_a_frame_to_a_full_connection_is_sent_once_when_there_is_room() -> None:
    room, sent = asyncio.Event(), list[Any]()
    rest = await write_to(full(room, sent), b"one")
    assert rest is not None
    room.set()
    await rest
    assert sent == [{"type": "http.response.body", "body": b"one", "more_body": True}]


async def test_whoever_waits_for_room_can_be_cancelled() -> None:
    room, sent = asyncio.Event(), list[Any]()
    rest = await write_to(full(room, sent), b"one")
    assert rest is not None

    async def wait() -> None:
        await rest

    waiting = asyncio.create_task(wait())
    await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.wait({waiting})
    assert waiting.cancelled()
    assert sent == []


async def test_a_frame_that_waits_too_long_for_room_is_a_stall_and_one_that_found_it_is_none() -> None:
    room, sent, stalls = asyncio.Event(), list[Any](), list[None]()
    async with WatchedSend(full(room, sent), full(room, sent), 0.04, lambda: stalls.append(None)) as watched:
        room.set()
        rest = watched.write(b"one")
        assert rest is not None
        await rest
        await asyncio.sleep(0.1)
        assert stalls == []
        room.clear()
        assert watched.write(b"two") is not None
        await asyncio.sleep(0.1)
    assert stalls == [None]


async def test_what_sending_raises_is_raised() -> None:
    async def send(_: Any) -> None:
        raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        await write_to(send, b"")
