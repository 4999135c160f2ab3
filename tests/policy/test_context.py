from typing import Any

import pytest

from server.policy.context import (
    Fit,
    InvalidTruncation,
    LastTurnTooLong,
    Layout,
    OrphanToolResult,
    TruncationPolicy,
    Window,
    default_reserve_tokens,
    drop_one_more,
    fits_by_bytes,
    keep_newest,
    lay_out,
    parse_truncation,
    plan_fit,
    view,
)
from server.policy.refusals import Refusal

Message = dict[str, Any]
Counted = tuple[Message, int]

# With no head and nothing fixed the budget B is 100 tokens, a cut leaves at most 80, and the engine takes up to 119.
WINDOW = Window(max_model_len=120, reserve_tokens=20)


def system(tokens: int = 10) -> Counted:
    return {"role": "system", "content": "Be kind."}, tokens


def user(tokens: int = 10) -> Counted:
    return {"role": "user", "content": "And then?"}, tokens


def assistant(tokens: int = 10) -> Counted:
    return {"role": "assistant", "content": "Well."}, tokens


def calls(*ids: str | None, tokens: int = 10) -> Counted:
    tool_calls = [{"id": call_id, "type": "function", "function": {"name": "look"}} for call_id in ids]
    return {"role": "assistant", "content": None, "tool_calls": tool_calls}, tokens


def result(call_id: str | None, tokens: int = 10) -> Counted:
    message = {"role": "tool", "content": "42"}
    return (message if call_id is None else {**message, "tool_call_id": call_id}), tokens


def other(role: str, tokens: int = 10) -> Counted:
    return {"role": role, "content": "?"}, tokens


def layout_of(history: list[Counted]) -> Layout:
    return lay_out([view(message) for message, _ in history])


def fit(history: list[Counted], window: Window = WINDOW, retention_ratio: float = 0.8) -> Fit:
    return plan_fit(layout_of(history), [tokens for _, tokens in history], window, retention_ratio)


def one_more(history: list[Counted], planned: Fit, window: Window = WINDOW) -> Fit:
    return drop_one_more(planned, layout_of(history), [tokens for _, tokens in history], window, rendered_tokens=130)


def assert_refused(history: list[Counted]) -> LastTurnTooLong:
    """Nothing is left to drop once the plan's own render is too long."""
    planned = fit(history)
    with pytest.raises(LastTurnTooLong) as caught:
        one_more(history, planned)
    return caught.value


# Structure


def test_a_turn_is_a_user_message_and_all_that_follows_until_the_next() -> None:
    layout = layout_of([user(), assistant(), user(), calls("a"), result("a"), assistant(), user()])
    assert layout.turn_of == (0, 0, 1, 1, 1, 1, 2)


def test_the_leading_system_and_developer_messages_are_the_head() -> None:
    layout = layout_of([system(), other("developer"), user(), assistant()])
    assert layout.turn_of == (-1, -1, 0, 0)


def test_each_user_message_opens_a_turn_also_right_after_another() -> None:
    layout = layout_of([user(), user(), assistant(), user(), user()])
    assert layout.turn_of == (0, 1, 1, 2, 3)


def test_assistant_messages_before_the_first_user_form_a_leading_turn() -> None:
    layout = layout_of([system(), assistant(), assistant(), user(), assistant()])
    assert layout.turn_of == (-1, 0, 0, 1, 1)


def test_a_system_message_amid_a_turn_belongs_to_it() -> None:
    layout = layout_of([user(), assistant(), system(), assistant(), user()])
    assert layout.turn_of == (0, 0, 0, 0, 1)


def test_a_system_message_directly_before_a_user_message_belongs_to_the_turn_that_message_opens() -> None:
    layout = layout_of([user(), assistant(), system(), other("developer"), user(), system(), user(), assistant()])
    assert layout.turn_of == (0, 0, 1, 1, 1, 2, 2, 2)


def test_a_system_message_at_the_end_belongs_to_the_last_turn() -> None:
    assert layout_of([user(), assistant(), system()]).turn_of == (0, 0, 0)


def test_a_message_of_an_unknown_role_belongs_to_the_current_turn() -> None:
    layout = layout_of([user(), other("critic"), assistant(), other("critic"), user()])
    assert layout.turn_of == (0, 0, 0, 0, 1)
    assert layout.unit_of == (-1, -1, 0, -1, -1)


def test_a_call_and_all_its_parallel_results_are_one_unit() -> None:
    layout = layout_of([user(), calls("a", "b"), result("b"), result("a"), calls("c"), result("c")])
    assert layout.unit_of == (-1, 0, 0, 0, 1, 1)


def test_a_result_far_from_its_call_belongs_to_the_turn_and_unit_of_the_call() -> None:
    layout = layout_of([user(), calls("a"), user(), assistant(), result("a")])
    assert layout.turn_of == (0, 0, 1, 1, 0)
    assert layout.unit_of == (-1, 0, -1, 1, 0)


def test_a_call_id_used_again_means_the_latest_call() -> None:
    layout = layout_of([user(), calls("call_0"), result("call_0"), calls("call_0"), result("call_0")])
    assert layout.unit_of == (-1, 0, 0, 1, 1)


def test_a_result_without_an_id_belongs_to_the_calls_it_follows() -> None:
    layout = layout_of([user(), calls(None, None), result(None), result(None)])
    assert layout.unit_of == (-1, 0, 0, 0)


def test_a_function_message_belongs_to_the_assistant_message_it_follows() -> None:
    layout = layout_of([user(), assistant(), other("function"), user(), other("function")])
    assert layout.unit_of == (-1, 0, 0, -1, -1)


def test_an_iterator_of_tool_calls_is_not_used_up() -> None:
    with pytest.raises(TypeError, match="must be a list"):
        view({"role": "assistant", "tool_calls": iter([{"id": "a"}])})


# Validation


@pytest.mark.parametrize(
    ("history", "index"),
    [
        ([user(), result("a")], 1),
        ([result("a"), user()], 0),
        ([user(), calls("a"), result("b")], 2),
        ([user(), result("a"), calls("a")], 1),
        ([user(), calls("a"), result("a"), result("b")], 3),
        ([user(), result(None)], 1),
        ([user(), assistant(), result(None)], 2),
        ([user(), calls("a"), user(), result(None)], 3),
        ([user(), calls("a"), user(), result("a"), result(None)], 4),
    ],
)
def test_a_tool_result_without_its_call_is_refused_by_its_index(history: list[Counted], index: int) -> None:
    with pytest.raises(OrphanToolResult) as caught:
        layout_of(history)
    assert caught.value.param == f"messages[{index}]"
    assert caught.value.message.startswith(f"messages[{index}] is a")


def test_an_orphan_is_named_by_its_call_id() -> None:
    with pytest.raises(OrphanToolResult, match="result of tool call 'a'"):
        layout_of([user(), result("a")])


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


# Budget


@pytest.mark.parametrize(("max_model_len", "reserve_tokens"), [(131_072, 1024), (4096, 1024), (2048, 512), (3, 0)])
def test_the_reserve_is_1024_tokens_or_a_quarter_of_a_small_window(max_model_len: int, reserve_tokens: int) -> None:
    assert default_reserve_tokens(max_model_len) == reserve_tokens


def test_the_short_context_level_halves_what_the_turns_may_take() -> None:
    history = [system(), user(20), assistant(20), user(20), assistant(10), user(10)]
    half = Window(max_model_len=120, reserve_tokens=20, factor=0.5)
    assert not fit(history).truncated
    assert fit(history, half).dropped == (1, 2)
    assert half.turn_budget(head_tokens=10) == (45, 109)


def test_the_short_context_level_refuses_nothing_that_the_window_holds() -> None:
    half = Window(max_model_len=120, reserve_tokens=20, factor=0.5)
    assert fit([user(), assistant(), user(10), calls("a"), result("a", 90)], half).kept == (2, 3, 4)


def test_a_reserve_below_the_shortest_reply_still_leaves_room_for_that_reply() -> None:
    assert fit([user(), assistant(), user(80)], Window(100, reserve_tokens=0)).kept_tokens == 80


def test_a_factor_besides_the_two_is_a_mistake() -> None:
    with pytest.raises(ValueError, match=r"factor is 0\.7"):
        Window(max_model_len=120, reserve_tokens=20, factor=0.7)


def test_a_history_whose_bytes_fit_needs_no_counting() -> None:
    window = Window(max_model_len=1000, reserve_tokens=200, fixed_tokens=100)
    assert fits_by_bytes(600, message_count=10, message_overhead_tokens=10, window=window)
    assert not fits_by_bytes(601, message_count=10, message_overhead_tokens=10, window=window)
    half = Window(max_model_len=1000, reserve_tokens=200, fixed_tokens=100, factor=0.5)
    assert fits_by_bytes(200, message_count=10, message_overhead_tokens=10, window=half)
    assert not fits_by_bytes(201, message_count=10, message_overhead_tokens=10, window=half)


def test_a_plain_prompt_keeps_its_newest_tokens() -> None:
    assert keep_newest(token_count=130, budget=100) == 30
    assert keep_newest(token_count=100, budget=100) == 0


# What the request asks for


def test_a_request_without_truncation_gets_the_operators_policy() -> None:
    default = TruncationPolicy(enabled=False, retention_ratio=0.6)
    assert parse_truncation(None, default) is default


@pytest.mark.parametrize("value", ["auto", {"type": "auto"}])
def test_auto_cuts_with_the_operators_ratio(value: object) -> None:
    assert parse_truncation(value, TruncationPolicy(enabled=False, retention_ratio=0.6)) == TruncationPolicy(True, 0.6)


@pytest.mark.parametrize("value", ["disabled", {"type": "disabled"}])
def test_disabled_never_cuts(value: object) -> None:
    assert not parse_truncation(value, TruncationPolicy()).enabled


@pytest.mark.parametrize(("ratio", "parsed"), [(0.5, 0.5), (1, 1.0), (1.0, 1.0)])
def test_a_retention_ratio_overrides_the_operators(ratio: float, parsed: float) -> None:
    value = {"type": "retention_ratio", "retention_ratio": ratio}
    assert parse_truncation(value, TruncationPolicy(enabled=False, retention_ratio=0.6)) == TruncationPolicy(
        True, parsed
    )


@pytest.mark.parametrize("ratio", [0, 0.0, -0.5, 1.01, 2, True, "0.8", None, float("nan"), float("inf")])
def test_a_ratio_outside_its_range_is_refused(ratio: object) -> None:
    with pytest.raises(InvalidTruncation, match="above 0 and at most 1"):
        parse_truncation({"type": "retention_ratio", "retention_ratio": ratio}, TruncationPolicy())


@pytest.mark.parametrize(
    "value",
    [
        "sometimes",
        "",
        True,
        0.8,
        [],
        {},
        {"type": "retention_ratio"},
        {"type": "auto", "retention_ratio": 0.8},
        {"type": "retention_ratio", "retention_ratio": 0.8, "token_limits": {"post_instructions": 100}},
    ],
)
def test_a_bad_truncation_is_refused_in_a_sentence(value: object) -> None:
    with pytest.raises(InvalidTruncation, match='must be "auto", "disabled" or') as caught:
        parse_truncation(value, TruncationPolicy())
    assert caught.value.param == "truncation"


@pytest.mark.parametrize("ratio", [0.0, -1.0, 1.5, float("nan")])
def test_an_operators_ratio_outside_its_range_is_a_mistake(ratio: float) -> None:
    with pytest.raises(ValueError, match="above 0 and at most 1"):
        TruncationPolicy(retention_ratio=ratio)


def test_a_tools_result_sent_as_the_users_opens_no_turn() -> None:
    """Clients whose tools are text send results that way; the question they belong to must stay."""
    sent = [user(20)]
    for i in range(6):
        sent += [assistant(20), ({"role": "user", "content": f"<tool_response>{i} m</tool_response>"}, 20)]
    planned = fit(sent)
    assert planned.truncated
    assert 0 in planned.kept
