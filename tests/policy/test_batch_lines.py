import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.policy.batch_lines import Line, leading_text, order_of, read_line
from server.policy.batches import BatchError
from tests.serving.batch_files import CHAT, line

JSON = st.recursive(
    st.none() | st.booleans() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


def read(value: Any) -> Line | BatchError:
    return read_line(json.dumps(value).encode(), 7, CHAT)


def without(name: str) -> dict[str, Any]:
    return {key: value for key, value in line("a").items() if key != name}


def test_a_good_line_gives_its_name_and_model() -> None:
    read_back = read(line("a"))
    assert isinstance(read_back, Line)
    assert (read_back.custom_id, read_back.model) == ("a", "a-model")


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (b'{"custom_id": "a', "not parseable"),
        (b'{"custom_id": "\xff"}', "UTF-8 (byte 15)"),
        (b"[1, 2]", "not a JSON object"),
        (b"null", "not a JSON object"),
        (b"[" * 100_000, "not parseable"),
        (b'{"custom_id": ' + b"1" * 5000 + b"}", "not parseable"),
    ],
)
def test_a_broken_line_is_named_by_its_number(raw: bytes, said: str) -> None:
    problem = read_line(raw, 40_000, CHAT)
    assert isinstance(problem, BatchError)
    assert (problem.code, problem.line) == ("invalid_json_line", 40_000)
    assert said in problem.message


@pytest.mark.parametrize(
    ("value", "code", "param"),
    [
        (without("custom_id"), "missing_required_parameter", "custom_id"),
        (without("method"), "missing_required_parameter", "method"),
        (without("url"), "missing_required_parameter", "url"),
        (without("body"), "missing_required_parameter", "body"),
        ({**line("a"), "custom_id": 7}, "invalid_type", "custom_id"),
        ({**line("a"), "body": "text"}, "invalid_type", "body"),
        (line(""), "invalid_value", "custom_id"),
        (line("x" * 513), "invalid_value", "custom_id"),
        ({**line("a"), "method": "GET"}, "invalid_method", "method"),
        ({**line("a"), "url": "/v1/embeddings"}, "invalid_url", "url"),
        (line("a", stream=True), "unsupported_parameter", "body.stream"),
        (line("a", background=True), "unsupported_parameter", "body.background"),
    ],
)
def test_what_is_wrong_with_a_request_is_said_with_its_field(value: Any, code: str, param: str) -> None:
    problem = read(value)
    assert isinstance(problem, BatchError)
    assert (problem.code, problem.param, problem.line) == (code, param, 7)


def test_a_byte_order_mark_before_the_first_line_is_no_fault() -> None:
    assert isinstance(read_line(b"\xef\xbb\xbf" + json.dumps(line("a")).encode(), 1, CHAT), Line)


def test_prompts_that_begin_alike_are_sorted_next_to_each_other() -> None:
    def body(system: str, question: str) -> dict[str, Any]:
        return {"messages": [{"role": "system", "content": system}, {"role": "user", "content": question}]}

    bodies = [body(system, question) for question in ("q1", "q2", "q3") for system in ("You translate.", "You sum up.")]
    systems = [item["messages"][0]["content"] for item in sorted(bodies, key=order_of)]
    assert systems == sorted(systems)


def test_the_order_looks_at_every_form_of_prompt() -> None:
    assert order_of({"prompt": ["one", "two"]}) == "onetwo"
    assert order_of({"input": "text", "instructions": "first"}) == "firsttext"
    assert order_of({"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]}) == "usertexthi"


@given(JSON, st.integers(0, 40))
def test_leading_text_never_takes_more_room_than_it_has(value: Any, room: int) -> None:
    assert len(leading_text(value, room)) <= room


@given(st.binary(max_size=200))
def test_any_bytes_are_a_line_or_a_problem(raw: bytes) -> None:
    assert isinstance(read_line(raw, 1, CHAT), (Line, BatchError))
