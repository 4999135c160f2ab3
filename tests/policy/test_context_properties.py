import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, SupportsIndex, overload

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from server.policy.context import (
    Fit,
    LastTurnTooLong,
    Layout,
    MessageView,
    Window,
    drop_one_more,
    fits_by_bytes,
    lay_out,
    plan_fit,
    view,
)

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

    @property
    def layout(self) -> Layout:
        return lay_out([view(message) for message in self.messages])

    def fit(self) -> Fit:
        """The plan, or the refusal it ends in when the engine agrees with the estimates."""
        fit = plan_fit(self.layout, self.tokens, self.window, self.retention_ratio)
        if fit.kept_tokens > self.window.max_prompt_tokens:
            raise LastTurnTooLong(fit.kept_tokens, self.window)
        return fit

    def first(self, length: int) -> "Case":
        return self.only(range(length))

    def only(self, indices: range | tuple[int, ...]) -> "Case":
        messages, tokens = [self.messages[i] for i in indices], [self.tokens[i] for i in indices]
        return Case(messages, tokens, self.window, self.retention_ratio)

    def budget(self) -> int:
        """B as the design writes it, or what the engine takes where that is less."""
        head = sum(self.tokens[: self.layout.head]) + self.window.fixed_tokens
        room = (self.window.max_model_len - self.window.reserve_tokens - head) * self.window.factor
        return min(int(room), self.window.max_model_len - 1 - head)

    def turn_tokens(self, fit: Fit) -> int:
        return sum(self.tokens[i] for i in fit.kept if i >= self.layout.head)


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
    max_model_len = draw(st.integers(50, 600))
    window = Window(
        max_model_len,
        reserve_tokens=draw(st.integers(1, max_model_len // 4)),
        fixed_tokens=draw(st.sampled_from([0, 0, 25])),
        factor=draw(st.sampled_from([1.0, 1.0, 0.5])),
    )
    return Case(messages, tokens, window, retention_ratio=draw(st.sampled_from([0.8, 0.8, 0.5, 1.0])))


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


@at_leisure
@given(cases())
def test_what_is_kept_and_dropped_is_the_whole_history_in_order(case: Case) -> None:
    fit = some_fit(case)
    assert sorted(fit.kept + fit.dropped) == list(range(len(case.messages)))
    assert list(fit.kept) == sorted(fit.kept)
    assert fit.kept_tokens == case.window.fixed_tokens + sum(case.tokens[i] for i in fit.kept)
    assert fit.dropped_tokens == sum(case.tokens[i] for i in fit.dropped)


@at_leisure
@given(cases())
def test_a_fit_is_within_the_budget_or_holds_only_what_the_last_turn_cannot_give_up(case: Case) -> None:
    fit = some_fit(case)
    assert fit.kept_tokens <= case.window.max_model_len - 1
    if case.turn_tokens(fit) > case.budget():
        start = last_turn_start(case.messages)
        early_units = [i for i in fit.kept if i >= start and case.messages[i]["role"] == "assistant"]
        assert all(i >= start or i < case.layout.head for i in fit.kept)
        assert len(early_units) <= 1 + (case.messages[-1]["role"] == "assistant")


@at_leisure
@given(cases(largest_message=200))
def test_only_a_last_turn_that_cannot_fit_is_refused(case: Case) -> None:
    start, end = last_turn_start(case.messages), len(case.messages)
    assume(any(message["role"] == "user" for message in case.messages))
    head = case.layout.head
    last_is_a_reply = case.messages[-1]["role"] == "assistant"
    pinned = [
        i for i in range(max(start, head), end) if case.layout.unit_of[i] == -1 or (last_is_a_reply and i == end - 1)
    ]
    least = case.window.fixed_tokens + sum(case.tokens[:head]) + sum(case.tokens[i] for i in pinned)
    if least <= case.window.max_model_len - 1:
        case.fit()
        return
    with pytest.raises(LastTurnTooLong) as caught:
        case.fit()
    assert caught.value.prompt_tokens == least


@at_leisure
@given(cases())
def test_tool_calls_and_their_results_are_kept_or_dropped_together(case: Case) -> None:
    kept = set(some_fit(case).kept)
    for i, message in enumerate(case.messages):
        if message["role"] == "tool" and "tool_call_id" in message:
            assert (i in kept) == (call_of(case.messages, i) in kept)
        elif message["role"] in RESULT_ROLES and case.messages[i - 1]["role"] == "assistant":
            assert (i in kept) == (i - 1 in kept)
    lay_out([view(case.messages[i]) for i in sorted(kept)])


@at_leisure
@given(cases())
def test_the_head_and_the_last_user_message_and_a_prefilled_reply_are_kept(case: Case) -> None:
    kept = set(some_fit(case).kept)
    roles = [message["role"] for message in case.messages]
    for i, role in enumerate(roles):
        if role not in ("system", "developer"):
            break
        assert i in kept
    if "user" in roles:
        assert len(roles) - 1 - roles[::-1].index("user") in kept
    if roles and roles[-1] == "assistant":
        assert len(roles) - 1 in kept


@at_leisure
@given(cases())
def test_appending_messages_never_brings_a_dropped_one_back(case: Case) -> None:
    before = (0, 0, frozenset[int]())
    for length in range(1, len(case.messages) + 1):
        fit = fits(case.first(length))
        if fit is None:
            continue
        after = (fit.cut_turn, fit.cut_unit, frozenset(fit.dropped))
        assert before[0] <= after[0]
        assert before[1] <= after[1]
        assert before[2] <= after[2]
        before = after


@at_leisure
@given(cases())
def test_a_prompt_extends_the_one_before_or_a_cut_left_at_most_the_retained_share(case: Case) -> None:
    before: Fit | None = None
    for length in range(1, len(case.messages) + 1):
        so_far = case.first(length)
        fit = fits(so_far)
        if fit is not None and before is not None and fit.kept[: len(before.kept)] != before.kept:
            assert retained_share_is_left(so_far, fit, before)
        before = fit


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


@at_leisure
@given(cases())
def test_the_cut_stays_where_it_is_while_the_conversation_fits_behind_it(case: Case) -> None:
    asked = [i for i, message in enumerate(case.messages) if message["role"] == "assistant"]
    for earlier, later in pairwise([*asked, len(case.messages)]):
        before, after = fits(case.first(earlier)), fits(case.first(later))
        if before is None or earlier <= case.layout.head:
            continue
        gone = (before.cut_turn, before.cut_unit)
        new = [
            i for i in range(earlier, later) if case.layout.turn_of[i] >= gone[0] and case.layout.unit_of[i] >= gone[1]
        ]
        new += [i for i in range(earlier, later) if case.layout.unit_of[i] == -1]
        if case.turn_tokens(before) + sum(case.tokens[i] for i in new) <= case.budget():
            assert after is not None
            assert after.kept == (*before.kept, *sorted(new))


@at_leisure
@given(cases())
def test_fitting_what_was_kept_changes_nothing(case: Case) -> None:
    fit = some_fit(case)
    again = case.only(fit.kept).fit()
    assert not again.truncated
    assert again.kept_tokens == fit.kept_tokens


@at_leisure
@given(cases())
def test_the_cut_is_the_published_rule(case: Case) -> None:
    fit = some_fit(case)
    assert (fit.cut_turn, fit.cut_unit) == published_cut(case)


def published_cut(case: Case) -> tuple[int, int]:
    """The rule of the design, asked before every reply and at the end, and summed afresh at every step."""
    layout, tokens, budget = case.layout, case.tokens, case.budget()
    limit = case.window.max_model_len - 1 - case.window.fixed_tokens - sum(tokens[: layout.head])
    target = int(budget * case.retention_ratio)
    asked = [i for i, message in enumerate(case.messages) if message["role"] == "assistant"]
    cut = unit = 0
    for length in [*asked, len(case.messages)]:
        if length <= layout.head or live_tokens(case, length, cut, unit) <= budget:
            continue
        last = max(layout.turn_of[:length])
        while cut < last and live_tokens(case, length, cut, unit) > target:
            cut += 1
        unit = max(unit, layout.first_units[cut])
        if live_tokens(case, length, cut, unit) <= budget:
            continue
        no_user_yet = not any(message["role"] == "user" for message in case.messages[:length])
        prefilled = case.messages[length - 1]["role"] == "assistant"
        newest = max(layout.unit_of[:length]) - prefilled
        while unit < newest and live_tokens(case, length, cut, unit) > target:
            unit += 1
        pinned = no_user_yet and not prefilled
        if unit <= newest and not pinned and live_tokens(case, length, cut, unit) > limit:
            unit += 1
    return cut, unit


def live_tokens(case: Case, length: int, cut: int, unit: int) -> int:
    turn_of, unit_of = case.layout.turn_of, case.layout.unit_of
    in_turns = range(case.layout.head, length)
    return sum(case.tokens[i] for i in in_turns if turn_of[i] >= cut and not 0 <= unit_of[i] < unit)


@at_leisure
@given(cases())
def test_one_more_drops_something_each_time_until_only_the_pinned_is_left(case: Case) -> None:
    fit = some_fit(case)
    for _ in range(len(case.messages)):
        try:
            smaller = drop_one_more(fit, case.layout, case.tokens, case.window, rendered_tokens=1)
        except LastTurnTooLong:
            break
        assert set(fit.dropped) < set(smaller.dropped)
        assert not case.only(smaller.kept).fit().truncated
        fit = smaller
    assert all(case.layout.turn_of[i] in (-1, case.layout.last_turn) for i in fit.kept)
    assert len({case.layout.unit_of[i] for i in fit.kept} - {-1}) <= 1


@at_leisure
@given(cases(), st.integers(0, 5), st.integers(0, 50))
def test_a_history_whose_bytes_fit_is_never_cut(case: Case, overhead: int, spare: int) -> None:
    count, total_bytes, window = len(case.messages), sum(case.tokens), case.window
    room = int((total_bytes + overhead * count + window.fixed_tokens + spare) / window.factor)
    window = replace(window, max_model_len=room + window.reserve_tokens)
    assert fits_by_bytes(total_bytes, count, overhead, window)
    most_tokens = [size + overhead for size in case.tokens]
    assert not plan_fit(case.layout, most_tokens, window, case.retention_ratio).truncated


# Cost


class CountedTokens(int):
    """A token count that knows how often any such counts were added up, subtracted or compared."""

    operations = 0

    def _counted(self, value: int) -> "CountedTokens":
        CountedTokens.operations += 1
        return CountedTokens(value)

    def __add__(self, other: int) -> "CountedTokens":
        return self._counted(int(self) + int(other))

    def __radd__(self, other: int) -> "CountedTokens":
        return self._counted(int(other) + int(self))

    def __sub__(self, other: int) -> "CountedTokens":
        return self._counted(int(self) - int(other))

    def __gt__(self, other: int) -> bool:
        CountedTokens.operations += 1
        return int(self) > int(other)

    def __le__(self, other: int) -> bool:
        CountedTokens.operations += 1
        return int(self) <= int(other)


class CountedViews(list[MessageView]):
    """Messages that count how many of them were read, slices included."""

    reads = 0

    @overload
    def __getitem__(self, index: SupportsIndex) -> MessageView: ...
    @overload
    def __getitem__(self, index: slice) -> list[MessageView]: ...
    def __getitem__(self, index: SupportsIndex | slice) -> MessageView | list[MessageView]:
        found = super().__getitem__(index)
        self.reads += len(found) if isinstance(found, list) else 1
        return found

    def __iter__(self) -> Iterator[MessageView]:
        for message in super().__iter__():
            self.reads += 1
            yield message


def short_turns(count: int) -> list[Message]:
    return [{"role": "user"}, {"role": "assistant"}] * (count // 2)


def one_agents_turn(count: int) -> list[Message]:
    steps = [
        message
        for i in range(count // 2)
        for message in (
            {"role": "assistant", "tool_calls": [{"id": f"call_{i}"}]},
            {"role": "tool", "tool_call_id": f"call_{i}"},
        )
    ]
    return [{"role": "user"}, *steps]


def results_at_the_very_end(count: int) -> list[Message]:
    calls = [{"role": "assistant", "tool_calls": [{"id": f"call_{i}"}]} for i in range(count // 3)]
    asked = [message for call in calls for message in ({"role": "user"}, call)]
    return [*asked, *({"role": "tool", "tool_call_id": f"call_{i}"} for i in range(count // 3))]


@pytest.mark.parametrize("write", [short_turns, one_agents_turn, results_at_the_very_end])
@pytest.mark.parametrize("max_model_len", [500, 8000])
def test_ten_thousand_tiny_messages_are_planned_in_a_few_operations_each(write: Any, max_model_len: int) -> None:
    messages = write(10_000)
    views = CountedViews(view(message) for message in messages)
    layout = lay_out(views)
    assert views.reads <= 6 * len(messages)
    CountedTokens.operations = 0
    fit = plan_fit(layout, [CountedTokens(1)] * len(messages), Window(max_model_len, reserve_tokens=100), 0.8)
    assert fit.truncated
    assert CountedTokens.operations <= 12 * len(messages)


@pytest.mark.parametrize("seed", range(5))
def test_a_long_history_is_fitted_like_any_other(seed: int) -> None:
    rng = random.Random(seed)
    messages = converse(rng, turns=300)
    case = Case(messages, [rng.randrange(1, 9) for _ in messages], Window(800, 100), 0.8)
    fit = case.fit()
    assert fit.kept_tokens <= 700
    assert not case.only(fit.kept).fit().truncated
