"""One ASGI exchange whose client reads, waits and leaves as a test says, and the service that answers it."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from starlette.requests import Request
from starlette.types import ASGIApp, Message, Scope

from server.api.answer import OwnedResponse, WireLimits
from server.api.errors import Dialect
from server.serving.engine_slot import EngineSlot
from server.serving.requests import OpenRequests
from tests.serving.fake_stack import FakeStack, Operation, StreamingOperation, new_service, slot_with

CHAT = "/v1/chat/completions"
TIMEOUT_S = 5.0


def at_the_head(message: Message) -> bool:
    return bool(message["type"] == "http.response.start")


def at_frame(text: str) -> Callable[[Message], bool]:
    return lambda message: text.encode() in message.get("body", b"")


def at_the_end(message: Message) -> bool:
    return message["type"] == "http.response.body" and not message.get("more_body", False)


class ScriptedClient:
    """Calls an ASGI application once, and keeps what it sends.

    `leaves_at` decides for every sent message whether the client leaves while it is being sent.
    """

    def __init__(
        self,
        method: str = "POST",
        path: str = CHAT,
        body: bytes = b"{}",
        leaves_at: Callable[[Message], bool] = lambda _: False,
    ) -> None:
        self.sent: list[Message] = []
        self._body: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]
        self._leaves_at = leaves_at
        self._gone = asyncio.Event()
        self._progress = asyncio.Condition()
        self.scope: Scope = {
            "type": "http",
            "method": method,
            "path": path,
            "query_string": b"",
            "headers": [(b"content-type", b"application/json")],
            "path_params": {},
            "state": {"request_id": "id-1"},
        }

    async def receive(self) -> Message:
        """The body, then nothing until the client leaves or has the whole answer: that is how uvicorn does it."""
        if self._body:
            return self._body.pop(0)
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        self.sent.append(message)
        async with self._progress:
            self._progress.notify_all()
        if self._leaves_at(message):
            self.leave()
            await asyncio.sleep(0.01)  # what is being sent takes its time to go out
        if at_the_end(message):
            self._gone.set()

    def receive_first(self, *messages: Message) -> None:
        """Let the server receive this instead of a body."""
        self._body = list(messages)

    def leave(self) -> None:
        self._gone.set()

    def call(self, app: ASGIApp) -> "asyncio.Task[None]":
        return asyncio.create_task(self._call(app))

    async def _call(self, app: ASGIApp) -> None:
        await app(self.scope, self.receive, self.send)

    async def until_it_has(self, text: str) -> None:
        """Wait until the text is in what was sent."""
        async with asyncio.timeout(TIMEOUT_S), self._progress:
            await self._progress.wait_for(lambda: text in self.text)

    @property
    def status(self) -> int:
        status: int = self.sent[0]["status"]
        return status

    @property
    def headers(self) -> dict[str, str]:
        return {name.decode(): value.decode() for name, value in self.sent[0]["headers"]}

    @property
    def text(self) -> str:
        return b"".join(message.get("body", b"") for message in self.sent).decode()

    @property
    def complete(self) -> bool:
        """One head, then bodies, and an end."""
        kinds = [message["type"] for message in self.sent]
        one_head = kinds == ["http.response.start", *["http.response.body"] * (len(kinds) - 1)]
        return one_head and [at_the_end(message) for message in self.sent] == [False] * (len(kinds) - 1) + [True]


@dataclass
class Desk:
    """A service on one operation, and the responses it gives."""

    operation: Operation
    dialect: Dialect = "openai"
    limits: WireLimits = field(default_factory=lambda: WireLimits(100, keep_alive_s=60, slow_reader_timeout_s=60))
    requests: OpenRequests = field(default_factory=OpenRequests)
    slot: EngineSlot | None = None

    def answer(self, client: ScriptedClient) -> "asyncio.Task[None]":
        """Let a client call; its exchange runs in a task of its own, as in uvicorn."""
        stack = FakeStack({(client.scope["method"], CHAT): self.operation}, uses_tools=False)
        service = new_service(self.slot or slot_with(stack), self.requests)
        request = Request(client.scope, client.receive)
        return client.call(OwnedResponse(service, self.limits, request, CHAT, self.dialect))

    async def answered(self, client: ScriptedClient) -> ScriptedClient:
        await asyncio.wait_for(self.answer(client), TIMEOUT_S)
        assert client.complete
        return client


def left_behind(client: ScriptedClient) -> bool:
    """Whether the access log will say that the client left."""
    gone: bool = client.scope["state"]["open_request"].client_left
    return gone


@asynccontextmanager
async def nothing_left_over(desk: Desk) -> AsyncIterator[None]:
    """Whatever happens inside: no request stays open, no task stays behind, and the engine's work is closed once."""
    before = asyncio.all_tasks()
    yield
    assert len(desk.requests) == 0
    if isinstance(desk.operation, StreamingOperation):
        assert (desk.operation.closed, desk.operation.freed) == (desk.operation.streams, desk.operation.started)
    await asyncio.sleep(0)  # a cancelled task ends at its next turn
    assert asyncio.all_tasks() == before
