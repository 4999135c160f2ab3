"""Two front-ends on one engine and one port: what a server has once holds over both, and each may end."""

import collections
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.live.running_server import RunningServer, start_server
from tests.models.tiny_adapter import make_tiny_adapter

pytestmark = [pytest.mark.engine, pytest.mark.slow]

CHAT = "/v1/chat/completions"
STORY: dict[str, Any] = {"messages": [{"role": "user", "content": "Tell a story."}], "temperature": 0, "max_tokens": 4}
OPERATOR = {"authorization": "Bearer the-operators-key"}
WITHIN_S = 120.0
START = (
    "--api-server-count", "2", "--max-model-len", "2048", "--max-num-seqs", "8", "--ttft-slo", "600",
    "--served-model-name", "tiny", "--operator-key", "the-operators-key", "--enable-lora", "--redis-timeout-s", "5",
)  # fmt: skip


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, tiny_tools_model: Path) -> Iterator[RunningServer]:
    running = start_server(
        tmp_path_factory.mktemp("front-ends"), str(tiny_tools_model), *START,
        environment={"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"},
    )  # fmt: skip
    running.wait_until_ready()
    wait_for(lambda: serving(running) == 1, "the second front-end does not serve")
    yield running
    running.kill()


def wait_for(holds: Callable[[], bool], what: str, timeout_s: float = WITHIN_S) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline_s, what
        time.sleep(0.05)


def serving(server: RunningServer) -> int:
    """How often a further front-end has begun to serve."""
    return sum(event.get("event") == "a further front-end serves" for event in server.log_events())


def answered_by(server: RunningServer) -> "collections.Counter[int]":
    """How many chats each front-end has answered; the first process is 0."""
    lines = [event for event in server.log_events() if event.get("event") == "request" and event["path"] == CHAT]
    return collections.Counter(event.get("front_end", 0) for event in lines)


def ask(server: RunningServer, headers: dict[str, str] | None = None, **body: Any) -> httpx.Response:
    """A call on a connection of its own, which any front-end may accept."""
    return httpx.post(f"{server.url}{CHAT}", json={**STORY, **body}, headers=headers, timeout=WITHIN_S)


def ask_both(server: RunningServer, headers: dict[str, str] | None = None, **body: Any) -> list[httpx.Response]:
    """Calls until each front-end has answered at least one of them."""
    before, answers = answered_by(server), list[httpx.Response]()
    deadline_s = time.monotonic() + WITHIN_S
    while min((answered_by(server) - before)[index] for index in (0, 1)) == 0:
        assert time.monotonic() < deadline_s, f"one front-end answers nothing: {answered_by(server) - before}"
        with ThreadPoolExecutor(8) as pool:
            answers += pool.map(lambda _: ask(server, headers, **body), range(8))
    return answers


def front_end(server: RunningServer) -> psutil.Process:
    """The process that was started last."""
    found = [event for event in server.log_events() if event.get("event") == "a further front-end serves"]
    return psutil.Process(int(found[-1]["pid"]))


def test_chats_are_answered_by_both_and_counted_together(server: RunningServer) -> None:
    before = server.metric("tidegate_requests_total")
    answers = ask_both(server)
    assert {answer.status_code for answer in answers} == {200}
    assert len({answer.json()["choices"][0]["message"]["content"] for answer in answers}) == 1
    assert server.metric("tidegate_requests_total") == before + len(answers)
    assert server.metric("vllm:request_success_total") >= len(answers)
    server.wait_until_idle()
    assert server.metric("tidegate_requests_running") == 0
    overview = httpx.get(f"{server.url}/admin/overview", headers=OPERATOR).json()
    assert overview["requests"]["open"] == 0
    assert overview["counters"]["requests_by_status"]["2xx"] >= len(answers)


def test_streams_of_both_end_as_they_should(server: RunningServer) -> None:
    before = answered_by(server)

    def stream(_: int) -> list[str]:
        body = {**STORY, "stream": True, "max_tokens": 16, "ignore_eos": True}
        with httpx.stream("POST", f"{server.url}{CHAT}", json=body, timeout=WITHIN_S) as response:
            return [line for line in response.iter_lines() if line]

    while min((answered_by(server) - before)[index] for index in (0, 1)) == 0:
        with ThreadPoolExecutor(12) as pool:
            for lines in pool.map(stream, range(12)):
                assert lines[-1] == "data: [DONE]"
                assert len(lines) >= 10


def test_a_limit_is_exact_over_both(server: RunningServer) -> None:
    tenant = {"name": "counted", "limits": {"requests_per_minute": 12}}
    assert httpx.post(f"{server.url}/admin/tenants", json=tenant, headers=OPERATOR).status_code == 201
    made = httpx.post(f"{server.url}/admin/tenants/counted/keys", json={}, headers=OPERATOR).json()
    key = {"authorization": f"Bearer {made['key']}"}
    try:
        before, started_s = answered_by(server), time.monotonic()
        with ThreadPoolExecutor(16) as pool:
            statuses = collections.Counter(pool.map(lambda _: ask(server, key).status_code, range(48)))
        given_back = int((time.monotonic() - started_s) / 5)  # twelve a minute
        assert 12 <= statuses[200] <= 12 + given_back
        assert statuses[429] == 48 - statuses[200]
        assert min((answered_by(server) - before)[index] for index in (0, 1)) > 0
        refusals = httpx.get(f"{server.url}/admin/overview", headers=OPERATOR).json()["recent"]["refusals"]
        assert sum(entry["count"] for entry in refusals if entry["tenant"] == "counted") == statuses[429]
    finally:
        assert httpx.delete(f"{server.url}/admin/tenants/counted", headers=OPERATOR).status_code == 200
        wait_for(lambda: {answer.status_code for answer in ask_both(server)} == {200}, "the server stays closed")


def test_a_pinned_level_holds_on_both(server: RunningServer) -> None:
    pin = {"level": 1, "reason": "a test", "ttl_s": 600}
    assert httpx.put(f"{server.url}/admin/level", json=pin, headers=OPERATOR).status_code == 200
    try:
        time.sleep(0.5)
        assert {answer.headers.get("x-degradation-level") for answer in ask_both(server)} == {"1"}
    finally:
        httpx.delete(f"{server.url}/admin/level", headers=OPERATOR)
    wait_for(lambda: {a.headers.get("x-degradation-level") for a in ask_both(server)} == {None}, "it stays pinned")


def test_an_adapter_that_is_loaded_while_the_server_runs_is_known_to_both(
    server: RunningServer, tmp_path: Path
) -> None:
    make_tiny_adapter(tmp_path / "poet", rank=8)
    load = {"lora_name": "poet", "lora_path": str(tmp_path / "poet")}
    loaded = httpx.post(f"{server.url}/v1/load_lora_adapter", json=load, headers=OPERATOR, timeout=WITHIN_S)
    assert loaded.status_code == 200, loaded.text
    told = ask_both(server, model="poet")
    assert {answer.status_code for answer in told} == {200}
    assert len({answer.json()["choices"][0]["message"]["content"] for answer in told}) == 1
    gone = httpx.post(f"{server.url}/v1/unload_lora_adapter", json={"lora_name": "poet"}, headers=OPERATOR)
    assert gone.status_code == 200
    assert {answer.status_code for answer in ask_both(server, model="poet")} == {404}


def test_a_killed_front_end_is_replaced_and_holds_nothing(server: RunningServer) -> None:
    """What ran for it in the engine ends as well, long before its answers would have."""
    served = serving(server)
    victim, cut = front_end(server), threading.Event()

    def stream(_: int) -> bool:
        body = {**STORY, "stream": True, "max_tokens": 1900, "ignore_eos": True}
        try:
            with httpx.stream("POST", f"{server.url}{CHAT}", json=body, timeout=WITHIN_S) as response:
                for _line in response.iter_lines():
                    if cut.is_set():
                        return True
        except httpx.TransportError:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        streams = [pool.submit(stream, number) for number in range(8)]
        wait_for(lambda: server.metric("tidegate_requests_running") == 8, "they do not run")
        victim.kill()
        time.sleep(1)
        cut.set()
        lived = [running.result() for running in streams]
    server.wait_until_idle()
    assert server.metric("tidegate_requests_running") == 0
    assert server.metric("tidegate_kv_reserved_tokens") == 0
    assert not all(lived), "all streams were those of the first process"
    wait_for(lambda: serving(server) == served + 1, "it is not replaced")
    assert {answer.status_code for answer in ask_both(server)} == {200}


def test_both_answer_again_after_the_engine_was_killed(server: RunningServer) -> None:
    (core,) = [child for child in server.children() if "EngineCore" in child.name()]
    core.kill()
    wait_for(lambda: server.metric("tidegate_engine_restarts_total") == 1, "its death was not seen")
    answers = ask_both(server)
    assert {answer.status_code for answer in answers} == {200}
    assert server.metric("tidegate_engine_up") == 1
    server.wait_until_idle()
    assert server.metric("tidegate_requests_running") == 0


def test_ctrl_c_drains_all_and_leaves_no_process(server: RunningServer) -> None:
    """The signal of a terminal reaches every process; the last test, since it ends the server."""
    family, lines = server.children(), list[list[str]]()

    def stream(_: int) -> list[str]:
        body = {**STORY, "stream": True, "max_tokens": 400, "ignore_eos": True}
        with httpx.stream("POST", f"{server.url}{CHAT}", json=body, timeout=WITHIN_S) as response:
            return [line for line in response.iter_lines() if line]

    with ThreadPoolExecutor(8) as pool:
        streams = [pool.submit(stream, number) for number in range(8)]
        wait_for(lambda: server.metric("tidegate_requests_running") == 8, "they do not run")
        os.kill(front_end(server).pid, signal.SIGINT)
        server.process.send_signal(signal.SIGINT)
        lines = [running.result() for running in streams]
    assert server.process.wait(60) == 0
    assert {answer[-1] for answer in lines} == {"data: [DONE]"}
    assert not any("error" in answer[-2] for answer in lines)
    assert psutil.wait_procs(family, timeout=10)[1] == []
