"""More requests than a real engine may run at once: two at a time, in a small KV cache."""

import hashlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.live.running_server import RunningServer, start_server

pytestmark = pytest.mark.engine

_KV_BYTES = 8 << 20
_PLACES = 2
_SLOW_READER_TIMEOUT_S = 2
_LONG: dict[str, Any] = {"max_tokens": 1500, "ignore_eos": True, "stream": True}
_KEYS = {name: f"tg-test-{name}-0123456789abcdef" for name in ("person", "vip", "jobs")}
_CLASSES = {"person": "default", "vip": "critical", "jobs": "batch"}
_SHORT: dict[str, Any] = {"max_tokens": 4, "ignore_eos": True}


@pytest.fixture(scope="module")
def busy(tmp_path_factory: pytest.TempPathFactory, tiny_tools_model: Path) -> Iterator[RunningServer]:
    folder = tmp_path_factory.mktemp("overload")
    tenants = folder / "tenants.toml"
    tenants.write_text("".join(map(_declared, _KEYS)), encoding="utf-8")
    running = start_server(
        folder, str(tiny_tools_model), "--served-model-name", "tiny",
        "--max-num-seqs", str(_PLACES), "--block-size", "32", "--kv-cache-memory-bytes", str(_KV_BYTES),
        "--ttft-slo", "30", "--tpot-slo", "5", "--slow-reader-timeout", str(_SLOW_READER_TIMEOUT_S),
        "--tenants-file", str(tenants), "--data-folder", str(folder / "data"),
        environment={"VLLM_CPU_KVCACHE_SPACE": ""},
    )  # fmt: skip
    running.wait_until_ready()
    yield running
    running.kill()


def _declared(tenant: str) -> str:
    digest = hashlib.sha256(_KEYS[tenant].encode()).hexdigest()
    return f'[tenants.{tenant}]\nclass = "{_CLASSES[tenant]}"\nkeys = [{{ sha256 = "{digest}" }}]\n\n'


def _key(tenant: str) -> dict[str, str]:
    return {"authorization": f"Bearer {_KEYS[tenant]}"}


def _ask(server: RunningServer, text: str = "Hi", who: str = "person", **body: Any) -> httpx.Response:
    asked = {"messages": [{"role": "user", "content": text}], **body}
    headers = {**_key(who), **body.pop("headers", {})}
    asked.pop("headers", None)
    return httpx.post(f"{server.url}/v1/chat/completions", json=asked, headers=headers, timeout=120)


def _until(reached: Callable[[], bool], timeout_s: float = 60.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while time.monotonic() < deadline_s:
        if reached():
            return
        time.sleep(0.02)
    raise AssertionError(f"not reached in {timeout_s} s")


class Holding:
    """Takes every place with streams that go on until the block is left."""

    def __init__(self, server: RunningServer, streams: int = _PLACES, who: str = "person", **body: Any) -> None:
        self._server, self._streams, self._who, self._body = server, streams, who, {**_LONG, **body}
        self._leave = threading.Event()

    def __enter__(self) -> None:
        self._threads = [threading.Thread(target=self._hold) for _ in range(self._streams)]
        for thread in self._threads:
            thread.start()
        _until(lambda: self._server.metric("tidegate_requests_running") == self._streams)

    def __exit__(self, *_: object) -> None:
        self._leave.set()
        for thread in self._threads:
            thread.join()

    def _hold(self) -> None:
        while not self._leave.is_set():
            body = {"messages": [{"role": "user", "content": "Go on"}], **self._body}
            url, key = f"{self._server.url}/v1/chat/completions", _key(self._who)
            with httpx.stream("POST", url, json=body, headers=key, timeout=120) as response:
                assert response.status_code == 200
                for _ in response.iter_raw():
                    if self._leave.is_set():
                        break


def _idle(server: RunningServer) -> bool:
    names = ("requests_running", "requests_waiting", "kv_reserved_tokens")
    return [server.metric(f"tidegate_{name}") for name in names] == [0, 0, 0]


def test_the_gate_opens_with_the_engines_real_capacity(busy: RunningServer) -> None:
    (opened,) = [event for event in busy.log_events() if event.get("event") == "gate open"]
    assert opened["max_running"] == _PLACES
    assert 4000 < opened["kv_tokens"] < 9000
    assert busy.metric("tidegate_kv_capacity_tokens") == opened["kv_tokens"]


def test_more_answers_than_the_cache_holds_are_a_400_with_the_numbers(busy: RunningServer) -> None:
    refused = _ask(busy, n=16, max_tokens=1500)
    assert refused.status_code == 400
    error = refused.json()["error"]
    assert error["param"] == "n"
    assert "16 answers of 1500 tokens" in error["message"]
    assert _ask(busy, n=3, max_tokens=4, temperature=1.0).status_code == 200  # more than may run at once: alone


def test_an_answer_says_whether_it_waited(busy: RunningServer) -> None:
    free = _ask(busy, **_SHORT)
    assert free.headers["x-queue-position"] == "0"
    assert float(free.headers["x-queue-wait"]) < 0.5
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: _ask(busy, **{**_SHORT, "max_tokens": 30}), range(8)))
    assert {answer.status_code for answer in answers} == {200}
    assert max(int(answer.headers["x-queue-position"]) for answer in answers) >= 1
    assert max(float(answer.headers["x-queue-wait"]) for answer in answers) > 0
    _until(lambda: _idle(busy))


def test_flexible_work_is_served_after_everything_that_came_later(busy: RunningServer) -> None:
    ends: dict[str, float] = {}

    def ask(name: str, tier: str) -> None:
        assert _ask(busy, service_tier=tier, **_SHORT).status_code == 200
        ends[name] = time.monotonic()

    with ThreadPoolExecutor(6) as pool:
        with Holding(busy):
            jobs = [pool.submit(ask, f"flex{i}", "flex") for i in range(2)]
            _until(lambda: busy.metric('tidegate_requests_waiting{class="batch"}') == 2)
            jobs += [pool.submit(ask, f"person{i}", "default") for i in range(3)]
            _until(lambda: busy.metric('tidegate_requests_waiting{class="default"}') >= 3)
        for job in jobs:
            job.result()
    assert sorted(ends, key=lambda name: ends[name])[-1].startswith("flex")


def test_critical_requests_go_before_everybody_who_waits(busy: RunningServer) -> None:
    ends: dict[str, float] = {}

    def ask(name: str, who: str) -> None:
        assert _ask(busy, who=who, **{**_SHORT, "max_tokens": 30}).status_code == 200
        ends[name] = time.monotonic()

    with ThreadPoolExecutor(8) as pool:
        with Holding(busy):
            jobs = [pool.submit(ask, f"person{i}", "person") for i in range(5)]  # with the critical one: three pairs
            jobs += [pool.submit(ask, f"jobs{i}", "jobs") for i in range(2)]
            _until(lambda: busy.metric("tidegate_requests_waiting") >= 7)
            jobs.append(pool.submit(ask, "vip", "vip"))
            _until(lambda: busy.metric('tidegate_requests_waiting{class="critical"}') == 1)
        for job in jobs:
            job.result()
    order = sorted(ends, key=lambda name: ends[name])
    assert "vip" in order[:2]
    assert all(name.startswith("jobs") for name in order[-2:])


def test_a_critical_request_drives_out_batch_work_that_then_starts_again(busy: RunningServer) -> None:
    before = busy.metric("tidegate_batch_evictions_total")
    work: dict[str, Any] = {"max_tokens": 300, "ignore_eos": True}  # not streamed: its client has seen nothing of it
    with ThreadPoolExecutor(4) as pool:
        jobs = [pool.submit(_ask, busy, who="jobs", **work) for _ in range(_PLACES)]
        _until(lambda: busy.metric('tidegate_requests_running{class="batch"}') >= 1)
        started_s = time.monotonic()
        asked = {**_SHORT, "max_tokens": 60}
        answers = list(pool.map(lambda _: _ask(busy, who="vip", **asked), range(_PLACES)))
        took_s = time.monotonic() - started_s
        assert {answer.status_code for answer in answers} == {200}
        assert all(job.result().json()["usage"]["completion_tokens"] == 300 for job in jobs)
    assert busy.metric("tidegate_batch_evictions_total") > before
    assert took_s < 30
    _until(lambda: _idle(busy))


def test_a_storm_of_disconnects_leaves_exactly_nothing_reserved(busy: RunningServer) -> None:
    def leave_early(patience_s: float) -> None:
        """Hang up while the request waits, or is in prefill, or streams."""
        body = {"messages": [{"role": "user", "content": "word " * 400}], **_LONG}
        url, leaves_s = f"{busy.url}/v1/chat/completions", time.monotonic() + patience_s
        stream = httpx.stream("POST", url, json=body, headers=_key("person"), timeout=patience_s)
        with suppress(httpx.TimeoutException), stream as response:
            for _ in response.iter_raw():
                if time.monotonic() > leaves_s:
                    return

    with ThreadPoolExecutor(24) as pool:
        list(pool.map(leave_early, [0.03 * i + 0.02 for i in range(48)]))
    _until(lambda: _idle(busy))
    busy.wait_until_idle()
    assert busy.metric("vllm:kv_cache_usage_perc") == 0
    assert _ask(busy, **_SHORT).status_code == 200


def test_a_client_with_little_patience_is_told_at_once_when_to_come_back(busy: RunningServer) -> None:
    with Holding(busy):
        time.sleep(1.0)  # so that the gate has seen how long places are held
        refused = _ask(busy, "word " * 2000, headers={"x-request-timeout": "0.05"}, **_SHORT)
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "server_overloaded"
        assert "try again" in refused.json()["error"]["message"]
        assert int(refused.headers["retry-after"]) >= 1
        assert float(refused.headers["retry-after-ms"]) >= 1000
    lines = [e for e in busy.log_events() if e.get("request_id") == refused.headers["x-request-id"]]
    (request,) = [line for line in lines if line["event"] == "request"]
    assert request["prompt_tokens"] == 0  # it was never tokenized
    _until(lambda: _idle(busy))


def test_a_timeout_that_is_no_number_is_a_400(busy: RunningServer) -> None:
    refused = _ask(busy, headers={"x-request-timeout": "soon"}, **_SHORT)
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "x-request-timeout"


def test_several_prompts_of_one_call_share_a_single_place(busy: RunningServer) -> None:
    with Holding(busy, streams=1):
        body = {"prompt": [f"Prompt {i}" for i in range(6)], **_SHORT}
        answer = httpx.post(f"{busy.url}/v1/completions", json=body, headers=_key("person"), timeout=60)
    assert len(answer.json()["choices"]) == 6
    _until(lambda: _idle(busy))


def test_a_client_that_does_not_read_is_let_go(busy: RunningServer) -> None:
    host, port = busy.url.removeprefix("http://").split(":")
    body = httpx.Request(
        "POST", busy.url,
        json={"messages": [{"role": "user", "content": "Hi"}], "logprobs": True, "top_logprobs": 20, **_LONG,
              "n": 2, "max_tokens": 1900},
    ).read()  # fmt: skip
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\n"
    head += f"authorization: Bearer {_KEYS['person']}\r\n"
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect((host, int(port)))
        client.sendall(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        _until(lambda: busy.metric("tidegate_requests_running") == 1)
        _until(lambda: any("does not read" in str(event.get("event")) for event in busy.log_events()), 150)
        _until(lambda: _idle(busy))
    busy.wait_until_idle()
