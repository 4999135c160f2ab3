"""Real answers from the embedded model, through the official SDK."""

import json
from typing import Any

import pytest
from openai import OpenAI

pytestmark = pytest.mark.engine

_SEA: list[Any] = [{"role": "user", "content": "Write one sentence about the sea."}]


def test_a_chat_answers_in_words(client: OpenAI, model_name: str) -> None:
    answer = client.chat.completions.create(model=model_name, messages=_SEA, max_tokens=24, temperature=0)
    assert answer.model == model_name
    assert "sea" in (answer.choices[0].message.content or "").lower()
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_a_stream_says_what_the_whole_answer_says(client: OpenAI, model_name: str) -> None:
    asked: dict[str, Any] = {"model": model_name, "messages": _SEA, "max_tokens": 16, "temperature": 0}
    client.chat.completions.create(**asked)  # both below find the prompt in the prefix cache, and compute alike
    whole = client.chat.completions.create(**asked)
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "length"
    counted, known = chunks[-1].usage, whole.usage
    assert counted is not None
    assert known is not None
    assert (counted.prompt_tokens, counted.completion_tokens) == (known.prompt_tokens, known.completion_tokens)


def test_a_stop_string_ends_the_answer_and_is_not_part_of_it(client: OpenAI, model_name: str) -> None:
    answer = client.chat.completions.create(
        model=model_name,
        messages=_SEA,
        max_tokens=64,
        temperature=0,
        stop=[" is", " a"],
    )
    content = answer.choices[0].message.content or ""
    assert answer.choices[0].finish_reason == "stop"
    assert " is" not in content
    assert " a" not in content


def test_n_gives_that_many_choices(client: OpenAI, model_name: str) -> None:
    answer = client.chat.completions.create(model=model_name, messages=_SEA, max_tokens=4, n=3, temperature=1.0)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]


def test_the_same_seed_gives_the_same_answer(client: OpenAI, model_name: str) -> None:
    asked: dict[str, Any] = {"model": model_name, "messages": _SEA, "max_tokens": 12, "temperature": 1.0, "seed": 7}
    answers = [client.chat.completions.create(**asked).choices[0].message.content for _ in range(3)]
    assert answers[1] == answers[2]  # the first one may have filled the prefix cache


def test_logprobs_cover_every_token(client: OpenAI, model_name: str) -> None:
    answer = client.chat.completions.create(
        model=model_name,
        messages=_SEA,
        max_tokens=5,
        temperature=0,
        logprobs=True,
        top_logprobs=3,
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert len(logprobs.content) == 5
    assert all(len(token.top_logprobs) == 3 and token.logprob <= 0 for token in logprobs.content)


def test_a_json_schema_is_kept(client: OpenAI, model_name: str) -> None:
    schema = {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 12}, "size": {"enum": ["small", "large"]}},
        "required": ["city", "size"],
        "additionalProperties": False,
    }
    answer = client.chat.completions.create(
        model=model_name,
        messages=[{"role": "user", "content": "Name a city."}],
        max_tokens=80,
        response_format={"type": "json_schema", "json_schema": {"name": "city", "schema": schema, "strict": True}},
    )
    city = json.loads(answer.choices[0].message.content or "")
    assert set(city) == {"city", "size"}
    assert city["size"] in {"small", "large"}


def test_completions_take_several_prompts(client: OpenAI, model_name: str) -> None:
    answer = client.completions.create(model=model_name, prompt=["One, two,", "The sea is"], max_tokens=4)
    assert [choice.index for choice in answer.choices] == [0, 1]


def test_responses_answer_and_stream(client: OpenAI, model_name: str) -> None:
    answer = client.responses.create(model=model_name, input="Say hello.", max_output_tokens=8)
    assert answer.output_text
    events = list(client.responses.create(model=model_name, input="Say hello.", max_output_tokens=8, stream=True))
    assert events[0].type == "response.created"
    assert events[-1].type in {"response.completed", "response.incomplete"}


def test_models_are_listed_and_found_by_name(client: OpenAI, model_name: str) -> None:
    assert [model.id for model in client.models.list()] == [model_name]
    assert client.models.retrieve(model_name).id == model_name
