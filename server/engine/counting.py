"""Counts what each message of a history costs in tokens, without rendering the history.

A message costs the tokens of its text plus what the chat template prints around it. The first part is cached by
content, since chat clients send the same messages again with every turn; the second is measured once per role, on the
template itself. The sum is an estimate on the high side: templates drop text and rarely add any. What they drop most,
the thinking in earlier answers, is left out where that is certain (`thinking.py`).
"""

import asyncio
import copy
import json
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, cast

from vllm.renderers.chat_utils import has_non_text_content
from vllm.tokenizers import TokenizerLike

RenderLength = Callable[[list[dict[str, Any]]], Awaitable[int]]

_FALLBACK_OVERHEAD_TOKENS: Final = 16
_PROBE: Final = "a"
_SENTENCE: Final = "The tide is low, and rises."  # what stands around a text may merge with its first or last token
_TOKENS_OF_MERGING: Final = 1  # at the seams of a template two pieces of text can split differently than alone
_PLAIN_MESSAGE_FIELDS: Final = 2  # role and content
_MESSAGE_TEXT_FIELDS: Final = ("content", "reasoning", "reasoning_content", "refusal", "name")


@dataclass(frozen=True, slots=True)
class Overheads:
    """Tokens that a template prints: around one message by role, and once for the whole prompt."""

    by_role: Mapping[str, int]
    prompt: int

    def around(self, roles: list[str]) -> int:
        """Around all of so many messages."""
        counts = {role: roles.count(role) for role in self.by_role}
        others = len(roles) - sum(counts.values())
        return sum(count * self.by_role[role] for role, count in counts.items()) + others * self.largest

    @property
    def largest(self) -> int:
        return max(self.by_role.values(), default=_FALLBACK_OVERHEAD_TOKENS)


class MessageCounter:
    """Token counts of message texts, in a cache of at most `max_entries` (about 100 bytes each).

    The cache is two dictionaries: when the recent one is full it becomes the older one, and what is not asked for again
    goes with that. A long history looks up thousands of texts at once, and an LRU takes several times as long for each.
    """

    def __init__(self, tokenizer: TokenizerLike, max_entries: int) -> None:
        # A copy of its own: the renderer sets truncation on the original while it encodes in another thread.
        self._tokenizer = copy.deepcopy(tokenizer)
        self._backend = _unlimited(getattr(self._tokenizer, "backend_tokenizer", None))
        self._half = max(1, max_entries // 2)
        # Keyed by Python's own hash of 64 bits, which is salted for each process, so nobody can make two texts collide.
        self._recent: dict[int, int] = {}
        self._older: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self._recent) + len(self._older)

    @property
    def encode(self) -> Callable[[str, bool], list[int]] | None:
        """The token ids of a text, with special tokens around it or not; None for a tokenizer that is no fast one.

        It changes nothing, so it may run in two threads at a time.
        """
        return None if self._backend is None else partial(_encoded, self._backend)

    async def count(self, texts: Sequence[str]) -> list[int]:
        """The tokens of each text."""
        return (await self.count_and_tell(texts))[0]

    def known(self, texts: Iterable[str]) -> list[int] | None:
        """The tokens of each text, if all were counted lately."""
        counts = list(map(self._recent.get, map(hash, texts)))
        return None if None in counts else cast("list[int]", counts)

    async def count_and_tell(self, texts: Sequence[str]) -> tuple[list[int], int]:
        """The tokens of each text, and how many texts were new. Those are encoded off the event loop."""
        if (known := self.known(texts)) is not None:
            return known, 0
        keys = list(map(hash, texts))
        counts = list(map(self._recent.get, keys))
        unsure = {key: text for key, text, count in zip(keys, texts, counts, strict=True) if count is None}
        found = {key: self._older[key] for key in unsure if key in self._older}
        missing = {key: text for key, text in unsure.items() if key not in found}
        if missing:
            found |= zip(missing, await asyncio.to_thread(self._encode, list(missing.values())), strict=True)
        for key, tokens in found.items():
            self._remember(key, tokens)
        both = zip(keys, counts, strict=True)
        return [found[key] if count is None else count for key, count in both], len(missing)

    def _remember(self, key: int, count: int) -> None:
        if len(self._recent) >= self._half:
            self._recent, self._older = {}, self._recent
        self._recent[key] = count

    def _encode(self, texts: list[str]) -> list[int]:
        texts = [text.encode("utf-8", "replace").decode() for text in texts]  # JSON can hold lone surrogates
        if self._backend is None:
            return [len(self._tokenizer.encode(text, add_special_tokens=False)) for text in texts]
        return [len(encoding) for encoding in self._backend.encode_batch_fast(texts, add_special_tokens=False)]


def _unlimited(backend: Any) -> Any:
    """A fast tokenizer without the limits that its file may set, as every call of it by vLLM takes them off."""
    if backend is not None:
        backend.no_truncation()
        backend.no_padding()
    return backend


def _encoded(backend: Any, text: str, special: bool) -> list[int]:
    # For one text, too, it takes a quarter less time than `encode`, which also finds where each token begins and ends.
    (encoding,) = backend.encode_batch_fast([text], add_special_tokens=special)
    token_ids: list[int] = encoding.ids
    return token_ids


def plain_texts(messages: Sequence[Mapping[str, Any]]) -> list[str] | None:
    """The texts of messages that all have a role, which is not `tool`, and one text, and nothing else; most have."""
    texts = [
        message["content"]
        for message in messages
        if len(message) == _PLAIN_MESSAGE_FIELDS
        and type(message.get("content")) is str
        and message.get("role", "tool") != "tool"
    ]
    return texts if len(texts) == len(messages) else None


def message_text(message: Mapping[str, Any]) -> str:
    """All text of a message that a template may print, tool calls as JSON."""
    content = message.get("content")
    if type(content) is str and len(message) == _PLAIN_MESSAGE_FIELDS and message.get("role") != "tool":
        return content
    parts = [_content_text(message[field]) for field in _MESSAGE_TEXT_FIELDS if message.get(field)]
    if message.get("role") == "tool":  # some templates print results as JSON strings
        parts = [json.dumps(part, ensure_ascii=False) for part in parts]
    if calls := message.get("tool_calls"):
        parts.append(json.dumps(calls, ensure_ascii=False, default=str))
    return "\n".join(parts)


def _content_text(content: Any) -> str:
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        return "\n".join(_content_text(part) for part in content)
    if isinstance(content, Mapping):
        return "\n".join(_content_text(content[key]) for key in ("text", "refusal", "thinking") if content.get(key))
    return "" if content is None else str(content)


def text_bytes(message: Mapping[str, Any]) -> int | None:
    """At least the UTF-8 length of `message_text`, found fast; None for a message with media."""
    content = message.get("content")
    if type(content) is str and len(message) == _PLAIN_MESSAGE_FIELDS and message.get("role") != "tool":
        return utf8_bytes(content)
    return None if has_media(message) else utf8_bytes(message_text(message))


def utf8_bytes(text: str) -> int:
    """The length of a text in UTF-8, lone surrogates of JSON included."""
    return len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))


def has_media(message: Mapping[str, Any]) -> bool:
    """Whether a message holds an image, audio or video, whose tokens only the model's processor knows."""
    return bool(has_non_text_content([message]))


async def length_or_none(render_length: RenderLength, messages: list[dict[str, Any]]) -> int | None:
    """The tokens of a conversation, or None where the template refuses it."""
    try:
        return await render_length(messages)
    except Exception:  # noqa: BLE001  # a template may raise whatever it likes; then there is nothing to learn
        return None


async def measure_overheads(render_length: RenderLength, counter: MessageCounter) -> Overheads:
    """Measure a template by rendering short conversations that differ by one exchange.

    A template that refuses one of them (no system message, no tools) is left with what the others showed.
    """
    (word,) = await counter.count([_PROBE])

    async def length(*messages: dict[str, Any]) -> int | None:
        return await length_or_none(render_length, list(messages))

    async def around_each(text: str) -> int | None:
        (tokens,) = await counter.count([text])
        asked, said = {"role": "user", "content": text}, {"role": "assistant", "content": text}
        fewer, more = await length(asked), await length(asked, said, asked)
        return None if fewer is None or more is None else -(-(more - fewer - 2 * tokens) // 2)

    user, assistant = {"role": "user", "content": _PROBE}, {"role": "assistant", "content": _PROBE}
    call = {"id": "call_abcd1", "type": "function", "function": {"name": _PROBE, "arguments": "{}"}}
    calling = {"role": "assistant", "content": _PROBE, "tool_calls": [call]}
    result = {"role": "tool", "tool_call_id": "call_abcd1", "content": _PROBE}
    one = await length(user)
    three = await length(user, assistant, user)
    with_system = await length({"role": "system", "content": _PROBE}, user)
    with_tools = await length(user, calling, result, assistant, user)
    found = [each for text in (_PROBE, _SENTENCE) if (each := await around_each(text)) is not None]
    by_role = dict.fromkeys(("user", "assistant"), max(found, default=_FALLBACK_OVERHEAD_TOKENS))
    by_role["system"] = by_role["developer"] = by_role["user"]
    if one is not None and with_system is not None:
        by_role["system"] = max(by_role["user"], with_system - one - word + _TOKENS_OF_MERGING)
    by_role["tool"] = by_role["user"] + _FALLBACK_OVERHEAD_TOKENS
    if three is not None and with_tools is not None:
        (called,) = await counter.count([message_text(calling)])
        by_role["tool"] = max(by_role["user"], with_tools - three - called - word + _TOKENS_OF_MERGING)
    prompt = 0 if one is None else max(0, one - word - by_role["user"]) + _TOKENS_OF_MERGING
    return Overheads(by_role, prompt)
