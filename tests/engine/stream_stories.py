"""What an engine may deliver for one streamed request, and what vLLM's own generators make of it."""

import asyncio
import copy
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st
from vllm.entrypoints.generate.base.protocol import RequestResponseMetadata
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion
from vllm.outputs import CompletionOutput, RequestOutput

_PROMPT = [1, 2, 3]


@dataclass(frozen=True)
class Story:
    """What the engine delivers for one request: outputs by item, then perhaps an error."""

    n: int
    items: Sequence[Sequence[CompletionOutput]]
    failure: str | None
    cached_tokens: int


async def _results(story: Story) -> AsyncGenerator[RequestOutput, None]:
    for number, outputs in enumerate(story.items):
        yield RequestOutput(
            request_id="r",
            prompt="prompt",
            prompt_token_ids=list(_PROMPT),
            prompt_logprobs=None,
            outputs=copy.deepcopy(list(outputs)),
            finished=number == len(story.items) - 1,
            num_cached_tokens=story.cached_tokens,
            num_cache_creation_tokens=0,
        )
    if story.failure is not None:
        raise RuntimeError(story.failure)


async def _numbered(story: Story) -> AsyncGenerator[tuple[int, RequestOutput], None]:
    async for result in _results(story):
        yield 0, result


class _Settings:
    """What the generators read of their endpoint, besides their own methods."""

    request_logger = None
    response_role = "assistant"
    parser_cls = None
    enable_log_outputs = False
    enable_log_deltas = False
    enable_per_request_metrics = False
    _include_reasoning_tokens_details = False
    enable_force_include_usage = False
    enable_prompt_tokens_details = True
    return_tokens_as_token_ids = False
    system_fingerprint = "fp"


class Chat(_Settings, OpenAIServingChat):
    def __init__(self) -> None:
        """Without an engine: only the generator is used."""


class Completions(_Settings, OpenAIServingCompletion):
    def __init__(self) -> None:
        """Without an engine: only the generator is used."""


_WORDS = st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=8)


@st.composite
def stories(draw: st.DrawFn) -> Story:
    n = draw(st.integers(1, 3))
    open_choices, items = list(range(n)), []
    for _ in range(draw(st.integers(0, 12))):
        chosen = draw(st.lists(st.sampled_from(open_choices), min_size=1, max_size=len(open_choices), unique=True))
        items.append([_output(draw, index) for index in chosen])
    failure = draw(st.sampled_from([None, None, "the engine died"]))
    if failure is None:
        items += [[_output(draw, index, draw(st.sampled_from(["stop", "length", "error"])))] for index in open_choices]
    return Story(n, items, failure, draw(st.integers(0, 3)))


def _output(draw: st.DrawFn, index: int, finish_reason: str | None = None) -> CompletionOutput:
    return CompletionOutput(
        index=index,
        text=draw(_WORDS),
        token_ids=draw(st.lists(st.integers(0, 9), max_size=3)),
        cumulative_logprob=None,
        logprobs=None,
        finish_reason=finish_reason,
        stop_reason="END" if finish_reason == "stop" else None,
    )


USAGE = st.sampled_from([None, {"include_usage": True}, {"include_usage": True, "continuous_usage_stats": True}])


async def _read(frames: AsyncIterator[str]) -> list[str]:
    return [frame async for frame in frames]


def chat_frames(chat: OpenAIServingChat, request: ChatCompletionRequest, story: Story) -> list[str]:
    metadata = RequestResponseMetadata(request_id="id")
    conversation: list[Any] = [{"role": "assistant", "content": "so far"}]
    frames = chat.chat_completion_stream_generator(
        request, _results(story), "id", 'a "text": model', conversation, None, metadata
    )
    read = asyncio.run(_read(frames))
    return [*read, repr(metadata.final_usage_info)]


def completion_frames(endpoint: OpenAIServingCompletion, request: CompletionRequest, story: Story) -> list[str]:
    metadata = RequestResponseMetadata(request_id="id")
    frames = endpoint.completion_stream_generator(
        request, [{}], _numbered(story), "id", 7, 'a "text": model', 1, None, metadata
    )
    read = asyncio.run(_read(frames))
    return [*read, repr(metadata.final_usage_info)]


def words(count: int) -> Story:
    outputs = [[CompletionOutput(0, f"word{i}", [i], None, None)] for i in range(count)]
    return Story(1, [*outputs, [CompletionOutput(0, "", [0], None, None, finish_reason="stop")]], None, 0)
