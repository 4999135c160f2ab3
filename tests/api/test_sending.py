import asyncio
import socket
from collections.abc import Sequence
from typing import Any

import pytest
import uvicorn
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

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


class Streamed:
    """An application on a real uvicorn that streams frames, through `send` or through `write`."""

    def __init__(self, frames: Sequence[bytes], *, at_once: bool) -> None:
        self._frames = frames
        self._at_once = at_once
        self.waited = 0

    async def __call__(self, _: Scope, receive: Receive, send: Send) -> None:
        headers = [(b"content-type", b"text/event-stream")]
        await receive()
        async with WatchedSend(send, send, 60, lambda: None) as watched:
            await watched({"type": "http.response.start", "status": 200, "headers": headers})
            for frame in self._frames:
                if not self._at_once:
                    await watched({"type": "http.response.body", "body": frame, "more_body": True})
                elif (rest := watched.write(frame)) is not None:
                    self.waited += 1
                    await rest
            await watched({"type": "http.response.body", "body": b"", "more_body": False})

    async def raw_answer(self, *, read_after_s: float = 0.0) -> bytes:
        """All bytes that a client gets which begins to read after so many seconds."""
        config = uvicorn.Config(
            self, http="httptools", lifespan="off", log_config=None, date_header=False, access_log=False
        )
        server = uvicorn.Server(config)
        with socket.create_server(("127.0.0.1", 0)) as listener:
            serving = asyncio.create_task(server.serve([listener]))
            reader, writer = await asyncio.open_connection(*listener.getsockname())
            writer.write(b"POST / HTTP/1.1\r\nhost: here\r\nconnection: close\r\ncontent-length: 0\r\n\r\n")
            await asyncio.sleep(read_after_s)
            answer = await reader.read()
            writer.close()
            server.should_exit = True
            await serving
        return answer


async def test_what_is_written_at_once_is_on_the_wire_what_uvicorn_would_send() -> None:
    frames = [b"data: {}\n\n", b"x", "data: \u00fc \u4e2d\n\n".encode(), b"y" * 5000]
    sent, written = Streamed(frames, at_once=False), Streamed(frames, at_once=True)
    assert await written.raw_answer() == await sent.raw_answer()
    assert written.waited == 0


async def test_a_client_that_reads_late_gets_all_that_was_written() -> None:
    frames = [b"%d" % number * 100_000 for number in range(10, 99)]
    sent, written = Streamed(frames, at_once=False), Streamed(frames, at_once=True)
    assert await written.raw_answer(read_after_s=0.3) == await sent.raw_answer()
    assert written.waited > 0


async def test_uvicorns_own_send_is_met_where_a_part_of_the_body_is_not_merely_written(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of a connection with room, no frame goes through it; of the answer's head and its end each one does."""
    seen: list[str] = []
    whole = RequestResponseCycle.send

    async def noting(self: RequestResponseCycle, message: Any) -> None:
        seen.append(message["type"])
        await whole(self, message)

    monkeypatch.setattr(RequestResponseCycle, "send", noting)
    answer = await Streamed([b"one", b"two"], at_once=True).raw_answer()
    assert answer.endswith(b"3\r\none\r\n3\r\ntwo\r\n0\r\n\r\n")
    assert seen == ["http.response.start", "http.response.body"]
