"""Tools on a model whose template shows them, and forced calls on any model."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import OpenAI

from tests.live.running_server import RunningServer, start_server

pytestmark = pytest.mark.engine

_TOOL: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 10}, "unit": {"enum": ["C", "F"]}},
            "required": ["city", "unit"],
            "additionalProperties": False,
        },
    },
}
_ASK: list[Any] = [{"role": "user", "content": "What is the weather in Paris?"}]
_NAMED: Any = {"type": "function", "function": {"name": "get_weather"}}


@pytest.fixture(scope="module")
def tools_server(tmp_path_factory: pytest.TempPathFactory, tiny_tools_model: Path) -> Iterator[RunningServer]:
    running = start_server(tmp_path_factory.mktemp("tools"), str(tiny_tools_model), "--max-model-len", "2048")
    running.wait_until_ready()
    yield running
    running.kill()


def _assert_valid(arguments: str) -> None:
    given = json.loads(arguments)
    assert set(given) == {"city", "unit"}
    assert given["unit"] in {"C", "F"}


@pytest.mark.parametrize("choice", [_NAMED, "required"])
def test_a_forced_call_on_a_model_without_a_tool_template_keeps_to_the_schema(
    client: OpenAI, model_name: str, choice: Any
) -> None:
    answer = client.chat.completions.create(
        model=model_name,
        messages=_ASK,
        tools=[_TOOL],
        tool_choice=choice,
        max_tokens=120,
        temperature=0.5,
    )
    calls = answer.choices[0].message.tool_calls
    assert calls
    assert calls[0].function.name == "get_weather"  # type: ignore[union-attr]
    _assert_valid(calls[0].function.arguments)  # type: ignore[union-attr]


def test_a_forced_call_streams_arguments_that_keep_to_the_schema(client: OpenAI, model_name: str) -> None:
    stream = client.chat.completions.create(
        model=model_name,
        messages=_ASK,
        tools=[_TOOL],
        tool_choice=_NAMED,
        max_tokens=120,
        stream=True,
    )
    chunks: Any = stream
    deltas = [call for chunk in chunks if chunk.choices for call in chunk.choices[0].delta.tool_calls or ()]
    _assert_valid("".join(call.function.arguments or "" for call in deltas if call.function))


def test_a_model_with_a_tool_template_is_shown_the_tools(tools_server: RunningServer) -> None:
    chosen = next(event for event in tools_server.log_events() if event.get("event") == "parsers chosen")
    assert chosen["tool_call_parser"] == "hermes"
    body = {"messages": _ASK, "max_tokens": 2}
    bare, shown = (
        httpx.post(f"{tools_server.url}/v1/chat/completions", json={**body, **extra}, timeout=60)
        for extra in ({}, {"tools": [_TOOL]})
    )
    assert "x-tools-ignored" not in shown.headers
    assert shown.json()["usage"]["prompt_tokens"] > bare.json()["usage"]["prompt_tokens"] + 20


def test_an_anthropic_client_can_force_a_call(server: RunningServer, model_name: str) -> None:
    function = _TOOL["function"]
    body = {
        "model": model_name,
        "max_tokens": 120,
        "messages": _ASK,
        "tools": [{"name": function["name"], "input_schema": function["parameters"]}],
        "tool_choice": {"type": "tool", "name": "get_weather"},
    }
    answer = httpx.post(f"{server.url}/v1/messages", json=body, timeout=60).json()
    used = [block for block in answer["content"] if block["type"] == "tool_use"]
    assert used, answer
    assert set(used[0]["input"]) == {"city", "unit"}
