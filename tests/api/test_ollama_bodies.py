from typing import Any

import pytest

from server.api.ollama_bodies import chat_asked, embed_asked, embeddings_asked, generate_asked
from server.policy.refusals import InvalidRequest

HI = [{"role": "user", "content": "Hi"}]
PNG = "iVBORw0KGgoAAAANSUhEUg=="


def chat(**more: Any) -> dict[str, Any]:
    return chat_asked({"model": "m", "messages": HI, **more}).body


def generate(**more: Any) -> dict[str, Any]:
    return generate_asked({"model": "m", "prompt": "Hi", **more}).body


def test_a_chat_streams_unless_it_says_otherwise() -> None:
    assert chat()["stream"] is True
    assert chat()["stream_options"] == {"include_usage": True}
    assert "stream" not in chat(stream=False)


def test_options_take_the_names_that_vllm_has_for_them() -> None:
    options = {
        "num_predict": 5, "temperature": 0.1, "top_p": 0.2, "top_k": 3, "min_p": 0.4, "seed": 6, "stop": ["x"],
        "repeat_penalty": 1.1, "presence_penalty": 0.5, "frequency_penalty": 0.6,
    }  # fmt: skip
    body = chat(options=options, stream=False)
    assert {name: body[name] for name in body if name not in ("model", "messages")} == {
        "max_tokens": 5, "temperature": 0.1, "top_p": 0.2, "top_k": 3, "min_p": 0.4, "seed": 6, "stop": ["x"],
        "repetition_penalty": 1.1, "presence_penalty": 0.5, "frequency_penalty": 0.6,
    }  # fmt: skip


@pytest.mark.parametrize("num_predict", [-1, -2])
def test_an_answer_without_end_has_no_cap(num_predict: int) -> None:
    assert "max_tokens" not in chat(options={"num_predict": num_predict})


def test_a_seed_below_zero_is_no_seed() -> None:
    assert "seed" not in chat(options={"seed": -1})


def test_options_that_nothing_has_a_use_for_are_named() -> None:
    asked = chat_asked({"model": "m", "messages": HI, "options": {"num_ctx": 4096, "mirostat": 2, "seed": 1}})
    assert asked.ignored == ("mirostat", "num_ctx")


def test_a_format_is_json_or_a_schema() -> None:
    schema = {"type": "object"}
    assert chat(format="json")["response_format"] == {"type": "json_object"}
    assert chat(format=schema)["response_format"]["json_schema"]["schema"] == schema
    assert "response_format" not in chat(format="")


def test_thinking_is_switched_in_the_template_or_by_effort() -> None:
    assert chat(think=False)["chat_template_kwargs"] == {"enable_thinking": False, "thinking": False}
    assert chat(think="high")["reasoning_effort"] == "high"
    assert "chat_template_kwargs" not in chat()


def test_a_history_that_must_stay_whole_is_not_cut() -> None:
    assert chat(truncate=False)["truncation"] == "disabled"
    assert "truncation" not in chat(truncate=True)


def test_tool_results_find_the_calls_they_belong_to() -> None:
    weather = {"function": {"name": "weather", "arguments": {"city": "Paris"}}}
    clock = {"function": {"name": "clock", "arguments": {}}}
    messages = [
        *HI,
        {"role": "assistant", "content": "", "thinking": "Hm.", "tool_calls": [weather, clock, weather]},
        {"role": "tool", "tool_name": "clock", "content": "noon"},
        {"role": "tool", "tool_name": "weather", "content": "rain"},
        {"role": "tool", "content": "sun"},
    ]
    said = chat(messages=messages)["messages"]
    calls = said[1]["tool_calls"]
    assert said[1]["reasoning"] == "Hm."
    assert calls[0]["function"] == {"name": "weather", "arguments": '{"city": "Paris"}'}
    assert len({call["id"] for call in calls}) == 3
    assert [message["tool_call_id"] for message in said[2:]] == [calls[1]["id"], calls[0]["id"], calls[2]["id"]]


def test_the_ids_that_a_client_gives_are_kept() -> None:
    call = {"id": "mine", "function": {"name": "clock", "arguments": {}}}
    messages = [
        *HI,
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "mine", "content": "noon"},
    ]
    said = chat(messages=messages)["messages"]
    assert (said[1]["tool_calls"][0]["id"], said[2]["tool_call_id"]) == ("mine", "mine")


def test_a_tool_result_without_a_call_is_refused() -> None:
    with pytest.raises(InvalidRequest) as refused:
        chat(messages=[*HI, {"role": "tool", "tool_name": "clock", "content": "noon"}])
    assert refused.value.param == "messages.1"


def test_images_become_data_urls_and_nothing_that_is_fetched() -> None:
    content = chat(messages=[{"role": "user", "content": "What is it?", "images": [PNG]}])["messages"][0]["content"]
    assert content == [
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PNG}"}},
        {"type": "text", "text": "What is it?"},
    ]
    with pytest.raises(InvalidRequest):
        chat(messages=[{"role": "user", "content": "", "images": ["http://10.0.0.1/secret"]}])


def test_a_prompt_is_a_chat_of_one_message() -> None:
    asked = generate_asked({"model": "m", "prompt": "Hi", "system": "Be short."})
    assert asked.route == "/v1/chat/completions"
    assert asked.body["messages"] == [{"role": "system", "content": "Be short."}, *HI]


def test_a_raw_prompt_goes_as_it_is_and_has_a_cap() -> None:
    asked = generate_asked({"model": "m", "prompt": "One, two,", "raw": True})
    assert (asked.route, asked.body["prompt"], asked.body["max_tokens"]) == ("/v1/completions", "One, two,", 2048)
    assert generate(raw=True, options={"num_predict": 7})["max_tokens"] == 7


@pytest.mark.parametrize(
    ("field", "value"),
    [("template", "{{ .Prompt }}"), ("context", [1, 2]), ("suffix", "end")],
)
def test_what_would_change_the_answer_and_cannot_be_honoured_is_refused(field: str, value: Any) -> None:
    with pytest.raises(InvalidRequest) as refused:
        generate(**{field: value})
    assert refused.value.param == field


def test_a_call_without_words_only_asks_for_the_model() -> None:
    assert chat_asked({"model": "m", "messages": []}).loads
    assert generate_asked({"model": "m"}).loads
    assert generate_asked({"model": "m", "keep_alive": 0}).unloads
    assert not generate_asked({"model": "m", "prompt": "Hi", "keep_alive": 0}).loads


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"messages": HI}, "model"),
        ({"model": "m", "messages": "Hi"}, "messages"),
        ({"model": "m", "messages": HI, "stream": "yes"}, "stream"),
        ({"model": "m", "messages": [{"content": "Hi"}]}, "messages.0.role"),
    ],
)
def test_a_body_that_is_wrong_names_its_field(body: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        chat_asked(body)
    assert refused.value.param == param


def test_texts_to_embed_are_cut_unless_told_not_to() -> None:
    asked = embed_asked({"model": "m", "input": ["a", "b"], "dimensions": 8})
    assert (asked.route, asked.body["dimensions"]) == ("/v1/embeddings", 8)
    assert asked.body["truncate_prompt_tokens"] == -1
    assert "truncate_prompt_tokens" not in embed_asked({"model": "m", "input": "a", "truncate": False}).body
    assert embeddings_asked({"model": "m", "prompt": "a"}).body["input"] == "a"
