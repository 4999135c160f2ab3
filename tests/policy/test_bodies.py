import copy
from typing import Any

import pytest

from server.policy.bodies import (
    CLOSED_FIELDS,
    MaxTokensDefaults,
    is_background_task,
    is_tool_call_forced,
    least_prompt_tokens,
    refuse_closed_fields,
    with_default_max_tokens,
    with_possible_max_tokens,
    with_strict_forced_tools,
    without_tools,
)
from server.policy.refusals import ClosedField

TOOL = {"type": "function", "function": {"name": "look"}}


def chat(content: Any, role: str = "user") -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content}]}


TASK = chat("### Task:\nSuggest a title.")
QUESTION = chat("What is a task?")

FORCED: list[object] = [
    "required",
    {"type": "function", "function": {"name": "look"}},
    {"type": "function", "name": "look"},
    {"type": "any"},
    {"type": "tool", "name": "look"},
]


@pytest.mark.parametrize("field", CLOSED_FIELDS)
@pytest.mark.parametrize("value", ["x", 0, False, {}])
def test_a_closed_field_is_refused_whatever_its_value(field: str, value: object) -> None:
    with pytest.raises(ClosedField, match=field) as refused:
        refuse_closed_fields({"model": "m", field: value}, frozenset())
    assert refused.value.param == field


@pytest.mark.parametrize("field", CLOSED_FIELDS)
def test_a_closed_field_may_be_null(field: str) -> None:
    refuse_closed_fields({field: None}, frozenset())


@pytest.mark.parametrize("field", CLOSED_FIELDS)
def test_opening_one_field_opens_no_other(field: str) -> None:
    refuse_closed_fields({field: "x"}, frozenset({field}))
    with pytest.raises(ClosedField):
        refuse_closed_fields({field: "x"}, frozenset(CLOSED_FIELDS) - {field})


@pytest.mark.parametrize("content", ["### Task:", "### Task:\nSuggest tags.", "\n  ### Task: follow-ups"])
def test_one_message_with_the_heading_is_a_background_task(content: str) -> None:
    assert is_background_task(chat(content))


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"messages": None},
        {"messages": []},
        {"messages": "### Task:"},
        {"messages": ["### Task:"]},
        {"messages": [*TASK["messages"], *TASK["messages"]]},
        chat("Explain `### Task:`."),
        chat(None),
        chat([{"type": "text", "text": "### Task:"}]),
        {"messages": [{"role": "user"}]},
    ],
)
def test_anything_else_is_no_background_task(body: dict[str, Any]) -> None:
    assert not is_background_task(body)


@pytest.mark.parametrize(
    ("body", "defaults", "cap"),
    [
        (QUESTION, MaxTokensDefaults(), None),
        (QUESTION, MaxTokensDefaults(chat=512), 512),
        (TASK, MaxTokensDefaults(), 2048),
        (TASK, MaxTokensDefaults(chat=512), 2048),
        (TASK, MaxTokensDefaults(chat=512, background_task=None), None),
    ],
)
def test_an_open_cap_is_set_to_the_default_of_its_kind(
    body: dict[str, Any], defaults: MaxTokensDefaults, cap: int | None
) -> None:
    capped = with_default_max_tokens(body, "max_completion_tokens", defaults)
    assert capped == (body if cap is None else {**body, "max_completion_tokens": cap})


@pytest.mark.parametrize("named", ["max_tokens", "max_completion_tokens", "max_output_tokens"])
@pytest.mark.parametrize("value", [0, 1, 100_000])
def test_a_named_cap_stays_as_it_is(named: str, value: int) -> None:
    body = {**TASK, named: value}
    assert with_default_max_tokens(body, "max_completion_tokens", MaxTokensDefaults(chat=512)) == body


def test_a_cap_that_is_null_is_an_open_one() -> None:
    body = {**QUESTION, "max_tokens": None}
    capped = with_default_max_tokens(body, "max_completion_tokens", MaxTokensDefaults(chat=512))
    assert capped["max_completion_tokens"] == 512


@pytest.mark.parametrize(
    ("caps", "possible", "asked"),
    [
        ({}, {}, None),
        ({"max_tokens": 100}, {"max_tokens": 100}, 100),
        ({"max_tokens": 4096}, {"max_tokens": 4096}, 4096),
        ({"max_tokens": 4097}, {"max_tokens": 4096}, 4097),
        ({"max_output_tokens": 10**12}, {"max_output_tokens": 4096}, 10**12),
        (
            {"max_tokens": 9000, "max_completion_tokens": 8000},
            {"max_tokens": 4096, "max_completion_tokens": 4096},
            8000,
        ),
        ({"max_tokens": None}, {"max_tokens": None}, None),
        ({"max_tokens": True}, {"max_tokens": True}, None),
        ({"max_tokens": "9000"}, {"max_tokens": "9000"}, None),
        ({"max_tokens": -1}, {"max_tokens": -1}, -1),
    ],
)
def test_a_cap_that_no_window_could_hold_is_lowered_to_the_window(
    caps: dict[str, Any], possible: dict[str, Any], asked: int | None
) -> None:
    assert with_possible_max_tokens({**QUESTION, **caps}, 4096) == ({**QUESTION, **possible}, asked)


@pytest.mark.parametrize("choice", [None, "auto", "none", {"type": "auto"}, {"type": "none"}])
def test_a_choice_that_leaves_the_model_free_is_no_forced_call(choice: object) -> None:
    assert not is_tool_call_forced({"tools": [TOOL], "tool_choice": choice})


def test_tools_without_a_choice_are_no_forced_call() -> None:
    assert not is_tool_call_forced({"tools": [TOOL]})


@pytest.mark.parametrize("choice", FORCED)
def test_a_choice_that_names_a_call_forces_it(choice: object) -> None:
    assert is_tool_call_forced({"tools": [TOOL], "tool_choice": choice})


def test_a_body_loses_everything_about_tools_and_nothing_else() -> None:
    body = {**QUESTION, "tools": [TOOL, TOOL], "tool_choice": "auto", "parallel_tool_calls": False}
    assert without_tools(body) == (QUESTION, 2)


@pytest.mark.parametrize("tools", [None, [], "look", {"look": TOOL}])
def test_what_is_no_list_of_tools_counts_as_none(tools: object) -> None:
    assert without_tools({**QUESTION, "tools": tools}) == (QUESTION, 0)


@pytest.mark.parametrize("choice", FORCED)
def test_a_forced_call_makes_the_tools_strict(choice: object) -> None:
    chat_tool, flat_tool = {"type": "function", "function": {"name": "a"}}, {"type": "function", "name": "b"}
    body = with_strict_forced_tools({**QUESTION, "tools": [chat_tool, flat_tool], "tool_choice": choice})
    assert body["tools"] == [
        {"type": "function", "function": {"name": "a", "strict": True}},
        {"type": "function", "name": "b", "strict": True},
    ]


@pytest.mark.parametrize("said", [False, True])
def test_a_client_that_says_strict_itself_is_obeyed(said: bool) -> None:
    body = {"tools": [{"type": "function", "function": {"name": "a", "strict": said}}], "tool_choice": "required"}
    assert with_strict_forced_tools(body) == body


def test_a_free_call_leaves_the_tools_as_they_are() -> None:
    body = {"tools": [TOOL], "tool_choice": "auto"}
    assert with_strict_forced_tools(body) == body


@pytest.mark.parametrize("tools", [None, [], "look", ["look"], [None]])
def test_tools_in_no_known_form_are_left_to_validation(tools: object) -> None:
    body = {"tools": tools, "tool_choice": "required"}
    assert with_strict_forced_tools(body) == body


def test_no_rule_changes_the_body_it_is_given() -> None:
    body = {**TASK, "tools": [TOOL], "tool_choice": "required"}
    before = copy.deepcopy(body)
    refuse_closed_fields(body, frozenset())
    with_default_max_tokens(body, "max_completion_tokens", MaxTokensDefaults())
    with_possible_max_tokens({**body, "max_tokens": 9000}, 10)
    with_strict_forced_tools(body)
    without_tools(body)
    assert body == before


@pytest.mark.parametrize(
    ("body", "tokens"),
    [
        ({"messages": [{"role": "user", "content": "x" * 160}]}, 10),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "x" * 320}, {"type": "image_url"}]}]}, 20),
        ({"messages": [[{"role": "user", "content": "x" * 160}], [{"role": "user", "content": "x" * 160}]]}, 20),
        ({"prompt": ["x" * 160, "y" * 16]}, 11),
        ({"prompt": [1, 2, 3]}, 0),
        ({"input": "x" * 1_000_000}, 512),
        ({"messages": "no list"}, 0),
        ({"input": [[[[[[[[["x" * 999]]]]]]]]]}, 0),
        ({}, 0),
    ],
)
def test_a_body_has_at_least_so_many_tokens(body: dict[str, Any], tokens: int) -> None:
    assert least_prompt_tokens(body, max_model_len=1024) == tokens
