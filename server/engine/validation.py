"""Validates request bodies by vLLM's models, and long chat histories in a fraction of the time.

pydantic tries a message against every kind there is, some ten microseconds each: a history of two thousand messages
would hold up all streams for twenty milliseconds. A message of a known role with nothing but text is valid as it is.
"""

from collections.abc import Mapping
from typing import Any, Final, get_args

from pydantic import TypeAdapter, ValidationError
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.serve.tokenize.protocol import TokenizeChatRequest

_CHATS: Final = (ChatCompletionRequest, TokenizeChatRequest)
_LONG_MESSAGES: Final = 32
_PLAIN_ROLES: Final = frozenset({"user", "assistant", "system"})
_PLAIN_FIELDS: Final = 2


class Validator:
    """Makes one of an endpoint's arguments from what the client sent."""

    def __init__(self, kind: Any) -> None:
        self.adapter = TypeAdapter[Any](kind)
        self._takes_chats = any(chat in (kind, *_parts(kind)) for chat in _CHATS)

    def __call__(self, given: Any) -> Any:
        """The argument. Raises pydantic's `ValidationError`."""
        messages = given.get("messages") if self._takes_chats and isinstance(given, Mapping) else None
        if not isinstance(messages, list) or len(messages) < _LONG_MESSAGES:
            return self.adapter.validate_python(given)
        others = [message for message in messages if not _is_plain(message)]
        try:
            request = self.adapter.validate_python({**given, "messages": others or messages[:1]})
        except ValidationError:
            return self.adapter.validate_python(given)  # the error names the place in the whole history
        if not isinstance(request, _CHATS):
            return self.adapter.validate_python(given)
        validated = iter(request.messages)
        request.messages = [dict(message) if _is_plain(message) else next(validated) for message in messages]
        return request


def _parts(kind: Any) -> tuple[Any, ...]:
    """The members of a union, also of one that is annotated."""
    parts = get_args(kind)
    return parts + tuple(inner for part in parts for inner in get_args(part))


def _is_plain(message: Any) -> bool:
    if type(message) is not dict or len(message) != _PLAIN_FIELDS:
        return False
    role, content = message.get("role"), message.get("content")
    return type(role) is str and role in _PLAIN_ROLES and type(content) is str
