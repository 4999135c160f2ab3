"""What the metrics page and the log tell of requests to the real application."""

import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.api.running_application import running
from tests.serving.fake_stack import FakeStack, RecordingOperation, StreamingOperation
from tests.telemetry.captured_logs import CapturedLogs, captured_logs

CHAT = "/v1/chat/completions"
TIMEOUT_S = 10.0


@pytest.fixture(autouse=True)
def log() -> Iterator[CapturedLogs]:
    with captured_logs() as captured:
        yield captured


def stack(chat: RecordingOperation | StreamingOperation) -> FakeStack:
    return FakeStack({("POST", CHAT): chat})


def eventually(holds: Callable[[], bool]) -> None:
    """What is reported follows the answer's last byte."""
    deadline_s = time.monotonic() + TIMEOUT_S
    while not holds():
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


def value(client: httpx.Client, name: str, **labels: str) -> float:
    """A sample of the page; 0 where it is not there."""
    families = text_string_to_metric_families(client.get("/metrics").text)
    samples = [
        s for family in families for s in family.samples if s.name == name and labels.items() <= s.labels.items()
    ]
    return sum(sample.value for sample in samples)


def line(log: CapturedLogs) -> dict[str, Any]:
    """The line of the one request."""
    eventually(lambda: any(event["event"] == "request" and event["path"] == CHAT for event in log.events))
    (found,) = [event for event in log.events if event["event"] == "request" and event["path"] == CHAT]
    return found


def test_a_streams_line_has_tenant_class_times_and_level_and_no_prompt(log: CapturedLogs) -> None:
    operation = StreamingOperation()
    operation.say("one", "two")
    operation.end()
    with running(stack(operation)) as client:
        client.post(CHAT, json={"messages": [{"role": "user", "content": "my secret"}]})
        found = line(log)
    assert (found["tenant"], found["class"], found["model"]) == ("anyone", "default", "a-model")
    assert (found["prompt_tokens"], found["degradation_level"]) == (7, 0)
    assert 0 <= found["queue_wait_ms"] <= found["ttft_ms"] <= found["duration_ms"]
    assert "refusal" not in found
    assert "my secret" not in log.text


def test_a_stream_is_in_the_figures_of_its_class() -> None:
    operation = StreamingOperation()
    operation.say("one")
    operation.end()
    with running(stack(operation)) as client:
        client.post(CHAT, json={})
        eventually(lambda: value(client, "tidegate_requests_total", route=CHAT, **{"class": "default"}) == 1)
        assert value(client, "tidegate_time_to_first_token_seconds_count") == 1
        assert value(client, "tidegate_slo_requests_total", objective="ttft") == 1
        assert value(client, "tidegate_tenant_requests_total", tenant="anyone", outcome="answered") == 1


def test_a_refusal_is_counted_and_logged_by_its_code(log: CapturedLogs) -> None:
    with running(stack(RecordingOperation())) as client:
        client.post(CHAT, json={"cache_salt": "x"})
        assert line(log)["refusal"] == "unsupported_parameter"
        client.get("/nowhere")
        assert value(client, "tidegate_refusals_total", reason="unsupported_parameter") == 1
        assert value(client, "tidegate_refusals_total", reason="not_found") == 1
        assert value(client, "tidegate_slo_requests_total", objective="answered") == 0
        assert value(client, "tidegate_tenant_requests_total", outcome="refused") == 1


def test_a_stream_that_an_error_ends_misses_its_objective_under_the_errors_status(log: CapturedLogs) -> None:
    operation = StreamingOperation()
    operation.say("one")
    operation.fail(RuntimeError("the engine broke"))
    with running(stack(operation)) as client:
        assert client.post(CHAT, json={}).status_code == 200
        eventually(lambda: value(client, "tidegate_slo_missed_total", objective="answered") == 1)
        assert value(client, "tidegate_requests_total", status="500") == 1
        assert value(client, "tidegate_tenant_requests_total", outcome="failed") == 1
        assert value(client, "tidegate_time_to_first_token_seconds_count") == 0
    assert (line(log)["status"], line(log)["refusal"]) == (200, "internal_error")


def test_the_list_of_models_is_no_request_for_the_engine() -> None:
    with running(stack(RecordingOperation())) as client:
        client.get("/v1/models")
        assert value(client, "tidegate_requests_total") == 0
        assert value(client, "tidegate_http_requests_total", route="/v1/models") == 1


def test_while_an_engine_is_loaded_or_replaced_the_page_answers_and_says_so() -> None:
    with running() as client:
        assert client.get("/metrics").status_code == 200
        assert value(client, "tidegate_engine_up") == 0
    dead = stack(RecordingOperation())
    with running(dead) as client:
        assert value(client, "tidegate_engine_up") == 1
        dead.alive = False
        assert value(client, "tidegate_engine_up") == 0


def test_the_page_names_the_versions() -> None:
    with running() as client:
        assert value(client, "tidegate_build_info", tidegate="1.2.3", vllm="0.32.0") == 1
