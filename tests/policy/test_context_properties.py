from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from server.policy.context import Fit, LastTurnTooLong, drop_one_more, fits_by_bytes, fits_whole, plan_fit
from server.policy.turns import lay_out, view
from tests.policy.random_histories import (
    RESULT_ROLES,
    Case,
    at_leisure,
    call_of,
    cases,
    fits,
    last_turn_start,
    retained_share_is_left,
    some_fit,
)


@at_leisure
@given(cases())
def test_what_is_kept_and_dropped_is_the_whole_history_in_order(case: Case) -> None:
    fit = some_fit(case)
    assert sorted(fit.kept + fit.dropped) == list(range(len(case.messages)))
    assert list(fit.kept) == sorted(fit.kept)
    assert fit.kept_tokens == case.window.fixed_tokens + sum(case.printed[i] for i in fit.kept)
    assert fit.dropped_tokens == sum(case.printed[i] for i in fit.dropped)


@at_leisure
@given(cases())
def test_a_fit_is_within_the_budget_or_holds_only_what_the_last_turn_cannot_give_up(case: Case) -> None:
    fit = some_fit(case)
    assert fit.kept_tokens <= case.window.max_model_len - 1
    if case.turn_tokens(fit) > case.budget():
        start = last_turn_start(case.messages)
        early_units = [i for i in fit.kept if i >= start and case.messages[i]["role"] == "assistant"]
        assert all(i >= start or i < case.layout.head or not case.printed[i] for i in fit.kept)
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
    for so_far in case.requests():
        fit = fits(so_far)
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
    length = 0
    for so_far in case.requests():
        fit = fits(so_far)
        if fit is not None and before is not None and fit.kept[: len(before.kept)] != before.kept:
            since = (case.first(end) for end in range(length + 1, len(so_far.messages) + 1))
            assert any(cut_left_room(moment, fit, before) for moment in since)
        before, length = fit, len(so_far.messages)


def cut_left_room(moment: Case, final: Fit, before: Fit) -> bool:
    """Whether the final cut was made at this moment, and left at most the retained share."""
    fit = fits(moment)
    if fit is None or (fit.cut_turn, fit.cut_unit) != (final.cut_turn, final.cut_unit):
        return False
    return retained_share_is_left(moment, fit, before)


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
        moments = [case.first(end) for end in range(earlier + 1, later + 1)]
        kept = {*before.kept, *new}
        if all(live_tokens_of(moment, kept) <= case.budget() for moment in moments):
            assert after is not None
            assert after.kept == (*before.kept, *sorted(new))


def live_tokens_of(case: Case, kept: set[int]) -> int:
    return sum(count for i, count in enumerate(case.printed) if i in kept and i >= case.layout.head)


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
    cut = unit = 0
    for length in [*range(len(tokens)), len(tokens)]:
        if length < len(tokens) and case.messages[length]["role"] != "assistant":
            opens = layout.head < length and layout.turn_of[length] > max(layout.turn_of[:length])
            if not opens or case.messages[length - 1]["role"] == "assistant" or not unsettled(case, length, cut, unit):
                continue
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


def unsettled(case: Case, length: int, cut: int, unit: int) -> int:
    """What the last turn of the first `length` messages still counts for thinking."""
    spared = [now - later for now, later in zip(case.tokens, case.settled or case.tokens, strict=True)]
    last = max(case.layout.turn_of[:length])
    kept = [i for i in range(length) if case.layout.turn_of[i] == last and not 0 <= case.layout.unit_of[i] < unit]
    return sum(spared[i] for i in kept) if last >= cut else 0


def live_tokens(case: Case, length: int, cut: int, unit: int) -> int:
    turn_of, unit_of = case.layout.turn_of, case.layout.unit_of
    last, settled = max(turn_of[:length]), case.settled or case.tokens
    return sum(
        case.tokens[i] if turn_of[i] == last else settled[i]
        for i in range(case.layout.head, length)
        if turn_of[i] >= cut and not 0 <= unit_of[i] < unit
    )


@at_leisure
@given(cases())
def test_one_more_drops_something_each_time_until_only_the_pinned_is_left(case: Case) -> None:
    fit = some_fit(case)
    for _ in range(len(case.messages)):
        try:
            smaller = drop_one_more(fit, case.layout, case.printed, case.window, rendered_tokens=1)
        except LastTurnTooLong:
            break
        assert set(fit.dropped) < set(smaller.dropped)
        assert not case.only(smaller.kept).fit().truncated
        fit = smaller
    assert all(case.layout.turn_of[i] in (-1, case.layout.last_turn) for i in fit.kept)
    assert len({case.layout.unit_of[i] for i in fit.kept} - {-1}) <= 1


@at_leisure
@given(cases(largest_message=20))
def test_a_history_that_is_known_to_fit_is_left_alone(case: Case) -> None:
    case = replace(case, settled=None)
    if fits_whole(sum(case.tokens), case.window):
        assert plan_fit(case.layout, case.tokens, case.window, case.retention_ratio) == Fit.whole(
            case.tokens, case.window
        )


@at_leisure
@given(cases(), st.integers(0, 5), st.integers(0, 50))
def test_a_history_whose_bytes_fit_is_never_cut(case: Case, overhead: int, spare: int) -> None:
    count, total_bytes, window = len(case.messages), sum(case.tokens), case.window
    room = int((total_bytes + overhead * count + window.fixed_tokens + spare) / window.factor)
    window = replace(window, max_model_len=room + window.reserve_tokens)
    assert fits_by_bytes(total_bytes, count, overhead, window)
    most_tokens = [size + overhead for size in case.tokens]
    assert not plan_fit(case.layout, most_tokens, window, case.retention_ratio).truncated
