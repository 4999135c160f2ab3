"""Long histories come out of validation as pydantic alone would make them."""

import copy
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.serve.tokenize.protocol import TokenizeRequest

from server.engine.conversations import materialized
from server.engine.validation import Validator

pytestmark = pytest.mark.engine

Message = dict[str, Any]
CALL = {"id": "a", "type": "function", "function": {"name": "look", "arguments": "{}"}}
PLAIN: list[Message] = [
    {"role": "user", "content": "Where to?"},
    {"role": "assistant", "content": "To sea."},
    {"role": "system", "content": ""},
    {"role": "user", "content": "\ud800"},
]
OTHERS: list[Message] = [
    {"role": "user", "content": [{"type": "text", "text": "Where to?"}]},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "a", "content": "42"},
    {"role": "assistant", "content": "Low.", "reasoning_content": "Hm."},
    {"role": "user", "content": "Hi", "name": "Bob"},
    {"role": "wizard", "content": "Hi"},
    {"role": "developer", "content": "Be brief."},
]
WRONG: list[Any] = [
    {"role": "user", "content": {"text": "an object"}},
    {"role": "user"},
    {"content": "no role"},
    {"role": ["user"], "content": "Hi"},
    {"role": None, "content": "Hi"},
    {"role": "user", "content": 7},
    "text",
]


def outcome(validate: Any, body: dict[str, Any]) -> Any:
    try:
        request = validate(copy.deepcopy(body))
        return type(request), request.model_dump(exclude={"messages", "request_id"}), materialized(request.messages)
    except ValidationError as error:
        return [(found["loc"], found["msg"]) for found in error.errors()]


@pytest.mark.parametrize("kind", [ChatCompletionRequest, TokenizeRequest])
@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.sampled_from(PLAIN + OTHERS), min_size=33, max_size=60), st.lists(st.sampled_from(WRONG), max_size=1)
)
def test_a_long_history_is_validated_as_by_pydantic_alone(kind: Any, messages: list[Any], wrong: list[Any]) -> None:
    body = {"model": "m", "messages": [*messages[:20], *wrong, *messages[20:]], "max_tokens": 4}
    assert outcome(Validator(kind), body) == outcome(TypeAdapter(kind).validate_python, body)


def test_a_mistake_is_named_by_its_place_in_the_whole_history() -> None:
    messages = [*[PLAIN[0]] * 40, {"role": "user", "content": 7}]
    with pytest.raises(ValidationError) as caught:
        Validator(ChatCompletionRequest)({"messages": messages})
    assert {error["loc"][:2] for error in caught.value.errors()} == {("messages", 40)}


def test_what_the_client_sent_is_not_shared_with_the_request() -> None:
    messages = [dict(PLAIN[0]) for _ in range(40)]
    request = Validator(ChatCompletionRequest)({"messages": messages})
    request.messages[0]["content"] = "changed"
    assert messages[0]["content"] == "Where to?"


def test_a_long_list_of_something_else_is_left_to_pydantic() -> None:
    assert Validator(TokenizeRequest)({"prompt": "a", "messages": None}).prompt == "a"
