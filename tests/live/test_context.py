"""Long chats on the real engine: they fit, the client is told, and the prefix cache stays warm."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.live.running_server import RunningServer, start_server

pytestmark = pytest.mark.engine

_WINDOW = 1024
_SYSTEM = {"role": "system", "content": "You are a sailor called Bob."}


@pytest.fixture(scope="module")
def small_window(tmp_path_factory: pytest.TempPathFactory, tiny_tools_model: Path) -> Iterator[RunningServer]:
    running = start_server(
        tmp_path_factory.mktemp("context"), str(tiny_tools_model), "--served-model-name", "tiny",
        "--max-model-len", str(_WINDOW), "--block-size", "32",
    )  # fmt: skip
    running.wait_until_ready()
    yield running
    running.kill()


def _turns(count: int) -> list[dict[str, Any]]:
    history: list[dict[str, Any]] = [_SYSTEM]
    for i in range(count):
        history.append({"role": "user", "content": f"Question {i}: what do you know of island number {i}? " * 3})
        history.append({"role": "assistant", "content": f"Island {i} has {i} palms and a well."})
    return history


def _ask(server: RunningServer, path: str = "/v1/chat/completions", **body: Any) -> httpx.Response:
    return httpx.post(f"{server.url}{path}", json={"max_tokens": 4, **body}, timeout=60)


def test_a_conversation_of_any_length_is_answered_and_the_client_is_told(small_window: RunningServer) -> None:
    history = [*_turns(200), {"role": "user", "content": "And now?"}]
    answer = _ask(small_window, messages=history)
    assert answer.status_code == 200
    assert answer.headers["x-context-truncated"].startswith("messages=")
    (edit,) = answer.json()["context_management"]["applied_edits"]
    assert edit["type"] == "drop_turns"
    assert answer.headers["x-context-truncated"] == (
        f"messages={edit['dropped_messages']}, tokens={edit['dropped_tokens']}"
    )
    assert answer.json()["usage"]["prompt_tokens"] <= _WINDOW - 4


def test_a_conversation_that_fits_is_not_touched(small_window: RunningServer) -> None:
    answer = _ask(small_window, messages=_turns(2)[:-1])
    assert "x-context-truncated" not in answer.headers
    assert "context_management" not in answer.json()


def test_the_prefix_cache_stays_warm_between_two_cuts(small_window: RunningServer) -> None:
    prompt_tokens = cached_tokens = 0
    history = _turns(40)
    for asked in range(25, 40):
        usage = _ask(small_window, messages=history[: 2 + 2 * asked]).json()["usage"]
        prompt_tokens += usage["prompt_tokens"]
        cached_tokens += usage["prompt_tokens_details"]["cached_tokens"]
    assert cached_tokens / prompt_tokens > 0.5


def test_the_last_frame_of_a_stream_tells_what_was_left_out(small_window: RunningServer) -> None:
    body = {"messages": _turns(60)[:-1], "max_tokens": 4, "stream": True, "stream_options": {"include_usage": True}}
    with httpx.stream("POST", f"{small_window.url}/v1/chat/completions", json=body, timeout=60) as response:
        assert response.headers["x-context-truncated"]
        frames = [json.loads(line[6:]) for line in response.iter_lines() if line.startswith("data: {")]
    assert frames[-1]["usage"]
    assert frames[-1]["context_management"]["applied_edits"][0]["type"] == "drop_turns"
    assert all("context_management" not in frame for frame in frames[:-2])


@pytest.mark.parametrize("stream", [False, True])
def test_responses_are_fitted_and_told(small_window: RunningServer, stream: bool) -> None:
    items = [{"role": m["role"], "content": m["content"]} for m in _turns(60)[:-1]]
    body = {"input": items, "max_output_tokens": 4, "stream": stream}
    answer = httpx.post(f"{small_window.url}/v1/responses", json=body, timeout=60)
    assert answer.status_code == 200
    assert answer.headers["x-context-truncated"]
    last = json.loads(answer.text.strip().rsplit("data: ", 1)[1])["response"] if stream else answer.json()
    assert last["context_management"]["applied_edits"][0]["dropped_messages"] > 50


def test_responses_with_truncation_auto_keep_the_system_prompt(small_window: RunningServer) -> None:
    items = [{"role": m["role"], "content": m["content"]} for m in _turns(60)[:-1]]
    answer = _ask(small_window, "/v1/responses", input=items, max_output_tokens=4, truncation="auto").json()
    assert answer["truncation"] == "auto"
    assert answer["usage"]["input_tokens"] < _WINDOW - 4


def test_anthropic_messages_are_fitted_and_told(small_window: RunningServer) -> None:
    answer = _ask(small_window, "/v1/messages", model="tiny", system="Be brief.", messages=_turns(60)[1:-1])
    assert answer.status_code == 200
    assert answer.json()["context_management"]["applied_edits"][0]["type"] == "drop_turns"


def test_plain_text_keeps_its_newest_tokens_only_on_request(small_window: RunningServer) -> None:
    prompt = "word " * 3000
    assert _ask(small_window, "/v1/completions", prompt=prompt).status_code == 400
    answer = _ask(small_window, "/v1/completions", prompt=prompt, truncation="auto")
    assert answer.status_code == 200
    assert answer.json()["context_management"]["applied_edits"][0]["type"] == "drop_tokens"


def test_disabled_truncation_gives_the_error_that_clients_look_for(small_window: RunningServer) -> None:
    answer = _ask(small_window, messages=_turns(60)[:-1], truncation="disabled")
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "context_length_exceeded"
    assert f"maximum context length is {_WINDOW} tokens" in answer.json()["error"]["message"]


def test_a_smaller_ratio_leaves_less_history(small_window: RunningServer) -> None:
    kept = {"auto": 0, "small": 0}
    ratios = {"auto": "auto", "small": {"type": "retention_ratio", "retention_ratio": 0.3}}
    for turns in range(40, 50):  # right after a cut both may leave the same
        for name, truncation in ratios.items():
            report = _ask(small_window, "/v1/context/fit", messages=_turns(turns)[:-1], truncation=truncation)
            kept[name] += len(report.json()["kept_messages"])
    assert kept["small"] < kept["auto"]


def test_an_oversize_max_tokens_is_lowered_and_told_not_refused(small_window: RunningServer) -> None:
    answer = _ask(small_window, messages=[{"role": "user", "content": "Hi"}], max_tokens=99_999)
    assert answer.status_code == 200
    (edit,) = answer.json()["context_management"]["applied_edits"]
    assert edit["type"] == "clamp_max_tokens"
    assert edit["from"] == 99_999
    assert edit["to"] == answer.json()["usage"]["completion_tokens"]


def test_a_dry_run_says_what_would_be_kept_and_generates_nothing(small_window: RunningServer) -> None:
    history = _turns(60)[:-1]
    generated = small_window.metric("vllm:generation_tokens_total")
    report = _ask(small_window, "/v1/context/fit", messages=history).json()
    assert report["object"] == "context.fit"
    assert sorted(report["kept_messages"] + report["dropped_messages"]) == list(range(len(history)))
    assert sum(len(turn["messages"]) for turn in report["turns"]) == len(history)
    assert small_window.metric("vllm:generation_tokens_total") == generated
    answered = _ask(small_window, messages=history).json()["usage"]["prompt_tokens"]
    assert report["prompt_tokens"] == answered


def test_a_last_message_that_cannot_fit_is_refused_with_the_counts(small_window: RunningServer) -> None:
    answer = _ask(small_window, messages=[*_turns(3), {"role": "user", "content": "x " * 4000}])
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["code"] == "context_length_exceeded"
    assert f"maximum context length is {_WINDOW} tokens" in error["message"]
    assert str(_WINDOW - 1) in error["message"]


def test_a_message_that_just_fits_is_answered(small_window: RunningServer) -> None:
    """Estimates are on the high side; they must not refuse what the engine would take."""
    low, high = 100, 1100
    while high - low > 1:
        middle = (low + high) // 2
        asked = [{"role": "user", "content": "a " * middle}]
        status = _ask(small_window, messages=asked, truncation="disabled", max_tokens=1).status_code
        low, high = (middle, high) if status == 200 else (low, middle)
    assert _ask(small_window, messages=[{"role": "user", "content": "a " * low}], max_tokens=1).status_code == 200


def test_a_tool_pair_is_never_torn(small_window: RunningServer) -> None:
    tool = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}
    history = _turns(20)
    for i in range(20):
        call = {"id": f"call{i}", "type": "function", "function": {"name": "look", "arguments": "{}"}}
        history += [
            {"role": "user", "content": f"Look at {i}."},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": f"call{i}", "content": f"A lighthouse, {i} metres high. " * 4},
            {"role": "assistant", "content": "A lighthouse."},
        ]
    history.append({"role": "user", "content": "Which was highest?"})
    report = _ask(small_window, "/v1/context/fit", messages=history, tools=[tool]).json()
    kept = {i: history[i] for i in report["kept_messages"]}
    called = {call["id"] for m in kept.values() for call in m.get("tool_calls") or ()}
    answered = {m["tool_call_id"] for m in kept.values() if m["role"] == "tool"}
    assert called == answered
    assert report["truncated"]
    assert _ask(small_window, messages=history, tools=[tool]).status_code == 200


@pytest.mark.parametrize(
    ("messages", "status"),
    [
        ([{"role": "user", "content": "Hi"}, {"role": "tool", "tool_call_id": "gone", "content": "1"}], 400),
        ([], 400),
        ([_SYSTEM], 200),
        ([{"role": "user", "content": ""}], 200),
        ([{"role": "wizard", "content": "Hi"}], 200),
        ([{"role": "user", "content": [{"type": "text", "text": "nested"}, {"type": "text", "text": "parts"}]}], 200),
        ([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}] * 5000 + [_SYSTEM], 200),
        ([{"role": "user"}], 200),
        ([{"content": "no role"}], 400),
        ([{"role": "user", "content": {"text": "an object"}}], 400),
    ],
)
def test_odd_histories_are_answered_or_refused_clearly(
    small_window: RunningServer, messages: list[dict[str, Any]], status: int
) -> None:
    answer = _ask(small_window, messages=messages)
    assert answer.status_code == status, answer.text[:500]


def test_an_orphan_tool_result_is_named_by_its_index(small_window: RunningServer) -> None:
    orphan = [{"role": "user", "content": "Hi"}, {"role": "tool", "tool_call_id": "gone", "content": "1"}]
    assert _ask(small_window, messages=orphan).json()["error"]["param"] == "messages[1]"


def test_counts_come_from_the_cache_the_second_time(small_window: RunningServer) -> None:
    history = [*_turns(70), {"role": "user", "content": "Something new each time."}]
    _ask(small_window, messages=history)
    page = httpx.get(f"{small_window.url}/metrics").text
    _ask(small_window, messages=history)
    again = httpx.get(f"{small_window.url}/metrics").text
    assert _counted(again, "cache") - _counted(page, "cache") == len(history)
    assert _counted(again, "tokenizer") == _counted(page, "tokenizer")


def _counted(page: str, source: str) -> float:
    wanted = f'tidegate_context_counted_messages_total{{source="{source}"}} '
    return float(next(line.removeprefix(wanted) for line in page.splitlines() if line.startswith(wanted)))
