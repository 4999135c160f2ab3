"""Ollama's official client against the real application, with answers that the test scripts."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import httpx
import ollama
import pytest

from server.engine.calls import Call, Reply, StreamReply
from server.engine.traits import Traits
from server.policy.refusals import ContextLengthExceeded, GenerationFailed
from tests.api.running_application import running
from tests.serving.fake_stack import ERROR_FRAME, FakeStack, StreamingOperation, refusal_in

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
EMBEDDINGS = "/v1/embeddings"
HI = [{"role": "user", "content": "Hi"}]
USAGE = {"prompt_tokens": 5, "completion_tokens": 2}


class Scripted:
    """Answers whole or in frames, and keeps the bodies it was asked with."""

    def __init__(self, *deltas: dict[str, Any], finish: str = "stop", breaks: bool = False) -> None:
        self.bodies: list[dict[str, Any]] = []
        self._deltas = deltas
        self._finish = finish
        self._breaks = breaks

    async def __call__(self, call: Call) -> Reply | StreamReply:
        body = call.body or {}
        self.bodies.append(body)
        if body.get("stream"):
            return StreamReply(Frames(self._frames()), "text/event-stream", refusal_in)
        message = {"role": "assistant", **self._deltas[0]}
        choice = {"index": 0, "message": message, "text": message.get("content"), "finish_reason": self._finish}
        return _reply({"choices": [choice], "usage": USAGE})

    def _frames(self) -> Iterator[str]:
        for delta in self._deltas:
            yield _frame({"choices": [{"index": 0, "delta": delta, "text": delta.get("content")}]})
        if self._breaks:
            yield ERROR_FRAME
        yield _frame({"choices": [{"index": 0, "delta": {}, "finish_reason": self._finish}]})
        yield _frame({"choices": [], "usage": USAGE})
        yield "data: [DONE]\n\n"


class Frames:
    """Cut where no event ends, as a stream from elsewhere may be."""

    def __init__(self, frames: Iterator[str]) -> None:
        self._pieces = (piece for frame in frames for piece in _halves(frame))
        self.closed = False

    def __aiter__(self) -> "Frames":
        return self

    async def __anext__(self) -> str:
        if (piece := next(self._pieces, None)) is None:
            raise StopAsyncIteration
        return piece

    async def aclose(self) -> None:
        self.closed = True


def _halves(frame: str) -> Sequence[str]:
    middle = len(frame) // 2
    return [frame] if frame == ERROR_FRAME else [frame[:middle], frame[middle:]]


def _frame(event: dict[str, Any]) -> str:
    return f"data: {json.dumps(event)}\n\n"


def _reply(answer: dict[str, Any]) -> Reply:
    return Reply(json.dumps(answer).encode(), "application/json")


def streamed(client: ollama.Client) -> list[ollama.ChatResponse]:
    return list(client.chat("a-model", HI, stream=True))


async def models(_: Call) -> Reply:
    cards = [
        {"id": "a-model", "created": 1_700_000_000},
        {"id": "an-adapter", "parent": "a-model", "created": 1_700_000_000},
    ]
    return _reply({"data": cards})


Ask = Callable[..., ollama.Client]


@pytest.fixture
def ask() -> Iterator[Ask]:
    """A client of a server on which one route answers with what the test scripts."""
    with ExitStack() as opened:

        def client(operation: Any, route: str = CHAT, key: str | None = None, **settings: Any) -> ollama.Client:
            traits = Traits("llama", generates=True, reasons=True, sees=False)
            stack = FakeStack({("POST", route): operation, ("GET", "/v1/models"): models}, traits=traits)
            served = opened.enter_context(running(stack, **settings))
            headers = {} if key is None else {"authorization": f"Bearer {key}"}
            asking = ollama.Client(str(served.base_url), headers=headers)
            opened.callback(asking._client.close)
            return asking

        yield client


def test_a_chat_is_answered_whole_with_its_figures(ask: Ask) -> None:
    answer = ask(Scripted({"content": "Hello."})).chat("a-model", HI, stream=False)
    assert (answer.model, answer.message.role, answer.message.content) == ("a-model", "assistant", "Hello.")
    assert (answer.done, answer.done_reason) == (True, "stop")
    assert (answer.prompt_eval_count, answer.eval_count) == (5, 2)
    assert (answer.total_duration or 0) > 0


def test_a_stream_ends_with_its_figures(ask: Ask) -> None:
    scripted = Scripted({"role": "assistant", "content": ""}, {"content": "Hel"}, {"content": "lo."}, finish="length")
    parts = list(ask(scripted).chat("a-model", HI, stream=True))
    assert "".join(part.message.content or "" for part in parts) == "Hello."
    assert [part.done for part in parts] == [False] * (len(parts) - 1) + [True]
    last = parts[-1]
    assert (last.done_reason, last.prompt_eval_count, last.eval_count) == ("length", 5, 2)
    assert last.total_duration is not None
    assert last.total_duration >= (last.prompt_eval_duration or 0) + (last.eval_duration or 0) > 0


def test_thinking_stands_beside_the_answer(ask: Ask) -> None:
    scripted = Scripted({"reasoning": "Hm."}, {"content": "Yes."})
    parts = list(ask(scripted).chat("a-model", HI, stream=True, think=True))
    assert "".join(part.message.thinking or "" for part in parts) == "Hm."
    assert scripted.bodies[0]["chat_template_kwargs"]["enable_thinking"] is True


def test_tool_calls_come_whole_with_arguments_as_an_object(ask: Ask) -> None:
    first = {"index": 0, "id": "c", "function": {"name": "weather", "arguments": '{"city": '}}
    rest = {"index": 0, "function": {"arguments": '"Paris"}'}}
    scripted = Scripted({"tool_calls": [first]}, {"tool_calls": [rest]}, finish="tool_calls")
    parts = list(ask(scripted).chat("a-model", HI, stream=True))
    calls = [call for part in parts for call in part.message.tool_calls or ()]
    assert [(call.function.name, call.function.arguments) for call in calls] == [("weather", {"city": "Paris"})]
    assert parts[-1].done_reason == "stop"


def test_several_tool_calls_are_numbered(ask: Ask) -> None:
    calls = [{"index": i, "id": f"c{i}", "function": {"name": "clock", "arguments": "{}"}} for i in (0, 1)]
    client = ask(Scripted({"content": None, "tool_calls": calls}))
    for stream in (False, True):
        body = {"model": "a-model", "messages": HI, "stream": stream}
        lines = [json.loads(line) for line in client._client.post("/api/chat", json=body).text.splitlines()]
        told = [call for line in lines for call in line["message"].get("tool_calls", [])]
        assert [(call["id"], call["function"]["index"]) for call in told] == [("c0", 0), ("c1", 1)]


def test_arguments_that_were_cut_short_are_shown_as_text(ask: Ask) -> None:
    cut = {"function": {"name": "weather", "arguments": '{"city": '}}
    answer = ask(Scripted({"content": None, "tool_calls": [cut]}, finish="length")).chat("a-model", HI)
    assert answer.message.tool_calls is not None
    assert answer.message.tool_calls[0].function.arguments == {"": '{"city": '}


def test_a_prompt_is_answered_as_a_response(ask: Ask) -> None:
    parts = list(ask(Scripted({"content": "Hel"}, {"content": "lo."})).generate("a-model", "Hi", stream=True))
    assert "".join(part.response or "" for part in parts) == "Hello."
    assert parts[-1].eval_count == 2


def test_a_raw_prompt_is_a_completion(ask: Ask) -> None:
    scripted = Scripted({"content": "three"})
    client = ask(scripted, COMPLETIONS)
    assert client.generate("a-model", "One, two,", raw=True).response == "three"
    assert next(iter(client.generate("a-model", "One, two,", raw=True, stream=True))).response == "three"
    assert scripted.bodies[0]["prompt"] == "One, two,"


def test_options_that_are_ignored_are_named_in_the_head(ask: Ask) -> None:
    client = ask(Scripted({"content": "Hello."}))
    body = {"model": "a-model", "messages": HI, "stream": False, "options": {"num_ctx": 9, "mirostat": 1}}
    answer = client._client.post("/api/chat", json=body)
    assert answer.headers["x-options-ignored"] == "mirostat,num_ctx"


@pytest.mark.parametrize("ask_for", [lambda client: client.chat("a-model", HI), streamed], ids=["whole", "stream"])
def test_an_error_before_the_first_token_is_a_status_with_a_sentence(
    ask: Ask, ask_for: Callable[[ollama.Client], Any]
) -> None:
    async def too_long(_: Call) -> Reply:
        raise ContextLengthExceeded("The chat is too long.")

    with pytest.raises(ollama.ResponseError) as raised:
        ask_for(ask(too_long))
    assert (raised.value.status_code, raised.value.error) == (400, "The chat is too long.")


def test_an_error_in_mid_stream_is_its_last_line(ask: Ask) -> None:
    operation = StreamingOperation()
    client = ask(Failing(operation))
    with pytest.raises(ollama.ResponseError, match="try again"):
        list(client.chat("a-model", HI, stream=True))


class Failing:
    """Frames of an engine that says one thing and fails."""

    def __init__(self, operation: StreamingOperation) -> None:
        self._operation = operation

    async def __call__(self, call: Call) -> StreamReply:
        self._operation.say(json.dumps({"choices": [{"delta": {"content": "Hel"}}]}))
        self._operation.fail(GenerationFailed("The model stopped. Please try again."))
        return await self._operation(call)


def test_a_model_that_is_not_there_is_a_404(ask: Ask) -> None:
    client = ask(Scripted({"content": ""}))
    for attempt in (lambda: client.show("nobody"), lambda: client.chat("nobody", [])):
        with pytest.raises(ollama.ResponseError, match="Served here: a-model") as raised:
            attempt()
        assert raised.value.status_code == 404


def test_the_tag_that_clients_add_is_taken_off(ask: Ask) -> None:
    scripted = Scripted({"content": "Hello."})
    answer = ask(scripted).chat("a-model:latest", HI)
    assert scripted.bodies[0]["model"] == "a-model"
    assert answer.model == "a-model:latest"


def test_a_chat_without_messages_finds_the_model_loaded(ask: Ask) -> None:
    client = ask(Scripted({"content": "never said"}))
    assert client.chat("a-model", []).done_reason == "load"
    assert client.generate("a-model", keep_alive=0).done_reason == "unload"
    assert [part.done for part in client.chat("a-model", [], stream=True)] == [True]


def test_the_models_are_listed_with_what_they_can_do(ask: Ask) -> None:
    client = ask(Scripted({"content": ""}))
    listed = client.list().models
    assert [model.model for model in listed] == ["a-model", "an-adapter"]
    assert listed[1].details is not None
    assert listed[1].details.parent_model == "a-model"
    assert [model.context_length for model in client.ps().models] == [4096, 4096]
    shown = client.show("a-model")
    assert shown.capabilities == ["completion", "tools", "thinking"]
    assert shown.modelinfo == {"general.architecture": "llama", "llama.context_length": 4096}


def test_texts_are_embedded(ask: Ask) -> None:
    async def embed(_: Call) -> Reply:
        return _reply({"data": [{"embedding": [1.0, 2.0]}], "usage": {"prompt_tokens": 3}})

    client = ask(embed, EMBEDDINGS)
    answer = client.embed("a-model", "a text")
    assert ([list(vector) for vector in answer.embeddings], answer.prompt_eval_count) == ([[1.0, 2.0]], 3)
    assert list(client.embeddings("a-model", "a text").embedding) == [1.0, 2.0]


def test_keys_count_here_as_everywhere(ask: Ask) -> None:
    scripted = Scripted({"content": "Hello."})
    assert ask(scripted, key="the-key", api_key=("the-key",)).chat("a-model", HI).message.content == "Hello."
    client = ask(scripted, api_key=("the-key",))
    for attempt in (lambda: client.chat("a-model", HI), client.list, lambda: client.show("a-model")):
        with pytest.raises(ollama.ResponseError) as raised:
            attempt()
        assert raised.value.status_code == 401


def test_models_are_not_pulled_by_clients(ask: Ask) -> None:
    with pytest.raises(ollama.ResponseError, match="operator chooses"):
        ask(Scripted({"content": ""})).pull("a-model")


def test_the_version_is_one_that_clients_can_compare() -> None:
    with running() as client:
        version = client.get("/api/version").json()["version"]
    assert all(part.isdigit() for part in version.split("."))


def test_while_the_model_loads_the_answer_says_when_to_come_back() -> None:
    with running() as client:
        for answer in (client.get("/api/tags"), client.post("/api/chat", json={"model": "a-model", "messages": HI})):
            assert answer.status_code == httpx.codes.SERVICE_UNAVAILABLE
            assert int(answer.headers["retry-after"]) >= 1
            assert set(answer.json()) == {"error"}
