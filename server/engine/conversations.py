"""Seam 1's conversation: a chat history on its way to tokens, with all that fitting it needs to know."""

import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from operator import add
from typing import Any

from cachetools import LRUCache
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
from vllm.exceptions import VLLMValidationError
from vllm.inputs import EngineInput
from vllm.renderers.chat_utils import ConversationMessage

from server.engine.counting import (
    MessageCounter,
    Overheads,
    has_media,
    message_text,
    plain_texts,
    text_bytes,
    utf8_bytes,
)
from server.engine.thinking import THINKING_ENDS, Spot, spots_in, without_thinking
from server.policy.refusals import ContextLengthExceeded

Rendered = tuple[list[ConversationMessage], list[EngineInput]]
RenderMessages = Callable[[list[Any]], Awaitable[Rendered]]
_READABLE_AGAIN = (str, list, dict)
_TOO_LONG_PARAMETERS = frozenset({"input_tokens", "input_text"})


@dataclass(frozen=True, slots=True)
class Costs:
    """Estimated prompt tokens: per message, and for all that is not a message (tool schemas, the template's own)."""

    messages: list[int]
    settled: list[int]  # the same when a later turn has begun, and thinking is left out
    fixed: int
    counted: int  # texts
    newly_counted: int  # of these, the ones that were not in the count cache


@dataclass(frozen=True)
class Conversation:
    """One chat history and the ways to measure and to render it.

    `bare_length` renders a short conversation and counts. `left_out` says where the template leaves thinking out.
    """

    messages: list[dict[str, Any]]
    tools: Sequence[Mapping[str, Any]]
    max_model_len: int
    counter: MessageCounter
    overheads: Overheads
    tool_tokens: LRUCache[str, int]
    bare_length: Callable[[list[dict[str, Any]], bool], Awaitable[int]]
    left_out: Callable[[], Awaitable[frozenset[Spot]]]
    render_messages: RenderMessages
    counts_only: bool  # asked how long it is: never to be fitted

    @cached_property
    def plain(self) -> list[str] | None:
        """The texts of a history in which every message is a role and a text, and none a tool's; None for any other."""
        return plain_texts(self.messages)

    @cached_property
    def _joined(self) -> str:
        return "\n".join(self.plain or ())

    def bytes_within(self, most: int) -> int | None:
        """At least the UTF-8 length of all that is printed; None if it is over `most`, or if media hide it."""
        total = len(json.dumps(self.tools, indent=4)) if self.tools else 0
        if self.plain is not None:
            total += utf8_bytes(self._joined)
            return total if total <= most else None
        for message in self.messages:
            length = text_bytes(message)
            if length is None or (total := total + length) > most:
                return None
        return total if total <= most else None

    def known_tokens(self) -> int | None:
        """What `costs` would add up to, found fast, for a history of plain texts that were all counted lately.

        None for any other. Thinking and tools have to be looked into.
        """
        if self.tools or self.plain is None or THINKING_ENDS in self._joined:
            return None
        counts = self.counter.known(self.plain)
        if counts is None:
            return None
        roles = [message["role"] for message in self.messages]
        return self.overheads.prompt + sum(counts) + self.overheads.around(roles)

    async def costs(self) -> Costs:
        """Estimates on the high side; see `server/engine/counting.py`."""
        fixed, around = self.overheads.prompt + await self._tool_tokens(), self._around()
        if self.plain is not None and THINKING_ENDS not in self._joined:
            counts, new = await self.counter.count_and_tell(self.plain)
            now = list(map(add, counts, around))
            return Costs(now, now, fixed, len(counts), new)
        texts = [message_text(message) for message in self.messages]
        shorter = await self._settled_texts()
        counts, new = await self.counter.count_and_tell([*texts, *shorter.values()])
        now = list(map(add, counts, around))
        for i, message in enumerate(self.messages):
            if type(message.get("content")) is not str and has_media(message):
                now[i] = around[i] + max(counts[i], await self._media_tokens(message))
        settled = now
        if shorter:
            settled = now.copy()
            for i, count in zip(shorter, counts[len(texts) :], strict=True):
                settled[i] = min(now[i], count + around[i])
        return Costs(now, settled, fixed, len(counts), new)

    def _around(self) -> list[int]:
        """What is printed around each message, in tokens."""
        by_role, other = self.overheads.by_role, self.overheads.largest
        return [by_role.get(message.get("role", ""), other) for message in self.messages]

    async def _settled_texts(self) -> dict[int, str]:
        """By index, what is printed of the answers that lose their thinking once the user speaks again."""
        spots = spots_in(self.messages)
        left_out = await self.left_out() if spots else frozenset()
        return {
            i: message_text(without_thinking(self.messages[i], spot[0]))
            for i, spot in spots.items()
            if spot in left_out
        }

    async def _media_tokens(self, message: dict[str, Any]) -> int:
        """A message with media costs what it costs alone: placeholders are as long there as anywhere."""
        return await self.bare_length([{"role": "user", "content": message["content"]}], False)

    async def _tool_tokens(self) -> int:
        """What the tool schemas add to a prompt, measured once for each set of tools."""
        if not self.tools:
            return 0
        key = json.dumps(self.tools, sort_keys=True)
        if key not in self.tool_tokens:
            probe = [{"role": "user", "content": "a"}]
            self.tool_tokens[key] = await self.bare_length(probe, True) - await self.bare_length(probe, False)
        return self.tool_tokens[key]

    async def render(self, kept: list[dict[str, Any]]) -> Rendered:
        """The tokens of the messages kept. Raises `ContextLengthExceeded` when they are too long."""
        try:
            return await self.render_messages(kept)
        except VLLMValidationError as error:
            if error.parameter in _TOO_LONG_PARAMETERS:
                raise ContextLengthExceeded(str(error.args[0]), param="messages") from error
            raise

    @staticmethod
    def prompt_tokens(rendered: Rendered) -> int:
        """The length of a rendered prompt, in tokens."""
        (engine_input,) = rendered[1]
        return len(engine_input["prompt_token_ids"])


def without_token_slicing(request: Any, render: RenderMessages) -> RenderMessages:
    """Responses with `truncation: auto` would be sliced by token inside vLLM; the history is fitted before."""
    if not isinstance(request, ResponsesRequest):
        return render

    async def sliced_never(kept: list[Any]) -> Rendered:
        asked, request.truncation = request.truncation, "disabled"
        try:
            return await render(kept)
        finally:
            request.truncation = asked

    return sliced_never


def materialized(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages with lists where pydantic left iterators, which can be read only once."""
    for message in messages:
        for field in ("content", "tool_calls"):
            value = message.get(field)
            if value is not None and not isinstance(value, _READABLE_AGAIN):
                message[field] = list(value)
    return messages


@dataclass(frozen=True, slots=True)
class TextPrompts:
    """The plain prompts of one completions request. `render_newest` keeps at most so many tokens of each."""

    prompts: list[Any]  # texts, or lists of token ids
    max_model_len: int
    counter: MessageCounter
    render_newest: Callable[[int | None], Awaitable[list[EngineInput]]]

    async def lengths(self) -> list[int]:
        """The tokens of each prompt."""
        texts = [prompt for prompt in self.prompts if isinstance(prompt, str)]
        counts = iter(await self.counter.count(texts))
        return [next(counts) if isinstance(prompt, str) else len(prompt) for prompt in self.prompts]


def plain_prompts(given: str | list[Any] | None) -> list[Any]:
    """A completions `prompt` in its four forms as a list of prompts."""
    if given is None:
        return []
    return [given] if isinstance(given, str) or (given and isinstance(given[0], int)) else given
