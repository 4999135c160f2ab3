"""Spliced streams against vLLM's own generators: the same bytes for the same outputs, whatever they are."""

from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.outputs import RequestOutput

from server.engine.plain_streams import splice_chat, splice_completions
from tests.engine.stream_stories import (
    USAGE,
    Chat,
    Completions,
    Story,
    chat_frames,
    completion_frames,
    stories,
    words,
)

pytestmark = [pytest.mark.engine, pytest.mark.usefixtures("still_clock")]


@settings(max_examples=200, deadline=None)
@given(story=stories(), usage=USAGE, echo=st.booleans())
def test_a_chat_stream_is_what_vllm_writes_byte_for_byte(story: Story, usage: Any, echo: bool) -> None:
    asked = {"messages": [{"role": "user", "content": "Hi"}], "stream": True, "n": story.n, "stream_options": usage}
    request = ChatCompletionRequest.model_validate({**asked, "echo": echo})
    theirs, ours = Chat(), Chat()
    splice_chat(ours, lambda _: False)
    assert chat_frames(ours, request, story) == chat_frames(theirs, request, story)


@settings(max_examples=200, deadline=None)
@given(story=stories(), usage=USAGE, echo=st.booleans())
def test_a_completion_stream_is_what_vllm_writes_byte_for_byte(story: Story, usage: Any, echo: bool) -> None:
    asked = {"prompt": "Hi", "stream": True, "n": story.n, "stream_options": usage, "max_tokens": 9, "echo": echo}
    request = CompletionRequest.model_validate(asked)
    theirs, ours = Completions(), Completions()
    splice_completions(ours)
    assert completion_frames(ours, request, story) == completion_frames(theirs, request, story)


class _CountingChat(Chat):
    """Counts what reaches vLLM's own generator."""

    def __init__(self) -> None:
        self.items = 0

    async def chat_completion_stream_generator(
        self, request: Any, result_generator: AsyncIterator[RequestOutput], *args: Any, **kwargs: Any
    ) -> AsyncGenerator[str, None]:
        async def counted() -> AsyncGenerator[RequestOutput, None]:
            async for item in result_generator:
                self.items += 1
                yield item

        async for frame in super().chat_completion_stream_generator(request, counted(), *args, **kwargs):
            yield frame


@pytest.mark.parametrize(("parses", "reach_vllm"), [(False, 2), (True, 101)])
def test_only_the_first_and_the_last_output_cost_what_vllm_costs(parses: bool, reach_vllm: int) -> None:
    chat = _CountingChat()
    splice_chat(chat, lambda _: parses)
    request = ChatCompletionRequest.model_validate({"messages": [{"role": "user", "content": "Hi"}], "stream": True})
    frames = chat_frames(chat, request, words(100))
    assert len(frames) == 1 + 100 + 1 + 1 + 1  # the role, the words, the finish, [DONE], and the usage noted
    assert chat.items == reach_vllm
