"""What a client meets on the wire: errors, other dialects, disconnects."""

import json
import threading
import time
from contextlib import suppress
from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI

from tests.live.running_server import RunningServer

pytestmark = pytest.mark.engine

_HI: Any = [{"role": "user", "content": "Hi"}]
_LONG: dict[str, Any] = {"messages": _HI, "max_tokens": 4000, "ignore_eos": True}


def _post(server: RunningServer, path: str, **kwargs: Any) -> httpx.Response:
    return httpx.post(f"{server.url}{path}", timeout=60, **kwargs)


def _error(response: httpx.Response) -> dict[str, Any]:
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert "Traceback" not in response.text
    return dict(error)


def test_an_unknown_model_is_a_404_for_the_sdk(client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as raised:
        client.chat.completions.create(model="nobody", messages=_HI)
    assert raised.value.code == "model_not_found"
    assert raised.value.param == "model"


def test_an_error_before_the_first_frame_is_a_status_also_for_a_stream(client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="nobody", messages=_HI, stream=True)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"messages": "no"}, "messages"),
        ({"messages": _HI, "temperature": "hot"}, "temperature"),
        ({"messages": _HI, "max_tokens": -3}, "max_tokens"),
        ({"messages": _HI, "n": -1}, "n"),
        ({"messages": _HI, "top_p": 7}, "top_p"),
        ({"messages": _HI, "cache_salt": "mine"}, "cache_salt"),
        ({"messages": _HI, "kv_transfer_params": {"prompt_token_ids": [1]}}, "kv_transfer_params"),
        ({}, "messages"),
    ],
)
def test_bad_input_is_a_400_that_names_the_field(server: RunningServer, body: dict[str, Any], param: str) -> None:
    response = _post(server, "/v1/chat/completions", json=body)
    assert response.status_code == 400
    assert _error(response)["param"] == param
    assert _error(response)["type"] == "invalid_request_error"


@pytest.mark.parametrize("content", [b'{"messages": [', b"[1, 2]", b"\xff\xfe", b"null", b""])
def test_a_body_that_is_no_json_object_is_a_400(server: RunningServer, content: bytes) -> None:
    response = _post(server, "/v1/chat/completions", content=content, headers={"content-type": "application/json"})
    assert response.status_code == 400
    _error(response)


def test_a_prompt_over_the_window_says_so_in_the_words_that_clients_look_for(server: RunningServer) -> None:
    response = _post(server, "/v1/completions", json={"prompt": "word " * 20000, "max_tokens": 1})
    assert response.status_code == 400
    assert _error(response)["code"] == "context_length_exceeded"
    assert "maximum context length is 8192 tokens" in _error(response)["message"]


def test_a_body_over_the_cap_is_a_413(server: RunningServer) -> None:
    response = _post(server, "/v1/chat/completions", json={"messages": [{"role": "user", "content": "x" * (65 << 20)}]})
    assert response.status_code == 413
    assert _error(response)["code"] == "request_too_large"


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/v1/nothing", 404), ("DELETE", "/v1/models", 405), ("POST", "/v1/embeddings", 404),
     ("POST", "/invocations", 404), ("POST", "/collective_rpc", 404), ("GET", "/server_info", 404)],
)  # fmt: skip
def test_a_route_that_is_not_served_answers_in_the_error_shape(
    server: RunningServer, method: str, path: str, status: int
) -> None:
    response = httpx.request(method, f"{server.url}{path}", json={})
    assert response.status_code == status
    _error(response)


def test_anthropic_messages_answer_and_fail_in_their_own_shape(server: RunningServer, model_name: str) -> None:
    asked = {"model": model_name, "max_tokens": 4, "messages": _HI}
    answer = _post(server, "/v1/messages", json=asked).json()
    assert answer["type"] == "message"
    assert answer["usage"]["output_tokens"] == 4
    wrong = _post(server, "/v1/messages", json={**asked, "model": "nobody"})
    assert wrong.status_code == 404
    assert wrong.json()["type"] == "error"
    assert wrong.json()["error"]["type"] == "not_found_error"
    counted = _post(server, "/v1/messages/count_tokens", json=asked).json()
    usage = answer["usage"]
    seen = usage["input_tokens"] + usage["cache_read_input_tokens"] + usage["cache_creation_input_tokens"]
    assert counted["input_tokens"] == seen


def test_tokens_survive_the_way_there_and_back(server: RunningServer) -> None:
    tokens = _post(server, "/tokenize", json={"prompt": "The sea, 海, 🌊", "add_special_tokens": False}).json()[
        "tokens"
    ]
    assert _post(server, "/detokenize", json={"tokens": tokens}).json()["prompt"] == "The sea, 海, 🌊"


def test_several_conversations_go_in_one_call(server: RunningServer) -> None:
    asked = {"messages": [_HI, [{"role": "user", "content": "Bye"}]], "max_tokens": 3}
    choices = _post(server, "/v1/chat/completions/batch", json=asked).json()["choices"]
    assert len(choices) == 2


def test_tools_are_left_out_for_a_model_that_cannot_use_them_and_the_client_is_told(server: RunningServer) -> None:
    tools = [
        {"type": "function", "function": {"name": f"tool{i}", "parameters": {"type": "object"}}} for i in range(36)
    ]
    response = _post(server, "/v1/chat/completions", json={"messages": _HI, "tools": tools, "max_tokens": 3})
    assert response.status_code == 200
    assert response.headers["x-tools-ignored"] == "36"
    assert response.json()["choices"][0]["message"]["content"]


def test_a_client_that_leaves_mid_stream_frees_the_engine(server: RunningServer) -> None:
    with httpx.stream("POST", f"{server.url}/v1/chat/completions", json={**_LONG, "stream": True}) as response:
        lines = response.iter_lines()  # held: httpx hangs up when nobody holds it any more
        next(lines)
        server.wait_until_busy()
    server.wait_until_idle(timeout_s=3)
    assert server.metric("vllm:kv_cache_usage_perc") == 0


def test_a_client_that_leaves_before_its_whole_answer_frees_the_engine(server: RunningServer) -> None:
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{server.url}/v1/chat/completions", json=_LONG, timeout=1)
    server.wait_until_idle(timeout_s=3)


def test_a_storm_of_disconnects_leaves_nothing_behind(server: RunningServer) -> None:
    def leave_early(patience_s: float) -> None:
        with suppress(httpx.TimeoutException):  # or it is refused before its patience ends
            httpx.post(f"{server.url}/v1/completions", json={"prompt": "x " * 500, **_LONG_TEXT}, timeout=patience_s)

    threads = [threading.Thread(target=leave_early, args=(0.02 * i + 0.01,)) for i in range(24)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    server.wait_until_idle()
    deadline_s = time.monotonic() + 5
    while httpx.get(f"{server.url}/load").json()["server_load"] and time.monotonic() < deadline_s:
        time.sleep(0.05)
    assert httpx.get(f"{server.url}/load").json() == {"server_load": 0}
    assert server.metric("vllm:kv_cache_usage_perc") == 0


_LONG_TEXT: dict[str, Any] = {"max_tokens": 4000, "ignore_eos": True}


def test_every_log_line_of_a_request_carries_its_id(server: RunningServer) -> None:
    response = _post(
        server,
        "/v1/chat/completions",
        json={"messages": _HI, "max_tokens": 2},
        headers={"x-request-id": "from-client.1"},
    )
    assert response.headers["x-request-id"] == "from-client.1"
    lines = [event for event in server.log_events() if event.get("request_id") == "from-client.1"]
    assert any(line["event"] == "request" and line["status"] == 200 for line in lines)
    assert "Hi" not in json.dumps(lines)


def test_the_document_describes_the_bodies_once_the_engine_serves(server: RunningServer) -> None:
    document = httpx.get(f"{server.url}/openapi.json").json()
    body = document["paths"]["/v1/chat/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert "messages" in body["properties"]
    assert httpx.get(f"{server.url}/docs").status_code == 200
