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


def without_free_tools(body: Body) -> tuple[Body, int]:
    """The body without tools that the model may use as it likes, and how many were left out.

    A forced tool call keeps its tools: the engine's grammar makes the arguments, not the chat template.
    """
    tools, choice = body.get("tools"), body.get("tool_choice")
    if isinstance(choice, dict):  # Anthropic spells the same choices as objects
        choice = choice.get("type")
    if not isinstance(tools, list) or not tools or choice not in _FREE_TOOL_CHOICES:
        return body, 0
    return {key: value for key, value in body.items() if key not in _TOOL_FIELDS}, len(tools)
