"""The structure of a chat history: what belongs together and is kept or left out as one.

Three words carry the rules. The *head* is the leading run of system and developer messages: it always stays. A *turn*
is a user message and all that follows until the next one; a system or developer message belongs to the turn it stands
in, or, where it stands directly before a user message, to the turn which that message opens. A *unit* is an assistant
message with every result of its tool calls, wherever those stand.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from server.policy.refusals import InvalidRequest

HEAD: Final = -1  # the turn of the head
NO_UNIT: Final = -1
_TOOL_RESPONSE: Final = "<tool_response>"
_INSTRUCTING_ROLES: Final = frozenset({"system", "developer"})


class OrphanToolResult(InvalidRequest):
    """A tool message answers a call that no earlier message makes."""

    def __init__(self, index: int, tool_call_id: str | None) -> None:
        result = f"a result of tool call '{tool_call_id}'" if tool_call_id else "a tool result without `tool_call_id`"
        super().__init__(
            f"messages[{index}] is {result}, but no assistant message before it makes that call. "
            "Send the assistant message with its `tool_calls` too, or leave the result out.",
            param=f"messages[{index}]",
        )
        self.index = index


class MessageView(NamedTuple):
    """All that the rules look at in a message."""

    role: str
    call_ids: tuple[str | None, ...] = ()  # one per tool call of an assistant message; None for a call without an id
    result_of: str | None = None  # the `tool_call_id` of a tool message


# Nearly all messages of a long history are one of these two.
_USER: Final = MessageView("user")
_ASSISTANT: Final = MessageView("assistant")
_PLAIN_FIELDS: Final = 2  # role and content


def view(message: Mapping[str, Any]) -> MessageView:
    """A message in OpenAI's chat format as the rules see it; `tool_calls` must be a list, as vLLM makes it."""
    role = message.get("role", "")
    if role == "user" and _is_tool_response(message.get("content")):
        role = "function"
    elif len(message) == _PLAIN_FIELDS and "content" in message:
        if role == "user":
            return _USER
        if role == "assistant":
            return _ASSISTANT
    calls = message.get("tool_calls") or ()
    if not isinstance(calls, Sequence):
        raise TypeError("tool_calls must be a list: reading an iterator here would use it up")
    ids = tuple(call.get("id") or None if isinstance(call, Mapping) else None for call in calls)
    return MessageView(role, ids, message.get("tool_call_id") or None)


def _is_tool_response(content: object) -> bool:
    """A tool's result sent as the user's: no question, and Qwen 3.5's template refuses a history without one."""
    if not isinstance(content, str) or _TOOL_RESPONSE not in content:
        return False
    text = content.strip()
    return text.startswith(_TOOL_RESPONSE) and text.endswith("</tool_response>")


@dataclass(frozen=True, slots=True)
class Layout:
    """Where each message of a history belongs: its turn (-1 for the head) and its unit (-1 for none).

    A tool result has the turn and the unit of its call, so that whatever is dropped the pair stays whole.
    """

    messages: tuple[MessageView, ...]
    head: int
    turn_of: tuple[int, ...]
    unit_of: tuple[int, ...]
    first_units: tuple[int, ...]  # for each turn, how many units stand before it

    @property
    def last_turn(self) -> int:
        return len(self.first_units) - 1

    @property
    def units(self) -> int:
        return max(self.unit_of, default=NO_UNIT) + 1

    def pinned_units(self, length: int, last_turn: int) -> int:
        """How many of the newest units may never go while the history is its first `length` messages.

        One if these end with an assistant message, which the model is to continue, or if no user has spoken yet, when
        dropping every unit would leave nothing to answer.
        """
        no_user_yet = last_turn == 0 and self.messages[self.head].role != "user"
        return int(no_user_yet or self.messages[length - 1].role == "assistant")


def lay_out(messages: Sequence[MessageView]) -> Layout:
    """Group messages into head, turns and units; raises `OrphanToolResult`."""
    unit_of, unit_starts = _units(messages)
    head = next((i for i, message in enumerate(messages) if message.role not in _INSTRUCTING_ROLES), len(messages))
    turns, first_units = _turns(messages, head)
    turn_of = [turns[i] if unit == NO_UNIT else turns[unit_starts[unit]] for i, unit in enumerate(unit_of)]
    return Layout(tuple(messages), head, tuple(turn_of), tuple(unit_of), tuple(first_units))


def _turns(messages: Sequence[MessageView], head: int) -> tuple[list[int], list[int]]:
    """The turn in which each message stands, and for each turn the number of units before it."""
    turns, first_units, units = [HEAD] * head, list[int](), 0
    waiting = 0  # instructions whose turn is known with the next message
    turn = -1
    for message in messages[head:]:
        role = message.role
        if role in _INSTRUCTING_ROLES:
            waiting += 1
            continue
        if role == "user" or turn < 0:
            first_units.append(units)
            turn += 1
        if role == "assistant":
            units += 1
        if waiting:
            turns += [turn] * waiting
            waiting = 0
        turns.append(turn)
    return turns + [turn] * waiting, first_units


def _units(messages: Sequence[MessageView]) -> tuple[list[int], list[int]]:
    """The unit of each message, and the index of the assistant message that opens each unit."""
    unit_of, starts = list[int](), list[int]()
    callers: dict[str, int] = {}  # a call id used again means the latest call
    speaker = NO_UNIT  # the unit that the current message directly follows, through results only
    for i, message in enumerate(messages):
        match message.role:
            case "assistant":
                speaker = len(starts)
                starts.append(i)
                for call_id in message.call_ids:
                    if call_id:
                        callers[call_id] = speaker
                unit_of.append(speaker)
            case "tool":
                follows_calls = speaker != NO_UNIT and messages[starts[speaker]].call_ids
                caller = callers.get(message.result_of) if message.result_of else speaker if follows_calls else None
                if caller is None:
                    raise OrphanToolResult(i, message.result_of)
                unit_of.append(caller)
            case "function":  # the deprecated form: its results bear no id
                unit_of.append(speaker)
            case _:
                speaker = NO_UNIT
                unit_of.append(NO_UNIT)
    return unit_of, starts
