"""Requests that go from one process to another over a Unix socket, between two real HTTP servers."""

import asyncio
import hashlib
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Generator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest
import uvicorn
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api.passing_on import PassingOn

pytestmark = pytest.mark.anyio

TIMEOUT_S = 10.0
SLOW_READER_TIMEOUT_S = 60.0
MIB = 1 << 20
# Far more than sockets and servers hold of an answer that nobody reads.
MORE_THAN_BUFFERS_HOLD = 64 * MIB

Answer = Callable[[Receive, Send], Awaitable[None]]


class _Server(uvicorn.Server):
    @contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield


@asynccontextmanager
async def served(app: ASGIApp, listener: socket.socket, trusted: str = "") -> AsyncIterator[None]:
    config = uvicorn.Config(
        app, lifespan="off", log_config=None, access_log=False, server_header=False, timeout_graceful_shutdown=1,
        forwarded_allow_ips=trusted,
    )  # fmt: skip
    server = _Server(config)
    serving = asyncio.create_task(server.serve([listener]))
    try:
        yield
    finally:
        server.should_exit = True
        await serving


async def ok(receive: Receive, send: Send) -> None:
    del receive
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"ok"})


@dataclass
class First:
    """The process that others pass on to: it keeps what it saw, and answers as a test says."""

    answer: Answer = ok
    scopes: list[Scope] = field(default_factory=list)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.scopes.append(scope)
        await self.answer(receive, send)

    def headers(self, name: str) -> list[str]:
        return [value.decode() for key, value in self.scopes[-1]["headers"] if key.decode() == name]


async def own(scope: Scope, receive: Receive, send: Send) -> None:
    del scope, receive
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"answered here"})


@asynccontextmanager
async def front_end(
    uds: Path, trusted: str = "", slow_reader_timeout_s: float = SLOW_READER_TIMEOUT_S
) -> AsyncIterator[httpx.AsyncClient]:
    """A client of a further process that passes on all but `/here`."""
    passing_on = PassingOn(own, uds, lambda path: path == "/here", slow_reader_timeout_s)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        async with (
            served(passing_on, listener, trusted),
            httpx.AsyncClient(base_url=url, trust_env=False, timeout=TIMEOUT_S) as client,
        ):
            yield client
        await passing_on.close()


@asynccontextmanager
async def both(first: ASGIApp, folder: Path, trusted: str = "") -> AsyncIterator[httpx.AsyncClient]:
    async with first_process(first, folder), front_end(folder / "first.sock", trusted) as client:
        yield client


@asynccontextmanager
async def first_process(first: ASGIApp, folder: Path) -> AsyncIterator[None]:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(folder / "first.sock"))
        async with served(first, listener, trusted="*"):
            yield


async def whole_body(receive: Receive) -> bytes:
    parts, more = [], True
    while more:
        message = await receive()
        assert message["type"] == "http.request"
        parts.append(message.get("body", b""))
        more = message.get("more_body", False)
    return b"".join(parts)


def head(status: int = 200, *headers: tuple[bytes, bytes]) -> Message:
    return {"type": "http.response.start", "status": status, "headers": list(headers)}


def part(data: bytes) -> Message:
    return {"type": "http.response.body", "body": data, "more_body": True}


async def test_a_request_and_its_answer_pass_as_they_are(tmp_path: Path) -> None:
    bodies: list[bytes] = []

    async def answer(receive: Receive, send: Send) -> None:
        bodies.append(await whole_body(receive))
        await send(head(409, (b"set-cookie", b"a=1"), (b"set-cookie", b"b=2"), (b"x-request-id", b"r-1")))
        await send(part(b"no, "))
        await send({"type": "http.response.body", "body": b"not now"})

    first = First(answer)
    async with both(first, tmp_path) as client:
        request = client.build_request(
            "PATCH", "/admin/tenants/a%2Fb%20c?dry=%31&dry=2", content=b"{}", headers={"authorization": "Bearer k"}
        )
        answered = await client.send(request)
    scope = first.scopes[0]
    assert (scope["method"], scope["raw_path"], scope["query_string"]) == (
        "PATCH", b"/admin/tenants/a%2Fb%20c", b"dry=%31&dry=2",
    )  # fmt: skip
    assert (bodies, first.headers("authorization"), first.headers("host")) == (
        [b"{}"], ["Bearer k"], [request.headers["host"]],
    )  # fmt: skip
    assert (answered.status_code, answered.text, answered.headers["x-request-id"]) == (409, "no, not now", "r-1")
    assert answered.headers.get_list("set-cookie") == ["a=1", "b=2"]
    assert len(answered.headers.get_list("date")) == 1


async def test_nothing_is_added_to_a_request_but_who_sent_it(tmp_path: Path) -> None:
    first = First()
    async with both(first, tmp_path) as client:
        request = client.build_request("GET", "/files")
        for name in ("accept", "accept-encoding", "user-agent"):
            del request.headers[name]
        await client.send(request)
    names = {name.decode() for name, _ in first.scopes[0]["headers"]}
    assert names - {"connection"} == {"host", "x-forwarded-for", "x-forwarded-proto"}


async def test_headers_of_one_connection_stay_there(tmp_path: Path) -> None:
    async def answer(receive: Receive, send: Send) -> None:
        del receive
        await send(head(200, (b"keep-alive", b"timeout=9"), (b"connection", b"x-hop"), (b"x-hop", b"1")))
        await send({"type": "http.response.body", "body": b""})

    first = First(answer)
    async with both(first, tmp_path) as client:
        said = {"connection": "keep-alive, X-Mine", "x-mine": "1", "te": "trailers", "proxy-authorization": "Basic x"}
        answered = await client.get("/files", headers=said)
    for name in ("x-mine", "te", "proxy-authorization"):
        assert first.headers(name) == []
    assert {"keep-alive", "x-hop"}.isdisjoint(answered.headers)


async def test_the_other_side_knows_the_client_and_not_what_the_client_says_it_is(tmp_path: Path) -> None:
    first = First()
    async with both(first, tmp_path) as client:
        await client.get("/files", headers={"x-forwarded-for": "6.6.6.6", "x-forwarded-proto": "https"})
    assert (first.scopes[0]["client"][0], first.scopes[0]["scheme"]) == ("127.0.0.1", "http")
    assert first.headers("x-forwarded-for") == ["127.0.0.1"]


async def test_a_client_behind_a_trusted_proxy_is_told_on(tmp_path: Path) -> None:
    first = First()
    said = [("x-forwarded-for", "6.6.6.6"), ("x-forwarded-for", "2001:db8::1"), ("x-forwarded-proto", "https")]
    async with both(first, tmp_path, trusted="127.0.0.1") as client:
        await client.get("/files", headers=said)
    assert (first.scopes[0]["client"][0], first.scopes[0]["scheme"]) == ("2001:db8::1", "https")


async def test_one_callers_cookies_do_not_reach_the_next(tmp_path: Path) -> None:
    async def answer(receive: Receive, send: Send) -> None:
        del receive
        await send(head(200, (b"set-cookie", b"session=mine; Path=/")))
        await send({"type": "http.response.body", "body": b""})

    first = First(answer)
    async with both(first, tmp_path) as client:
        await client.get("/files")
        client.cookies.clear()
        await client.get("/files")
    assert first.headers("cookie") == []


async def test_own_paths_are_answered_here_also_without_the_other_side(tmp_path: Path) -> None:
    async with front_end(tmp_path / "nobody.sock") as client:
        assert (await client.get("/here")).text == "answered here"


async def test_an_answer_streams(tmp_path: Path) -> None:
    seen = asyncio.Event()

    async def answer(receive: Receive, send: Send) -> None:
        del receive
        await send(head(200, (b"content-type", b"text/event-stream")))
        await send(part(b"data: one\n\n"))
        async with asyncio.timeout(TIMEOUT_S):
            await seen.wait()
        await send({"type": "http.response.body", "body": b"data: two\n\n"})

    async with both(First(answer), tmp_path) as client, client.stream("GET", "/v1/responses/r") as response:
        parts = []
        async for data in response.aiter_raw():
            parts.append(data)
            seen.set()
    assert parts == [b"data: one\n\n", b"data: two\n\n"]


@pytest.mark.parametrize("sized", [True, False])
async def test_an_upload_streams(tmp_path: Path, sized: bool) -> None:
    seen = asyncio.Event()
    received = hashlib.sha256()

    async def answer(receive: Receive, send: Send) -> None:
        more = True
        while more:
            message = await receive()
            received.update(message["body"])
            more = message["more_body"]
            seen.set()
        await send(head(204))
        await send({"type": "http.response.body", "body": b""})

    blocks = [bytes([number]) * MIB for number in range(64)]

    async def upload() -> AsyncIterator[bytes]:
        yield blocks[0]
        async with asyncio.timeout(TIMEOUT_S):
            await seen.wait()  # the other side has the first part before the last one is sent
        for block in blocks[1:]:
            yield block

    first = First(answer)
    headers = {"content-length": str(64 * MIB)} if sized else {}
    async with both(first, tmp_path) as client:
        answered = await client.post("/v1/files", content=upload(), headers=headers)
    assert answered.status_code == 204
    assert received.digest() == hashlib.sha256(b"".join(blocks)).digest()
    assert first.headers("content-length") == ([str(64 * MIB)] if sized else [])


async def test_an_upload_that_is_refused_early_has_its_answer(tmp_path: Path) -> None:
    async def answer(receive: Receive, send: Send) -> None:
        await receive()
        await send(head(413))
        await send({"type": "http.response.body", "body": b"too large"})

    async with both(First(answer), tmp_path) as client:
        answered = await client.post("/v1/files", content=b"x" * 32 * MIB)
        assert (answered.status_code, answered.text) == (413, "too large")
        assert (await client.get("/here")).status_code == 200


@dataclass
class Watching:
    """Answers a part if told to, then waits until its client has gone."""

    answers_first: bool
    begun: asyncio.Event = field(default_factory=asyncio.Event)
    left: asyncio.Event = field(default_factory=asyncio.Event)

    async def __call__(self, receive: Receive, send: Send) -> None:
        if self.answers_first:
            await send(head(200))
            await send(part(b"one"))
        while (message := await receive())["type"] != "http.disconnect":
            if message.get("body") or not message["more_body"]:
                self.begun.set()
        self.left.set()

    async def is_left(self) -> None:
        async with asyncio.timeout(TIMEOUT_S):
            await self.left.wait()


@pytest.mark.parametrize("answers_first", [True, False])
async def test_a_client_that_leaves_ends_the_request_there_too(tmp_path: Path, answers_first: bool) -> None:
    watching = Watching(answers_first)
    async with both(First(watching), tmp_path) as client:
        asking = asyncio.create_task(client.get("/v1/responses/r"))
        async with asyncio.timeout(TIMEOUT_S):
            await watching.begun.wait()
        asking.cancel()
        await watching.is_left()


async def test_a_client_that_leaves_in_its_upload_ends_the_request_there_too(tmp_path: Path) -> None:
    watching = Watching(answers_first=False)

    async def upload() -> AsyncIterator[bytes]:
        yield b"begun"
        await asyncio.Event().wait()

    async with both(First(watching), tmp_path) as client:
        asking = asyncio.create_task(client.post("/v1/files", content=upload()))
        async with asyncio.timeout(TIMEOUT_S):
            await watching.begun.wait()
        asking.cancel()
        await watching.is_left()


async def test_a_client_that_does_not_read_ends_the_request_there_too(tmp_path: Path) -> None:
    left = asyncio.Event()

    async def answer(receive: Receive, send: Send) -> None:
        await send(head(200))
        sending = asyncio.ensure_future(send(part(b"x" * MORE_THAN_BUFFERS_HOLD)))
        while (await receive())["type"] != "http.disconnect":
            pass
        left.set()
        await sending

    async with (
        first_process(First(answer), tmp_path),
        front_end(tmp_path / "first.sock", slow_reader_timeout_s=0.2) as client,
        client.stream("GET", "/v1/files/f/content"),
        asyncio.timeout(TIMEOUT_S),
    ):
        await left.wait()


async def test_where_nobody_listens_the_client_is_told_to_come_again(tmp_path: Path) -> None:
    async with front_end(tmp_path / "nobody.sock") as client:
        answered = await client.post("/v1/files", content=b"x" * MIB)
    assert (answered.status_code, answered.headers["retry-after"]) == (503, "1")
    assert answered.json()["error"] == {
        "message": "The server is starting or stopping. Please try again.",
        "type": "server_error",
        "param": None,
        "code": "engine_not_ready",
    }


@asynccontextmanager
async def broken_first(folder: Path, says: bytes) -> AsyncIterator[None]:
    """Reads a request's head, says something, and is gone."""

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(says)
        writer.close()

    async with await asyncio.start_unix_server(connected, folder / "first.sock"):
        yield


async def test_a_first_process_that_dies_before_it_answers_is_a_503(tmp_path: Path) -> None:
    async with broken_first(tmp_path, b""), front_end(tmp_path / "first.sock") as client:
        answered = await client.get("/admin/overview")
    assert (answered.status_code, answered.json()["error"]["code"]) == (503, "engine_not_ready")


@pytest.mark.parametrize("framing", [b"content-length: 9", b"transfer-encoding: chunked"])
async def test_an_answer_that_breaks_off_is_not_taken_for_whole(tmp_path: Path, framing: bytes) -> None:
    says = b"HTTP/1.1 200 OK\r\n" + framing + b"\r\n\r\n" + (b"4\r\n" if b"chunked" in framing else b"") + b"half"
    async with broken_first(tmp_path, says), front_end(tmp_path / "first.sock") as client:
        with pytest.raises(httpx.RemoteProtocolError):
            await client.get("/v1/files/f/content")
