"""Streams whose frames are written where the engine's outputs arrive: the same frames in the same order."""

import asyncio
import copy
import json
from collections.abc import AsyncGenerator, Awaitable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.entrypoints.generate.base.protocol import RequestResponseMetadata
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest, FinishReason
from vllm.v1.engine.detokenizer import IncrementalDetokenizer
from vllm.v1.engine.output_processor import OutputProcessor, RequestOutputCollector
from vllm.v1.engine.parallel_sampling import ParentRequest

from server.engine.calls import Frame
from server.engine.plain_streams import SplicedFrames, splice_chat
from server.engine.progress import Progress, follow_requests, followed
from tests.engine.stream_stories import Chat, Story, chat_frames, stories, words

pytestmark = [pytest.mark.engine, pytest.mark.usefixtures("still_clock")]


@dataclass
class Connection:
    """Where frames go: now and then it is full, or broken for a frame that does not take the long way."""

    full: set[int] = field(default_factory=set)
    broken: set[int] = field(default_factory=set)
    frames: list[str] = field(default_factory=list)
    at_once: int = 0
    room: asyncio.Event | None = None

    async def send(self, frame: Frame) -> None:
        assert isinstance(frame, str)
        self.frames.append(frame)

    def write(self, frame: bytes) -> Awaitable[None] | None:
        self.at_once += 1
        if self.at_once in self.broken:
            raise OSError("broken")
        self.frames.append(frame.decode())
        return self._until_there_is_room() if self.at_once in self.full else None

    async def _until_there_is_room(self) -> None:
        await asyncio.sleep(0)
        if self.room is not None:
            await self.room.wait()


class Script(IncrementalDetokenizer):
    """Instead of a tokenizer: the text of a sequence's tokens, as the story has it."""

    said = ""

    def get_next_output_text(self, finished: bool, delta: bool) -> str:  # noqa: ARG002  # the names are vLLM's
        said, self.said = self.said, ""
        return said


class Engine:
    """The engine's side of one request: vLLM's output processor, and what `AsyncLLM.generate` does around it."""

    def __init__(self, n: int = 1, cached_tokens: int = 0, stream_interval: int = 1) -> None:
        self._params = SamplingParams(n=n, output_kind=RequestOutputKind.DELTA, detokenize=False)
        self._cached_tokens = cached_tokens
        self._processor = OutputProcessor(None, log_stats=False, stream_interval=stream_interval)
        follow_requests(self._processor)
        self.progress = Progress()
        self.woken = 0

    def put(self, outputs: Sequence[CompletionOutput]) -> None:
        states = self._processor.request_states
        made = []
        for output in outputs:
            state = states[str(output.index)]
            assert isinstance(state.detokenizer, Script)
            state.detokenizer.said += output.text
            reason = None if output.finish_reason is None else FinishReason[output.finish_reason.upper()]
            tokens = list(output.token_ids)
            made.append(
                EngineCoreOutput(str(output.index), tokens, finish_reason=reason, stop_reason=output.stop_reason)
            )
        self._processor.process_outputs(made)

    def fail(self, error: Exception) -> None:
        self._processor.propagate_error(error)

    async def outputs(self) -> AsyncGenerator[RequestOutput, None]:
        collector = RequestOutputCollector(RequestOutputKind.DELTA, "r")
        whole = self._request("r", self._params)
        parent = ParentRequest(whole) if self._params.n > 1 else None
        for index in range(self._params.n):
            if parent is not None:
                parent.child_requests.add(str(index))
            self._processor.add_request(self._request(str(index), self._params), "prompt", parent, index, collector)
            state = self._processor.request_states[str(index)]
            state.detokenizer, state.num_cached_tokens = Script(), self._cached_tokens
        finished = False
        while not finished:
            output = collector.get_nowait() or await collector.get()
            assert isinstance(output, RequestOutput)
            self.woken += 1
            finished = output.finished
            yield output

    @staticmethod
    def _request(request_id: str, params: SamplingParams) -> EngineCoreRequest:
        request = EngineCoreRequest(request_id, [1, 2, 3], None, params, None, 0.0, None, None, None)
        request.external_req_id = "r"
        return request


async def _answered(engine: Engine, connection: Connection, request: ChatCompletionRequest) -> None:
    """What a request's task does: the first frame goes out by itself, and then the others may."""
    chat = Chat()
    splice_chat(chat, lambda _: False)
    items, conversation = followed(engine.progress, engine.outputs)(), [{"role": "assistant", "content": "so far"}]
    frames = chat.chat_completion_stream_generator(
        request, items, "id", 'a "text": model', conversation, None, RequestResponseMetadata(request_id="id")
    )
    assert isinstance(frames, SplicedFrames)
    await connection.send(await anext(frames))
    frames.flow_to(connection.write)
    async for frame in frames:
        await connection.send(frame)


async def _streamed(story: Story, request: ChatCompletionRequest, connection: Connection) -> Engine:
    engine = Engine(story.n, story.cached_tokens)
    answering = asyncio.create_task(_answered(engine, connection, request))
    for outputs in story.items:
        await _settled()
        engine.put(outputs)
    await _settled()
    if story.failure is not None:
        engine.fail(RuntimeError(story.failure))
    await asyncio.wait_for(answering, 5)
    return engine


def _request(n: int = 1, usage: Any = None) -> ChatCompletionRequest:
    asked = {"messages": [{"role": "user", "content": "Hi"}], "stream": True, "n": n, "stream_options": usage}
    return ChatCompletionRequest.model_validate(asked)


async def _settled() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


_NUMBERS = st.sets(st.integers(1, 12), max_size=6)


@settings(max_examples=200, deadline=None)
@given(story=stories(), usage=st.sampled_from([None, {"include_usage": True}]), full=_NUMBERS, broken=_NUMBERS)
def test_the_frames_are_those_that_vllm_writes(story: Story, usage: Any, full: set[int], broken: set[int]) -> None:
    theirs = chat_frames(Chat(), _request(story.n, usage), story)
    connection = Connection(full, broken)
    asyncio.run(_streamed(copy.deepcopy(story), _request(story.n, usage), connection))
    assert connection.frames == theirs[:-1]  # the last is the usage that is noted


def test_a_stream_wakes_its_task_for_the_first_outputs_and_the_last() -> None:
    connection = Connection()
    engine = asyncio.run(_streamed(words(100), _request(), connection))
    assert (engine.woken, connection.at_once) == (3, 98)
    assert len(connection.frames) == 1 + 100 + 1 + 1  # the role, the words, the finish, [DONE]


def test_outputs_that_come_while_the_connection_is_full_wait_for_it() -> None:
    async def run() -> list[str]:
        engine, connection = Engine(), Connection(full={1}, room=asyncio.Event())
        answering = asyncio.create_task(_answered(engine, connection, _request()))
        for word in ("a", "b", "c", "d", "e"):
            await _settled()
            engine.put([CompletionOutput(0, word, [1], None, None)])
        await _settled()
        assert _texts(connection) == ["", "a", "b", "c"]  # c is on its way
        assert connection.room is not None
        connection.room.set()
        await _settled()
        engine.put([CompletionOutput(0, "", [1], None, None, finish_reason="stop")])
        await asyncio.wait_for(answering, 5)
        return _texts(connection)

    assert asyncio.run(run()) == ["", "a", "b", "c", "de", ""]


def test_several_tokens_to_a_frame_are_vllms_own_matter() -> None:
    async def run() -> tuple[list[str], int]:
        engine, connection = Engine(stream_interval=3), Connection()
        answering = asyncio.create_task(_answered(engine, connection, _request()))
        for outputs in words(8).items:
            await _settled()
            engine.put(outputs)
        await asyncio.wait_for(answering, 5)
        return _texts(connection), connection.at_once

    assert asyncio.run(run()) == (["", "word0", "word1word2word3", "word4word5word6", "word7"], 0)


def test_a_task_that_is_cancelled_gets_no_more_frames() -> None:
    async def run() -> list[str]:
        engine, connection = Engine(), Connection()
        answering = asyncio.create_task(_answered(engine, connection, _request()))
        for word in ("a", "b", "c"):
            await _settled()
            engine.put([CompletionOutput(0, word, [1], None, None)])
        answering.cancel()
        await asyncio.wait({answering})
        engine.put([CompletionOutput(0, "d", [1], None, None)])
        return _texts(connection)

    assert asyncio.run(run()) == ["", "a", "b", "c"]


def _texts(connection: Connection) -> list[str]:
    datas = [frame.removeprefix("data: ") for frame in connection.frames]
    deltas = [json.loads(data)["choices"][0]["delta"] for data in datas if data != "[DONE]\n\n"]
    return [delta.get("content", "") for delta in deltas]
