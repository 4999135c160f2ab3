"""Streams of plain text without vLLM's cost per token.

vLLM builds two pydantic objects and dumps JSON for every token. In a stream without tools, reasoning, logprobs or token
ids, all frames between the first and the last differ in their text alone. So vLLM's own generator makes the frames that
open the stream, the first frame of each choice and everything that ends it, errors included; from that first frame of a
choice the text before and after the words is learnt, and the frames between are put together from it.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from json.decoder import scanstring  # type: ignore[attr-defined]  # public in the module, unknown to typeshed
from json.encoder import encode_basestring
from typing import Any, Final, Generic, TypeVar

from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion
from vllm.entrypoints.serve.utils.api_utils import should_include_usage
from vllm.outputs import CompletionOutput, RequestOutput

from server.engine.calls import DirectFrames, Write
from server.engine.progress import progress_here
from server.engine.shortcut import DELIVERED, Delivered, open_shortcut

_CHAT_TEXT: Final = '"delta":{"content":'
_COMPLETION_TEXT: Final = '"text":'

Item = TypeVar("Item")
Frames = AsyncGenerator[str, None]
Outputs = Sequence[tuple[int, CompletionOutput]]


@dataclass(frozen=True, slots=True)
class Shape(Generic[Item]):
    """How one endpoint writes: the key in front of the text, how many frames open a stream, what an item holds.

    `one_engine_request`: all items come from the same one.
    """

    text_key: str
    opening_frames: int
    outputs: Callable[[Item], Outputs]
    one_engine_request: bool


@dataclass(slots=True)
class _Choice:
    """A choice's frame around its text, and the tokens that vLLM's generator has not seen."""

    before: bytes
    after: bytes
    unseen: list[int] = field(default_factory=list)

    def framed(self, text: str) -> bytes:
        return b"%b%b%b" % (self.before, encode_basestring(text).encode(), self.after)

    def frame(self, output: CompletionOutput) -> str:
        """The frame, which vLLM's generator will not see the tokens of."""
        self.unseen += output.token_ids
        return self.framed(output.text).decode()


class _Feed(Generic[Item]):
    """The engine's items as vLLM's generator gets them.

    `ran_dry`: it has asked for an item that was not pushed. That happens once it has nothing left to write, or when it
    wrote less than was thought; from then on it gets every item.
    """

    def __init__(self, items: AsyncIterator[Item], outputs: Callable[[Item], Outputs]) -> None:
        self._items = items
        self._outputs = outputs
        self._pushed: Item | None = None
        self._failure: Exception | None = None
        self.choices: dict[int, _Choice] = {}
        self.ran_dry = False

    def __aiter__(self) -> _Feed[Item]:
        return self

    async def __anext__(self) -> Item:
        item, self._pushed = self._pushed, None
        if item is None:
            self.ran_dry = True
            if self._failure is not None:
                raise self._failure
            item = await anext(self._items)
        for index, output in self._outputs(item):
            if (choice := self.choices.get(index)) is not None and choice.unseen:
                output.token_ids = [*choice.unseen, *output.token_ids]  # vLLM's generator counts them
                choice.unseen = []
        return item

    def push(self, item: Item) -> None:
        self._pushed = item

    async def pull(self) -> Item | None:
        """The next item, or None at the end. An error is kept for vLLM's generator, which writes it into the stream."""
        try:
            return await anext(self._items)
        except StopAsyncIteration:
            return None
        except Exception as error:  # noqa: BLE001  # raised again where vLLM's generator asks for the next item
            self._failure = error
            return None


class SplicedFrames(DirectFrames, Generic[Item]):
    """The frames of `vllm_frames(items)`, most of them made here."""

    def __init__(
        self, items: AsyncIterator[Item], vllm_frames: Callable[[AsyncIterator[Item]], Frames], shape: Shape[Item]
    ) -> None:
        self._shape = shape
        self._feed = _Feed(items, shape.outputs)
        self._frames = self._spliced(vllm_frames)
        self._write: Write | None = None

    def __aiter__(self) -> SplicedFrames[Item]:
        return self

    def __anext__(self) -> Awaitable[str]:
        return anext(self._frames)

    def aclose(self) -> Awaitable[None]:
        return self._frames.aclose()

    def flow_to(self, write: Write) -> None:
        """See `DirectFrames`."""
        if self._shape.one_engine_request:
            self._write = write

    async def _spliced(self, vllm_frames: Callable[[AsyncIterator[Item]], Frames]) -> Frames:
        feed, shape = self._feed, self._shape
        choices, due, direct = feed.choices, shape.opening_frames, False
        async with aclosing(vllm_frames(feed)) as theirs:
            while not feed.ran_dry and (item := await feed.pull()) is not None:
                outputs = shape.outputs(item)
                if self._is_plain(outputs):
                    for index, output in outputs:
                        yield choices[index].frame(output)
                    direct = direct or self._opened()
                    continue
                feed.push(item)
                frame = ""
                for _ in range(due + len(outputs)):
                    frame = await anext(theirs, "")
                    if frame:
                        yield frame
                due = 0
                _learn(frame, outputs, choices, shape.text_key)
            async for frame in theirs:
                yield frame

    def _is_plain(self, outputs: Outputs) -> bool:
        """Whether all that these outputs become is text between what was learnt."""
        choices = self._feed.choices
        return bool(outputs) and all(index in choices and output.finish_reason is None for index, output in outputs)

    def _opened(self) -> bool:
        """Open the shortcut, once there is somewhere to write to."""
        if self._write is None or (progress := progress_here()) is None or not progress.states:
            return False
        open_shortcut(progress.states, self._deliver, self._hold)
        return True

    def _deliver(self, index: int, text: str, token_ids: Sequence[int]) -> Delivered | None:
        """Write what a text becomes, if that is plain. The task waits meanwhile, so the frames keep their order."""
        feed, write = self._feed, self._write
        choice = feed.choices.get(index)
        if choice is None or feed.ran_dry:
            return None
        assert write is not None
        try:
            rest = write(choice.framed(text))
        except Exception:  # noqa: BLE001  # it is met again where the frame is sent the long way
            return None
        choice.unseen += token_ids
        return DELIVERED if rest is None else Delivered(rest)

    def _hold(self, index: int, token_ids: Sequence[int]) -> bool:
        """Count tokens whose text comes later. vLLM's generator will not see them."""
        choice = self._feed.choices.get(index)
        if choice is None or self._feed.ran_dry:
            return False
        choice.unseen += token_ids
        return True


def _learn(frame: str, outputs: Outputs, choices: dict[int, _Choice], text_key: str) -> None:
    """Take a choice's frame apart, if it is surely the one for this output, with tokens, and not its last.

    Before a choice has tokens, vLLM leaves out its empty frames.
    """
    if len(outputs) != 1 or (start := frame.find(text_key)) < 0:
        return
    (index, output), start = outputs[0], start + len(text_key)
    if output.finish_reason is not None or not output.token_ids or frame[start] != '"':
        return
    text, end = scanstring(frame, start + 1)
    if text == output.text:
        choices[index] = _Choice(frame[:start].encode(), frame[end:].encode())


def splice_chat(chat: OpenAIServingChat, parses: Callable[[ChatCompletionRequest], bool]) -> None:
    """Put spliced streams into a chat endpoint. `parses` tells whether a tool or reasoning parser reads the answer."""
    whole = chat.chat_completion_stream_generator

    def stream(
        request: ChatCompletionRequest,
        result_generator: AsyncIterator[RequestOutput],
        request_id: str,
        model_name: str,
        conversation: list[Any],
        tokenizer: Any,
        request_metadata: Any,
        chat_template_kwargs: dict[str, Any] | None = None,
        mm_token_counts: dict[str, int] | None = None,
    ) -> Frames | SplicedFrames[Any]:
        def vllm_frames(items: AsyncIterator[RequestOutput]) -> Frames:
            return whole(
                request,
                items,
                request_id,
                model_name,
                conversation,
                tokenizer,
                request_metadata,
                chat_template_kwargs=chat_template_kwargs,
                mm_token_counts=mm_token_counts,
            )

        same_frames = not (request.logprobs or request.echo or request.return_token_ids or parses(request))
        if not same_frames or _counts_in_frames(request, chat) or chat.enable_log_outputs:
            return vllm_frames(result_generator)
        shape: Shape[RequestOutput] = Shape(
            _CHAT_TEXT,
            request.n or 1,
            lambda item: [(output.index, output) for output in item.outputs],
            one_engine_request=True,
        )
        return SplicedFrames(result_generator, vllm_frames, shape)

    chat.chat_completion_stream_generator = stream


def splice_completions(completions: OpenAIServingCompletion) -> None:
    """Put spliced streams into the completions endpoint."""
    whole = completions.completion_stream_generator

    def stream(
        request: CompletionRequest,
        engine_inputs: list[Any],
        result_generator: AsyncIterator[tuple[int, RequestOutput]],
        request_id: str,
        created_time: int,
        model_name: str,
        num_prompts: int,
        tokenizer: Any,
        request_metadata: Any,
    ) -> Frames | SplicedFrames[Any]:
        def vllm_frames(items: AsyncIterator[tuple[int, RequestOutput]]) -> Frames:
            return whole(
                request,
                engine_inputs,
                items,
                request_id,
                created_time,
                model_name,
                num_prompts=num_prompts,
                tokenizer=tokenizer,
                request_metadata=request_metadata,
            )

        if request.logprobs is not None or request.return_token_ids or _counts_in_frames(request, completions):
            return vllm_frames(result_generator)
        choices = request.n or 1
        shape: Shape[tuple[int, RequestOutput]] = Shape(
            _COMPLETION_TEXT,
            0,
            lambda item: [(output.index + item[0] * choices, output) for output in item[1].outputs],
            one_engine_request=num_prompts == 1,
        )
        return SplicedFrames(result_generator, vllm_frames, shape)

    completions.completion_stream_generator = stream


def _counts_in_frames(request: Any, endpoint: Any) -> bool:
    """Whether every frame carries the usage so far."""
    _, continuous = should_include_usage(request.stream_options, endpoint.enable_force_include_usage)
    return continuous
