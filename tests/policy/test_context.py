import pytest

from server.policy.context import Fit, InvalidTruncation, LastTurnTooLong, Window, plan_fit
from server.policy.refusals import Refusal
from server.policy.turns import OrphanToolResult
from tests.policy.histories import (
    WINDOW,
    Counted,
    assistant,
    calls,
    fit,
    layout_of,
    one_more,
    other,
    result,
    system,
    user,
)


def assert_refused(history: list[Counted]) -> LastTurnTooLong:
    """Nothing is left to drop once the plan's own render is too long."""
    planned = fit(history)
    with pytest.raises(LastTurnTooLong) as caught:
        one_more(history, planned)
    return caught.value


# The cut


def test_a_history_that_fits_is_left_alone() -> None:
    planned = fit([system(), user(), assistant(), user(70)])
    assert planned == Fit(kept=(0, 1, 2, 3), dropped=(), kept_tokens=100, dropped_tokens=0, cut_turn=0, cut_unit=0)
    assert not planned.truncated


def test_a_cut_drops_the_oldest_turns_whole_until_the_retained_share_is_left() -> None:
    history = [turn for _ in range(5) for turn in (user(), assistant(10))] + [user(1)]
    planned = fit(history)
    assert planned.dropped == (0, 1, 2, 3)
    assert (planned.kept_tokens, planned.dropped_tokens, planned.cut_turn) == (61, 40, 2)
    assert planned.truncated


def test_the_cut_stays_until_the_budget_is_full_again() -> None:
    turns = [message for _ in range(9) for message in (user(), assistant(10))]
    cuts = [fit(turns[: 2 * asked + 1]).cut_turn for asked in range(9)]
    assert cuts == [0, 0, 0, 0, 0, 2, 2, 4, 4]


def test_a_reply_does_not_move_a_cut_that_was_made_to_ask_for_it() -> None:
    asked = [user(30), assistant(30), user(30), assistant(5), user(10)]
    answered = [*asked, assistant(25), user(5)]
    assert fit(asked).cut_turn == fit(answered).cut_turn == 1


def test_a_higher_retention_ratio_drops_less() -> None:
    history = [turn for _ in range(5) for turn in (user(), assistant(10))] + [user(1)]
    assert fit(history, retention_ratio=1.0).cut_turn == 1
    assert fit(history, retention_ratio=0.3).cut_turn == 4


def test_the_head_is_kept_and_narrows_the_budget() -> None:
    history = [system(40), user(20), assistant(20), user(20), assistant(10), user(10)]
    planned = fit(history)
    assert planned.dropped == (1, 2)
    assert planned.kept_tokens == 80


def test_tool_schemas_narrow_the_budget() -> None:
    history = [user(30), assistant(20), user(30)]
    assert not fit(history).truncated
    planned = fit(history, Window(max_model_len=120, reserve_tokens=20, fixed_tokens=40))
    assert planned.dropped == (0, 1)
    assert planned.kept_tokens == 70


def test_the_leading_turn_is_the_first_to_go() -> None:
    assert fit([system(), assistant(60), user(20), assistant(20), user(10)]).dropped == (1,)


def test_a_system_message_goes_with_its_turn() -> None:
    history = [user(40), assistant(20), system(20), assistant(10), user(30)]
    assert fit(history).dropped == (0, 1, 2, 3)


def test_instructions_before_the_last_user_message_stay_with_it() -> None:
    history = [user(40), assistant(40), system(20), user(30)]
    assert fit(history).kept == (2, 3)


def test_a_result_goes_with_the_turn_of_its_call() -> None:
    history = [user(40), calls("a", tokens=30), user(20), result("a", 10), assistant(10), user(10)]
    planned = fit(history)
    assert planned.dropped == (0, 1, 3)
    assert planned.kept_tokens == 40


def test_a_last_turn_over_the_budget_stays_whole_if_the_window_holds_it() -> None:
    planned = fit([user(), assistant(), user(119)])
    assert planned.kept == (2,)
    assert planned.kept_tokens == 119


def test_a_tools_result_sent_as_the_users_opens_no_turn() -> None:
    """Clients whose tools are text send results that way; the question they belong to must stay."""
    sent = [user(20)]
    for i in range(6):
        sent += [assistant(20), ({"role": "user", "content": f"<tool_response>{i} m</tool_response>"}, 20)]
    planned = fit(sent)
    assert planned.truncated
    assert 0 in planned.kept


# Thinking that the template leaves out once the user speaks again


def with_thinking(history: list[Counted], settled: dict[int, int]) -> Fit:
    tokens = [count for _, count in history]
    later = [settled.get(i, count) for i, count in enumerate(tokens)]
    return plan_fit(layout_of(history), tokens, WINDOW, 0.8, later)


def test_thinking_in_earlier_answers_moves_no_cut() -> None:
    history = [message for _ in range(4) for message in (user(), assistant(60))] + [user()]
    planned = with_thinking(history, dict.fromkeys((1, 3, 5, 7), 10))
    assert not planned.truncated
    assert planned.kept_tokens == 90


def test_thinking_counts_in_the_turn_that_is_under_way() -> None:
    history = [user(), assistant(20), user(), calls("a", tokens=60), result("a")]
    assert with_thinking(history, {3: 10}).dropped == (0, 1)


def test_a_cut_made_for_thinking_stays_when_the_thinking_is_gone() -> None:
    history = [user(), assistant(20), user(), calls("a", tokens=60), result("a"), assistant(), user()]
    planned = with_thinking(history, {3: 10})
    assert planned.dropped == (0, 1)
    assert planned.kept_tokens == 50


def test_calls_dropped_in_a_turn_take_their_thinking_with_them() -> None:
    steps = [message for name in "abc" for message in (calls(name, tokens=30), result(name))]
    history = [user(), *steps, assistant(), user()]
    planned = with_thinking(history, {1: 5, 3: 5, 5: 5})
    assert planned.dropped == (1, 2, 3, 4)
    assert planned.kept_tokens == 10 + 5 + 10 + 10 + 10


# Inside the last turn


def test_the_last_turn_sheds_its_oldest_calls_with_their_results_down_to_the_retained_share() -> None:
    steps = [message for name in "abcd" for message in (calls(name, tokens=5), result(name, 20))]
    planned = fit([user(), assistant(), user(10), *steps])
    assert planned.dropped == (0, 1, 3, 4, 5, 6)
    assert planned.kept_tokens == 60


def test_calls_dropped_in_an_agents_turn_leave_the_prompts_beginning_where_it_was() -> None:
    steps = [message for name in "abcdefgh" for message in (calls(name, tokens=5), result(name, 15))]
    history = [user(10), *steps]
    cuts = [fit(history[: 1 + 2 * asked]).cut_unit for asked in range(9)]
    assert cuts == [0, 0, 0, 0, 0, 2, 2, 4, 4]


def test_an_agents_turn_that_was_cut_is_kept_as_it_is_when_the_user_speaks_again() -> None:
    steps = [message for name in "abcde" for message in (calls(name, tokens=5), result(name, 15))]
    history = [user(10), *steps]
    assert fit(history).dropped == (1, 2, 3, 4)
    assert fit([*history, assistant(10), user(10)]).dropped == (1, 2, 3, 4)


def test_parallel_results_are_shed_together_even_when_apart_from_their_call() -> None:
    history = [user(10), calls("a", "b"), result("b", 20), calls("c"), result("a", 20), result("c", 40)]
    planned = fit(history)
    assert planned.dropped == (1, 2, 4)
    assert planned.kept_tokens == 60


def test_instructions_and_unknown_roles_in_the_last_turn_stay() -> None:
    history = [user(10), calls("a"), result("a", 50), system(), other("critic"), calls("b"), result("b", 20)]
    assert fit(history).kept == (0, 3, 4, 5, 6)


def test_a_plain_assistant_message_in_the_last_turn_can_go() -> None:
    assert fit([user(10), assistant(50), calls("b"), result("b", 40)]).dropped == (1,)


def test_the_newest_results_are_kept_over_the_budget_while_the_window_holds_them() -> None:
    planned = fit([user(10), calls("a"), result("a", 40), calls("b"), result("b", 90)])
    assert planned.kept == (0, 3, 4)
    assert planned.kept_tokens == 110


def test_the_newest_results_go_when_the_window_cannot_hold_them() -> None:
    assert fit([user(10), calls("a"), result("a", 110)]).kept == (0,)


def test_tool_schemas_count_when_the_newest_results_are_held_to_the_window() -> None:
    history = [user(10), calls("a"), result("a", 70)]
    assert not fit(history, Window(max_model_len=120, reserve_tokens=20, fixed_tokens=29)).truncated
    assert fit(history, Window(max_model_len=120, reserve_tokens=20, fixed_tokens=30)).kept == (0,)


def test_a_prefilled_reply_is_never_dropped() -> None:
    planned = fit([user(10), calls("a"), result("a", 100), assistant(100)])
    assert planned.kept == (0, 3)
    assert_refused([user(10), calls("a"), result("a"), assistant(110)])


def test_without_any_user_message_the_newest_unit_stays() -> None:
    history = [system(), calls("a"), result("a", 50), calls("b"), result("b", 70)]
    assert fit(history).kept == (0, 3, 4)
    assert_refused([system(), calls("a"), result("a", 110)])


# Too long


def test_a_last_turn_that_cannot_fit_is_refused_with_the_counts() -> None:
    refusal = assert_refused([system(), user(), assistant(), user(110)])
    assert (refusal.prompt_tokens, refusal.max_prompt_tokens) == (130, 119)
    assert "maximum context length is 120 tokens" in refusal.message
    assert "still need 130 tokens, and the largest prompt that fits is 119 tokens" in refusal.message
    assert refusal.param == "messages"


def test_a_last_turn_that_seems_too_long_is_left_to_the_render() -> None:
    """An estimate on the high side must not refuse what the engine would take."""
    assert fit([user(), assistant(), user(130)]).kept == (2,)


def test_a_head_that_cannot_fit_is_refused() -> None:
    assert_refused([system(120)])
    assert_refused([system(120), user(1), assistant(1), user(1)])


def test_no_messages_at_all_fit() -> None:
    assert fit([]).kept == ()
    assert fit([system()]).kept == (0,)


def test_a_refused_turn_does_not_burden_the_turns_after_it() -> None:
    assert fit([user(200), assistant(10), user(10)]).kept == (2,)


def test_the_refusals_are_refusals() -> None:
    assert issubclass(OrphanToolResult, Refusal)
    assert issubclass(LastTurnTooLong, Refusal)
    assert issubclass(InvalidTruncation, Refusal)


# One more


def test_one_more_drops_the_next_turn_then_the_last_turns_units_then_refuses() -> None:
    history = [user(), assistant(), user(), assistant(), user(), calls("a"), result("a"), calls("b"), result("b")]
    planned = fit(history)
    seen = []
    for _ in range(4):
        planned = one_more(history, planned)
        seen.append(planned.dropped)
    assert seen == [(0, 1), (0, 1, 2, 3), (0, 1, 2, 3, 5, 6), (0, 1, 2, 3, 5, 6, 7, 8)]
    assert planned.kept_tokens == 10
    with pytest.raises(LastTurnTooLong) as caught:
        one_more(history, planned)
    assert caught.value.prompt_tokens == 130


def test_one_more_never_drops_a_prefilled_reply() -> None:
    history = [user(), assistant()]
    with pytest.raises(LastTurnTooLong):
        one_more(history, fit(history))


def test_one_more_of_a_lone_head_is_refused() -> None:
    with pytest.raises(LastTurnTooLong):
        one_more([system()], fit([system()]))
