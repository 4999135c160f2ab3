"""Decides which messages of a chat history the model gets to see, so that every history fits its context window.

Turns go oldest first and whole. The last turn stays; only if it alone is too long do its units go, oldest first. What
turns and units are is said in `turns.py`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

from server.policy.refusals import ContextLengthExceeded, InvalidRequest
from server.policy.turns import HEAD, NO_UNIT, Layout

DEFAULT_RETENTION_RATIO: Final = 0.76
# Economy at level 2 of the ladder. Two fixed values, because a third would move every cut and lose every cached prefix.
BUDGET_FACTORS: Final = (1.0, 0.5)


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
    return fits_whole(total_bytes + message_count * message_overhead_tokens, window)


def fits_whole(total_tokens: int, window: Window) -> bool:
    """Whether messages that cost so much together fit for certain: `plan_fit` leaves them alone.

    Only if none of them has cost more in an earlier turn, which may have cut the history for good.
    """
    room = (window.max_model_len - window.reserve_tokens) * window.factor
    return total_tokens + window.fixed_tokens <= min(room, window.max_prompt_tokens)


@dataclass(frozen=True, slots=True)
class Fit:
    """What is kept of a history, as indices in order; token figures are sums of the estimates given."""

    kept: tuple[int, ...]
    dropped: tuple[int, ...]
    kept_tokens: int  # the whole prompt: `fixed_tokens`, the head and the messages kept
    dropped_tokens: int
    cut_turn: int  # turns before this one are gone
    cut_unit: int  # units before this one are gone, also from the turns that are left

    @classmethod
    def whole(cls, tokens: Sequence[int], window: Window) -> "Fit":
        """That of a history which is left alone."""
        return cls(tuple(range(len(tokens))), (), window.fixed_tokens + sum(tokens), 0, 0, 0)

    @property
    def truncated(self) -> bool:
        return bool(self.dropped)


def plan_fit(
    layout: Layout,
    tokens: Sequence[int],
    window: Window,
    retention_ratio: float,
    settled: Sequence[int] | None = None,
) -> Fit:
    """Cut a history to its budget so that the next request finds its prefix in the cache.

    `tokens[i]` estimates the rendered cost of message i, and `settled[i]` what it costs once a later turn has begun,
    which is less for an answer whose thinking the template then leaves out. The cut follows OpenAI Realtime's
    `retention_ratio`: each time the model was asked (before every assistant message, and now) and the messages kept
    were over the budget, oldest ones go until at most that share of it is left. It is a fold over the history the
    client sends again, so every replica finds the same cut without remembering it, and appending messages never brings
    a dropped one back. (One exception: what was dropped for the thinking in a reply that the model was to continue.)
    What may not be dropped can still be over the window: the render tells, since estimates may be too high.
    """
    settled = tokens if settled is None else settled
    running = _RunningWindow(layout, window, sum(tokens[: layout.head]), retention_ratio)
    running.hear(tokens, settled)
    return _fit_at(running.turn, running.unit, layout, printed_tokens(layout, tokens, settled), window)


def printed_tokens(layout: Layout, tokens: Sequence[int], settled: Sequence[int]) -> Sequence[int]:
    """What each message costs in the history as it is now: settled, unless it stands in the last turn."""
    if settled is tokens:
        return tokens
    last = layout.last_turn
    return [now if turn == last else later for turn, now, later in zip(layout.turn_of, tokens, settled, strict=True)]


def drop_one_more(fit: Fit, layout: Layout, tokens: Sequence[int], window: Window, rendered_tokens: int) -> Fit:
    """The next smaller fit, for when the real render of this one, `rendered_tokens`, is too long after all.

    `tokens` are those of `printed_tokens`.
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


def _fit_at(cut_turn: int, cut_unit: int, layout: Layout, tokens: Sequence[int], window: Window) -> Fit:
    kept, dropped, kept_tokens, dropped_tokens = list[int](), list[int](), window.fixed_tokens, 0
    for i, (count, turn, unit) in enumerate(zip(tokens, layout.turn_of, layout.unit_of, strict=True)):
        if turn != HEAD and (turn < cut_turn or NO_UNIT < unit < cut_unit):
            dropped.append(i)
            dropped_tokens += count
        else:
            kept.append(i)
            kept_tokens += count
    return Fit(tuple(kept), tuple(dropped), kept_tokens, dropped_tokens, cut_turn, cut_unit)


class _RunningWindow:
    """The messages kept so far, as sums; each turn and unit enters once and leaves once, so a plan is linear."""

    __slots__ = (
        "_budget", "_last_turn", "_layout", "_limit", "_live", "_target", "_turn_tokens", "_unit_of", "_unit_tokens",
        "_units", "_unsettled", "_unsettled_units", "turn", "unit",
    )  # fmt: skip

    def __init__(self, layout: Layout, window: Window, head_tokens: int, retention_ratio: float) -> None:
        self._layout = layout
        self._budget, self._limit = window.turn_budget(head_tokens)
        self._target = int(self._budget * retention_ratio)
        self._turn_tokens, self._unit_tokens = [0] * len(layout.first_units), [0] * layout.units
        self._unsettled_units: dict[int, int] = {}  # of the last turn: what settling takes off each unit
        self._last_turn, self._units = HEAD, 0
        self._live = self._unsettled = self.turn = self.unit = 0

    def hear(self, tokens: Sequence[int], settled: Sequence[int]) -> None:
        """Take in the whole history, message by message, and shed whenever the model was asked."""
        layout, turn_tokens, unit_tokens = self._layout, self._turn_tokens, self._unit_tokens
        history = zip(layout.messages, layout.turn_of, layout.unit_of, tokens, settled, strict=True)
        for i, (message, turn, unit, count, later) in enumerate(history):
            if turn == HEAD:
                continue
            if self._live > self._budget and (message.role == "assistant" or self._left_unanswered(i, turn)):
                self._shed(i)
            if turn > self._last_turn:
                self._settle()
                self._last_turn = turn
            if unit >= self._units:
                self._units = unit + 1
            if turn < self.turn or NO_UNIT < unit < self.unit:
                continue
            self._live += count
            turn_tokens[turn] += count
            if unit != NO_UNIT:
                unit_tokens[unit] += count
                if later != count and turn == self._last_turn:
                    self._unsettled_units[unit] = self._unsettled_units.get(unit, 0) + count - later
                    self._unsettled += count - later
        if self._live > self._budget:
            self._shed(len(tokens))

    def _settle(self) -> None:
        """The last turn is over: what it holds costs what it will cost from now on."""
        if self._unsettled:
            self._live -= self._unsettled
            self._turn_tokens[self._last_turn] -= self._unsettled
            self._unsettled = 0
            self._unsettled_units.clear()

    def _left_unanswered(self, i: int, turn: int) -> bool:
        """Whether message i opens a turn after one that ends with a question, and counted thinking for it till now."""
        opens = self._unsettled > 0 and turn > self._last_turn
        return opens and self._layout.messages[i - 1].role != "assistant"

    def _shed(self, length: int) -> None:
        """Hold the first `length` messages to the budget, as a request that ended there would have been held to it."""
        if length <= self._layout.head:
            return
        while self.turn < self._last_turn and self._live > self._target:
            self._drop_turn()
        if self._live <= self._budget:
            return
        prefilled = self._layout.messages[length - 1].role == "assistant"
        while self.unit < self._units - 1 - prefilled and self._live > self._target:
            self._drop_unit()
        droppable = self._units - self._layout.pinned_units(length, self._last_turn)
        if self.unit < droppable and self._live > self._limit:  # the newest goes only if the engine could not take it
            self._drop_unit()

    def _drop_turn(self) -> None:
        self._live -= self._turn_tokens[self.turn]
        self.turn += 1
        self.unit = max(self.unit, self._layout.first_units[self.turn])

    def _drop_unit(self) -> None:
        self._live -= self._unit_tokens[self.unit]
        self._turn_tokens[self._last_turn] -= self._unit_tokens[self.unit]
        self._unsettled -= self._unsettled_units.pop(self.unit, 0)
        self.unit += 1


def keep_newest(token_count: int, budget: int) -> int:
    """How many of a plain prompt's oldest tokens to drop: text without turns has no better place to cut."""
    return max(0, token_count - budget)
