"""Ollama's official client, and the answers of a real engine."""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import ollama
import pytest

from tests.live.running_server import RunningServer

pytestmark = pytest.mark.engine

_SEA: list[Any] = [{"role": "user", "content": "Write one sentence about the sea."}]
_SHORT = {"num_predict": 16, "temperature": 0}


@pytest.fixture
def asking(server: RunningServer) -> Iterator[ollama.Client]:
    client = ollama.Client(server.url, timeout=60)
    yield client
    client._client.close()


def test_a_chat_says_the_same_whole_and_streamed(asking: ollama.Client, model_name: str) -> None:
    asking.chat(model_name, _SEA, options=_SHORT)  # both below find the prompt in the prefix cache, and compute alike
    whole = asking.chat(model_name, _SEA, options=_SHORT)
    parts = list(asking.chat(model_name, _SEA, options=_SHORT, stream=True))
    assert "".join(part.message.content or "" for part in parts) == whole.message.content
    for last in (whole, parts[-1]):
        assert (last.done, last.done_reason, last.eval_count) == (True, "length", 16)
    assert whole.prompt_eval_count == parts[-1].prompt_eval_count
    assert (parts[-1].eval_duration or 0) > 0


def test_a_prompt_is_completed_raw_and_as_a_chat(asking: ollama.Client, model_name: str) -> None:
    raw = asking.generate(model_name, "One, two, three, four,", raw=True, options={"num_predict": 4, "temperature": 0})
    assert "five" in (raw.response or "")
    parts = list(asking.generate(model_name, "Say hello.", options=_SHORT, stream=True))
    assert any(part.response for part in parts)
    assert parts[-1].done


def test_a_schema_is_kept(asking: ollama.Client, model_name: str) -> None:
    schema = {"type": "object", "properties": {"size": {"enum": ["small", "large"]}}, "required": ["size"]}
    answer = asking.chat(
        model_name, _SEA, format={**schema, "additionalProperties": False}, options={"num_predict": 60}
    )
    assert json.loads(answer.message.content or "")["size"] in {"small", "large"}


def test_the_model_is_listed_shown_and_loaded(asking: ollama.Client, model_name: str) -> None:
    assert [model.model for model in asking.list().models] == [model_name]
    shown = asking.show(model_name)
    assert shown.modelinfo is not None
    assert shown.modelinfo["llama.context_length"] == 8192
    assert shown.capabilities == ["completion"]
    assert asking.generate(f"{model_name}:latest").done_reason == "load"


def test_an_image_for_a_model_that_sees_none_is_refused(asking: ollama.Client, model_name: str) -> None:
    messages = [{"role": "user", "content": "What is it?", "images": ["iVBORw0KGgoAAAANSUhEUg=="]}]
    with pytest.raises(ollama.ResponseError, match="multimodal") as raised:
        asking.chat(model_name, messages)
    assert raised.value.status_code == 400


def test_a_client_that_leaves_frees_the_engine(server: RunningServer, model_name: str) -> None:
    body = {"model": model_name, "messages": _SEA, "options": {"num_predict": 4000, "temperature": 2.0}}
    with httpx.stream("POST", f"{server.url}/api/chat", json=body, timeout=60) as response:
        lines = response.iter_lines()  # held: httpx hangs up when nobody holds it any more
        assert next(lines)
        server.wait_until_busy()
    server.wait_until_idle(5)
