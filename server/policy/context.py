"""Decides which messages of a chat history the model gets to see, so that every history fits its context window.

Three words carry the rules. The *head* is the leading run of system and developer messages: it always stays. A *turn*
is a user message and all that follows until the next one; a system or developer message belongs to the turn it stands
in, or, where it stands directly before a user message, to the turn which that message opens. A *unit* is an assistant
message with every result of its tool calls, wherever those stand.

Turns go oldest first and whole. The last turn stays; only if it alone is too long do its units go, oldest first.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, NamedTuple

from server.policy.refusals import ContextLengthExceeded, InvalidRequest

DEFAULT_RETENTION_RATIO: Final = 0.8
# Economy at level 2 of the ladder. Two fixed values, because a third would move every cut and lose every cached prefix.
BUDGET_FACTORS: Final = (1.0, 0.5)

_HEAD: Final = -1
_NO_UNIT: Final = -1
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


class LastTurnTooLong(ContextLengthExceeded):
    """What may not be dropped is longer than the window. litellm knows it by "maximum context length is"."""

    def __init__(self, prompt_tokens: int, window: "Window") -> None:
        super().__init__(
            f"This model's maximum context length is {window.max_model_len} tokens. Without all of the earlier "
            f"conversation your last message, the system prompt and the tools still need {prompt_tokens} tokens, and "
            f"the largest prompt that fits is {window.max_prompt_tokens} tokens. Please shorten the message.",
            param="messages",
        )
        self.prompt_tokens = prompt_tokens
        self.max_prompt_tokens = window.max_prompt_tokens


class InvalidTruncation(InvalidRequest):
    """The request's `truncation` is none of the accepted forms."""


@dataclass(frozen=True, slots=True)
class TruncationPolicy:
    """Whether a history may be fitted, and the share of the budget that a cut leaves."""

    enabled: bool = True
    retention_ratio: float = DEFAULT_RETENTION_RATIO

    def __post_init__(self) -> None:
        if not 0.0 < self.retention_ratio <= 1.0:
            raise ValueError(f"retention_ratio is {self.retention_ratio}, and must be above 0 and at most 1")


def parse_truncation(value: object, default: TruncationPolicy) -> TruncationPolicy:
    """The policy a request asks for; `auto` cuts with the operator's ratio, which `default` carries even if disabled.

    The forms are those of OpenAI's Responses API (the words) and Realtime API (the objects). Keys we do not know are
    refused: a limit that is silently ignored is worse than an error.
    """
    match value:
        case None:
            return default
        case "auto" | "disabled":
            return replace(default, enabled=value == "auto")
        case {"type": "auto" | "disabled" as kind, **rest} if not rest:
            return replace(default, enabled=kind == "auto")
        case {"type": "retention_ratio", "retention_ratio": float() | int() as ratio, **rest} if (
            not rest and not isinstance(ratio, bool) and 0.0 < ratio <= 1.0
        ):
            return TruncationPolicy(retention_ratio=float(ratio))
    raise InvalidTruncation(
        '`truncation` must be "auto", "disabled" or {"type": "retention_ratio", "retention_ratio": 0.8} with a ratio '
        "above 0 and at most 1.",
        param="truncation",
    )


class MessageView(NamedTuple):
    """All that the rules look at in a message."""

    role: str
    call_ids: tuple[str | None, ...] = ()  # one per tool call of an assistant message; None for a call without an id
    result_of: str | None = None  # the `tool_call_id` of a tool message


def view(message: Mapping[str, Any]) -> MessageView:
    """A message in OpenAI's chat format as the rules see it; `tool_calls` must be a list, as vLLM makes it."""
    role = "function" if _is_tool_response(message) else message.get("role", "")
    calls = message.get("tool_calls")
    if calls is None:
        return MessageView(role, (), message.get("tool_call_id") or None)
    if not isinstance(calls, Sequence):
        raise TypeError("tool_calls must be a list: reading an iterator here would use it up")
    ids = tuple(call.get("id") or None if isinstance(call, Mapping) else None for call in calls)
    return MessageView(role, ids, message.get("tool_call_id") or None)


def _is_tool_response(message: Mapping[str, Any]) -> bool:
    """A tool's result sent as the user's: no question, and Qwen 3.5's template refuses a history without one."""
    content = message.get("content")
    if message.get("role") != "user" or not isinstance(content, str):
        return False
    text = content.strip()
    return text.startswith("<tool_response>") and text.endswith("</tool_response>")


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
        return max(self.unit_of, default=_NO_UNIT) + 1

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
    turn_of = [turns[i] if unit == _NO_UNIT else turns[unit_starts[unit]] for i, unit in enumerate(unit_of)]
    return Layout(tuple(messages), head, tuple(turn_of), tuple(unit_of), tuple(first_units))


def _turns(messages: Sequence[MessageView], head: int) -> tuple[list[int], list[int]]:
    """The turn in which each message stands, and for each turn the number of units before it."""
    turns, first_units, units = [_HEAD] * head, list[int](), 0
    waiting = 0  # instructions whose turn is known with the next message
    for message in messages[head:]:
        if message.role in _INSTRUCTING_ROLES:
            waiting += 1
            continue
        if message.role == "user" or not first_units:
            first_units.append(units)
        turns += [len(first_units) - 1] * (waiting + 1)
        units += message.role == "assistant"
        waiting = 0
    return turns + [len(first_units) - 1] * waiting, first_units


def _units(messages: Sequence[MessageView]) -> tuple[list[int], list[int]]:
    """The unit of each message, and the index of the assistant message that opens each unit."""
    unit_of, starts = list[int](), list[int]()
    callers: dict[str, int] = {}  # a call id used again means the latest call
    speaker = _NO_UNIT  # the unit that the current message directly follows, through results only
    for i, message in enumerate(messages):
        match message.role:
            case "assistant":
                speaker = len(starts)
                starts.append(i)
                callers.update({call_id: speaker for call_id in message.call_ids if call_id})
                unit_of.append(speaker)
            case "tool":
                follows_calls = speaker != _NO_UNIT and messages[starts[speaker]].call_ids
                caller = callers.get(message.result_of) if message.result_of else speaker if follows_calls else None
                if caller is None:
                    raise OrphanToolResult(i, message.result_of)
                unit_of.append(caller)
            case "function":  # the deprecated form: its results bear no id
                unit_of.append(speaker)
            case _:
                speaker = _NO_UNIT
                unit_of.append(_NO_UNIT)
    return unit_of, starts


def default_reserve_tokens(max_model_len: int) -> int:
    """Room kept for the reply when old turns are dropped: a constant of the model, or the cut would move."""
    return min(1024, max_model_len // 4)


@dataclass(frozen=True, slots=True)
class Window:
    """The room there is for a prompt.

    `fixed_tokens` is what the template prints besides the messages, tool schemas above all. What *may* be dropped is
    held to the budget, which leaves `reserve_tokens` for the reply and shrinks by `factor` under degradation; what may
    *not* be dropped is refused only where the engine would refuse it, when fewer than `min_completion_tokens` remain.
    """

    max_model_len: int
    reserve_tokens: int
    fixed_tokens: int = 0
    factor: float = 1.0
    min_completion_tokens: int = 1

    def __post_init__(self) -> None:
        if self.factor not in BUDGET_FACTORS:
            raise ValueError(f"factor is {self.factor}, and must be one of {BUDGET_FACTORS}")

    @property
    def max_prompt_tokens(self) -> int:
        return self.max_model_len - self.min_completion_tokens

    def turn_budget(self, head_tokens: int) -> tuple[int, int]:
        """B, what the turns may take, and the limit, what they can take; negative when the head leaves no room."""
        limit = self.max_prompt_tokens - self.fixed_tokens - head_tokens
        room = self.max_model_len - self.reserve_tokens - self.fixed_tokens - head_tokens
        return min(int(room * self.factor), limit), limit


def fits_by_bytes(total_bytes: int, message_count: int, message_overhead_tokens: int, window: Window) -> bool:
    """Whether a history fits for certain, so that nothing needs counting.

    Holds where every token of text stands for at least one byte: byte-level BPE and SentencePiece with byte fallback,
    without a normalizer that lengthens text. `total_bytes` is the UTF-8 length of all text the template prints, tool
    schemas and arguments in their escaped form included; `message_overhead_tokens` allows for the special tokens
    around one message. Images and audio have no such bound: count those.
    """
    most_tokens = total_bytes + message_count * message_overhead_tokens + window.fixed_tokens
    return most_tokens <= (window.max_model_len - window.reserve_tokens) * window.factor


@dataclass(frozen=True, slots=True)
class Fit:
    """What is kept of a history, as indices in order; token figures are sums of the estimates given."""

    kept: tuple[int, ...]
    dropped: tuple[int, ...]
    kept_tokens: int  # the whole prompt: `fixed_tokens`, the head and the messages kept
    dropped_tokens: int
    cut_turn: int  # turns before this one are gone
    cut_unit: int  # units before this one are gone, also from the turns that are left

    @property
    def truncated(self) -> bool:
        return bool(self.dropped)


def plan_fit(layout: Layout, tokens: Sequence[int], window: Window, retention_ratio: float) -> Fit:
    """Cut a history to its budget so that the next request finds its prefix in the cache.

    `tokens[i]` estimates the rendered cost of message i. The cut follows OpenAI Realtime's `retention_ratio`: each time
    the model was asked (before every assistant message, and now) and the messages kept were over the budget, oldest
    ones go until at most that share of it is left. It is a fold over the history the client sends again, so every
    replica finds the same cut without remembering it, and appending messages never brings a dropped one back. What may
    not be dropped can still be over the window: the render tells, since estimates may be too high.
    """
    head_tokens = sum(tokens[: layout.head])
    running = _RunningWindow(layout, window, head_tokens, retention_ratio)
    for i, (message, count) in enumerate(zip(layout.messages, tokens, strict=True)):
        if message.role == "assistant":
            running.shed(i)
        if i >= layout.head:
            running.append(i, count)
    running.shed(len(layout.messages))
    return _fit_at(running.turn, running.unit, layout, tokens, window)


def drop_one_more(fit: Fit, layout: Layout, tokens: Sequence[int], window: Window, rendered_tokens: int) -> Fit:
    """The next smaller fit, for when the real render of this one, `rendered_tokens`, is too long after all.

    Sheds the oldest turn left, or else the last turn's oldest unit; raises `LastTurnTooLong` when there is neither. The
    next request cannot know of it and cuts where `plan_fit` says, so estimates had better be on the high side.
    """
    if fit.cut_turn < layout.last_turn:
        turn = fit.cut_turn + 1
        return _fit_at(turn, max(fit.cut_unit, layout.first_units[turn]), layout, tokens, window)
    length = len(layout.messages)
    if layout.head < length and fit.cut_unit < layout.units - layout.pinned_units(length, layout.last_turn):
        return _fit_at(fit.cut_turn, fit.cut_unit + 1, layout, tokens, window)
    raise LastTurnTooLong(rendered_tokens, window)


def _is_dropped(layout: Layout, i: int, cut_turn: int, cut_unit: int) -> bool:
    turn, unit = layout.turn_of[i], layout.unit_of[i]
    return turn != _HEAD and (turn < cut_turn or _NO_UNIT < unit < cut_unit)


def _fit_at(cut_turn: int, cut_unit: int, layout: Layout, tokens: Sequence[int], window: Window) -> Fit:
    kept, dropped, kept_tokens, dropped_tokens = list[int](), list[int](), window.fixed_tokens, 0
    for i, count in enumerate(tokens):
        if _is_dropped(layout, i, cut_turn, cut_unit):
            dropped.append(i)
            dropped_tokens += count
        else:
            kept.append(i)
            kept_tokens += count
    return Fit(tuple(kept), tuple(dropped), kept_tokens, dropped_tokens, cut_turn, cut_unit)


class _RunningWindow:
    """The messages kept so far, as sums; each turn and unit enters once and leaves once, so a plan is linear."""

    __slots__ = ("_budget", "_layout", "_limit", "_live", "_target", "_turn_tokens", "_unit_tokens", "turn", "unit")

    def __init__(self, layout: Layout, window: Window, head_tokens: int, retention_ratio: float) -> None:
        self._layout = layout
        self._budget, self._limit = window.turn_budget(head_tokens)
        self._target = int(self._budget * retention_ratio)
        self._turn_tokens, self._unit_tokens = list[int](), list[int]()
        self._live = self.turn = self.unit = 0

    def append(self, i: int, count: int) -> None:
        turn, unit = self._layout.turn_of[i], self._layout.unit_of[i]
        self._turn_tokens.extend([0] * (turn + 1 - len(self._turn_tokens)))
        self._unit_tokens.extend([0] * (unit + 1 - len(self._unit_tokens)))
        if _is_dropped(self._layout, i, self.turn, self.unit):
            return
        self._live += count
        self._turn_tokens[turn] += count
        if unit != _NO_UNIT:
            self._unit_tokens[unit] += count

    def shed(self, length: int) -> None:
        """Hold the first `length` messages to the budget, as a request that ended there would have been held to it."""
        if self._live <= self._budget or length <= self._layout.head:
            return
        last_turn = len(self._turn_tokens) - 1
        while self.turn < last_turn and self._live > self._target:
            self._drop_turn()
        if self._live <= self._budget:
            return
        units, prefilled = len(self._unit_tokens), self._layout.messages[length - 1].role == "assistant"
        while self.unit < units - 1 - prefilled and self._live > self._target:
            self._drop_unit()
        droppable = units - self._layout.pinned_units(length, last_turn)
        if self.unit < droppable and self._live > self._limit:  # the newest goes only if the engine could not take it
            self._drop_unit()

    def _drop_turn(self) -> None:
        self._live -= self._turn_tokens[self.turn]
        self.turn += 1
        self.unit = max(self.unit, self._layout.first_units[self.turn])

    def _drop_unit(self) -> None:
        self._live -= self._unit_tokens[self.unit]
        self._turn_tokens[-1] -= self._unit_tokens[self.unit]
        self.unit += 1


def keep_newest(token_count: int, budget: int) -> int:
    """How many of a plain prompt's oldest tokens to drop: text without turns has no better place to cut."""
    return max(0, token_count - budget)
