"""Histories as agents and user interfaces write them, out of one seed."""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from hypothesis import HealthCheck, assume, settings
from hypothesis import strategies as st

from server.policy.context import Fit, LastTurnTooLong, Window, plan_fit
from server.policy.turns import Layout, lay_out, view

Message = dict[str, Any]
RESULT_ROLES = ("tool", "function")

# A busy machine is no bug.
at_leisure = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


@dataclass(frozen=True, slots=True)
class Case:
    messages: list[Message]
    tokens: list[int]
    window: Window
    retention_ratio: float
    settled: list[int] | None = None  # what each costs once a later turn has begun

    @property
    def layout(self) -> Layout:
        return lay_out([view(message) for message in self.messages])

    @property
    def printed(self) -> list[int]:
        """What each message costs in the history as it is."""
        layout, settled = self.layout, self.settled or self.tokens
        both = zip(layout.turn_of, self.tokens, settled, strict=True)
        return [now if turn == layout.last_turn else later for turn, now, later in both]

    def fit(self) -> Fit:
        """The plan, or the refusal it ends in when the engine agrees with the estimates."""
        fit = plan_fit(self.layout, self.tokens, self.window, self.retention_ratio, self.settled)
        if fit.kept_tokens > self.window.max_prompt_tokens:
            raise LastTurnTooLong(fit.kept_tokens, self.window)
        return fit

    def first(self, length: int) -> "Case":
        return self.only(range(length))

    def only(self, indices: range | tuple[int, ...]) -> "Case":
        messages, tokens = [self.messages[i] for i in indices], [self.tokens[i] for i in indices]
        settled = None if self.settled is None else [self.settled[i] for i in indices]
        return Case(messages, tokens, self.window, self.retention_ratio, settled)

    def budget(self) -> int:
        """B as the design writes it, or what the engine takes where that is less."""
        head = sum(self.tokens[: self.layout.head]) + self.window.fixed_tokens
        room = (self.window.max_model_len - self.window.reserve_tokens - head) * self.window.factor
        return min(int(room), self.window.max_model_len - 1 - head)

    def requests(self) -> Iterator["Case"]:
        """Every beginning that may have been sent; with thinking, those that end with a question or a result."""
        for length in range(1, len(self.messages) + 1):
            if self.settled is None or self.messages[length - 1]["role"] in ("user", *RESULT_ROLES):
                yield self.first(length)

    def turn_tokens(self, fit: Fit) -> int:
        return sum(self.printed[i] for i in fit.kept if i >= self.layout.head)


class Conversation:
    """Writes a history message by message, as agents and user interfaces do."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._reuse_ids = rng.random() < 0.3
        self._late: list[Message] = []
        self.messages: list[Message] = []

    def say(self, role: str, **fields: Any) -> None:
        self.messages.append({"role": role, "content": "…", **fields})

    def turn(self) -> None:
        if self._rng.random() < 0.15:
            self.say(self._rng.choice(["system", "developer"]))
        for _ in range(self._rng.choice([1, 1, 1, 2, 3])):
            self.say("user")
        for _ in range(self._rng.choice([1, 1, 1, 2, 4, 8])):
            self.step()

    def step(self) -> None:
        kind = self._rng.choice(["plain", "plain", "calls", "calls", "calls", "id-less", "function", "aside"])
        if kind == "aside":
            self.say(self._rng.choice(["system", "developer", "critic"]))
        elif kind == "calls":
            self._calls()
        elif kind == "id-less":
            self.say("assistant", tool_calls=[{"type": "function"}])
            self.say("tool")
        else:
            self.say("assistant")
        if kind == "function":
            self.say("function")
        if self._late and self._rng.random() < 0.3:
            self.messages.append(self._late.pop())

    def _calls(self) -> None:
        count = self._rng.choice([1, 1, 2, 3])
        ids = [f"call_{i}" if self._reuse_ids else f"call_{len(self.messages)}_{i}" for i in range(count)]
        self.say("assistant", tool_calls=[{"id": call_id, "type": "function"} for call_id in ids])
        self._rng.shuffle(ids)
        for call_id in ids:
            message = {"role": "tool", "tool_call_id": call_id, "content": "…"}
            late = self._rng.random() < 0.1
            (self._late if late else self.messages).append(message)


def converse(rng: random.Random, turns: int) -> list[Message]:
    conversation = Conversation(rng)
    for _ in range(rng.choice([0, 1, 1, 2])):
        conversation.say(rng.choice(["system", "developer"]))
    for _ in range(rng.choice([0, 0, 0, 1, 3])):
        conversation.step()
    for _ in range(turns):
        conversation.turn()
    for _ in range(rng.choice([0, 1, 1])):
        conversation.say("user")
    if rng.random() < 0.1:
        conversation.say("assistant")  # the beginning of a reply, for the model to go on with
    return conversation.messages


@st.composite
def cases(draw: st.DrawFn, largest_message: int = 60) -> Case:
    """A history out of one seed: hypothesis shrinks its turns and its window, and tries many more in the same time."""
    rng = random.Random(draw(st.integers(0, 2**48)))
    messages = converse(rng, turns=draw(st.integers(0, 8)))
    tokens = [rng.choice([0, rng.randint(1, largest_message), rng.randint(1, largest_message)]) for _ in messages]
    settled = [
        rng.randint(0, count) if m["role"] == "assistant" else count for m, count in zip(messages, tokens, strict=True)
    ]
    max_model_len = draw(st.integers(50, 600))
    window = Window(
        max_model_len,
        reserve_tokens=draw(st.integers(1, max_model_len // 4)),
        fixed_tokens=draw(st.sampled_from([0, 0, 25])),
        factor=draw(st.sampled_from([1.0, 1.0, 0.5])),
    )
    ratio = draw(st.sampled_from([0.8, 0.8, 0.5, 1.0]))
    return Case(messages, tokens, window, ratio, settled if draw(st.booleans()) else None)


def fits(case: Case) -> Fit | None:
    try:
        return case.fit()
    except LastTurnTooLong:
        return None


def some_fit(case: Case) -> Fit:
    fit = fits(case)
    assume(fit is not None)
    assert fit is not None
    return fit


def last_turn_start(messages: list[Message]) -> int:
    """Where the last user message's turn begins: with the instructions directly before it."""
    start = max((i for i, message in enumerate(messages) if message["role"] == "user"), default=0)
    while start and messages[start - 1]["role"] in ("system", "developer"):
        start -= 1
    return start


def call_of(messages: list[Message], result: int) -> int:
    """The index of the assistant message that made the call of a tool message with an id."""
    call_id = messages[result]["tool_call_id"]
    return max(i for i in range(result) if call_id in [call.get("id") for call in messages[i].get("tool_calls", [])])


def retained_share_is_left(case: Case, fit: Fit, before: Fit) -> bool:
    """Or the cut went as far as it may: to the last turn, and inside that to its newest unit."""
    if case.turn_tokens(fit) <= int(case.budget() * case.retention_ratio):
        return True
    layout = case.layout
    newly_dropped = set(fit.dropped) - set(before.dropped)
    cut_inside_the_last_turn = any(layout.turn_of[i] == layout.last_turn for i in newly_dropped)
    units_left = {layout.unit_of[i] for i in fit.kept} - {-1}
    prefilled = case.messages[-1]["role"] == "assistant"
    return fit.cut_turn == layout.last_turn and (not cut_inside_the_last_turn or len(units_left) <= 1 + prefilled)
