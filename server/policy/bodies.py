"""Rules on a request's body before it is validated: what a client may not steer, and what it left unsaid.

Bodies are JSON objects as the client sent them. Each rule returns a new body; none mutates its argument.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from server.policy.refusals import ClosedField

Body = dict[str, Any]

# Fields that reach into the engine: another tenant's cache, the scheduler, or tokens that skip the chat template.
CLOSED_FIELDS: Final = ("kv_transfer_params", "cache_salt", "stream_interval", "vllm_xargs")
# Headers of the same kind, lower case. They are dropped in silence, since proxies add them without asking.
CLOSED_HEADERS: Final = ("x-vllm-priority", "x-data-parallel-rank", "x-session-id")

# Open WebUI's title, tag and follow-up calls: one user message that opens with this heading.
BACKGROUND_TASK_HEADING: Final = "### Task:"

_MAX_TOKENS_FIELDS: Final = ("max_completion_tokens", "max_tokens", "max_output_tokens")
_PROMPT_FIELDS: Final = ("messages", "prompt", "input")
# English prose has four characters to a token; runs of spaces or code may have many more.
_MOST_CHARS_PER_TOKEN: Final = 16
# Conversations, messages, a message, its parts, a part: what lies deeper is not text.
_DEEPEST_TEXT: Final = 5
_TOOL_FIELDS: Final = ("tools", "tool_choice", "parallel_tool_calls")
_FREE_TOOL_CHOICES: Final = (None, "auto", "none")


@dataclass(frozen=True, slots=True)
class MaxTokensDefaults:
    """Caps used only when a request names none; `None` leaves the model's window as the only cap."""

    chat: int | None = None
    background_task: int | None = 2048


def refuse_closed_fields(body: Body, opened: frozenset[str]) -> None:
    """Raise `ClosedField` for a field that is set, closed, and not opened by the operator."""
    for field in CLOSED_FIELDS:
        if body.get(field) is not None and field not in opened:
            message = f"`{field}` is not accepted by this server. Leave it out, or ask the operator to allow it."
            raise ClosedField(message, param=field)


def is_background_task(body: Mapping[str, Any]) -> bool:
    """Whether a chat body is a user interface's own housekeeping rather than a person's question."""
    messages = body.get("messages")
    if not isinstance(messages, list) or len(messages) != 1 or not isinstance(messages[0], dict):
        return False
    content = messages[0].get("content")
    return isinstance(content, str) and content.lstrip().startswith(BACKGROUND_TASK_HEADING)


def with_default_max_tokens(body: Body, field: str, defaults: MaxTokensDefaults) -> Body:
    """The body with `field` set where the request names no cap of its own."""
    if any(body.get(name) is not None for name in _MAX_TOKENS_FIELDS):
        return body
    cap = defaults.background_task if is_background_task(body) else defaults.chat
    return body if cap is None else {**body, field: cap}


def with_possible_max_tokens(body: Body, max_model_len: int) -> tuple[Body, int | None]:
    """The body with a cap that no window could hold lowered to the window, and the cap that was asked for."""
    asked: int | None = None
    for field in _MAX_TOKENS_FIELDS:
        value = body.get(field)
        if isinstance(value, int) and not isinstance(value, bool):
            asked = value if asked is None else asked
            if value > max_model_len:
                body = {**body, field: max_model_len}
    return body, asked


def least_prompt_tokens(body: Mapping[str, Any], max_model_len: int) -> int:
    """What a body's text has in tokens at the very least, without looking at it: no tokenizer gives fewer.

    Long chats are cut to the window, so nothing counts for more than half of it.
    """
    chars = sum(_text_chars(body.get(field)) for field in _PROMPT_FIELDS)
    return min(chars // _MOST_CHARS_PER_TOKEN, max_model_len // 2)


def _text_chars(value: Any, depth: int = _DEEPEST_TEXT) -> int:
    """The length of the text in a prompt, a list of prompts, or a list of messages."""
    if isinstance(value, str):
        return len(value)
    if not depth:
        return 0
    if isinstance(value, dict):
        return _text_chars(value.get("content"), depth - 1) + _text_chars(value.get("text"), depth - 1)
    return sum(_text_chars(item, depth - 1) for item in value) if isinstance(value, list) else 0


def is_tool_call_forced(body: Mapping[str, Any]) -> bool:
    """Whether the model has to call a tool. Anthropic spells OpenAI's choices as objects."""
    choice = body.get("tool_choice")
    return (choice.get("type") if isinstance(choice, dict) else choice) not in _FREE_TOOL_CHOICES


def without_tools(body: Body) -> tuple[Body, int]:
    """The body without its tools, and how many they were."""
    tools = body.get("tools")
    kept = {key: value for key, value in body.items() if key not in _TOOL_FIELDS}
    return kept, len(tools) if isinstance(tools, list) else 0


def with_strict_forced_tools(body: Body) -> Body:
    """The body with its tools strict, if a call is forced: then the arguments keep to the schema.

    vLLM's grammar leaves them free otherwise. A client that says `strict: false` gets just that.
    """
    tools = body.get("tools")
    if not is_tool_call_forced(body) or not isinstance(tools, list):
        return body
    return {**body, "tools": [_strict(tool) for tool in tools]}


def _strict(tool: Any) -> Any:
    if not isinstance(tool, dict):
        return tool
    if isinstance(function := tool.get("function"), dict):  # chat completions keep it one level down
        return {**tool, "function": _strict(function)}
    return {**tool, "strict": True} if tool.get("strict") is None else tool
