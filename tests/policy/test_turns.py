import pytest

from server.policy.turns import OrphanToolResult, view
from tests.policy.histories import Counted, assistant, calls, layout_of, other, result, system, user


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
