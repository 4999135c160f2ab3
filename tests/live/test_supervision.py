"""The engine killed and hung under a real server: the port stays open, every request ends in an answer or an error."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.live.running_server import RunningServer, start_server

pytestmark = [pytest.mark.engine, pytest.mark.slow]

SHARED_MEMORY = Path("/dev/shm")  # noqa: S108  # where Linux keeps it
CHAT = "/v1/chat/completions"
STORY = {"messages": [{"role": "user", "content": "Tell a story."}], "ignore_eos": True, "temperature": 0}
REPLACED_WITHIN_S = 120.0
StartTiny = Callable[..., RunningServer]


@pytest.fixture
def start_tiny(tmp_path: Path, tiny_tools_model: Path) -> Iterator[StartTiny]:
    """Start the tiny model with room for two requests at a time, and end whatever is left of it after the test."""
    started: list[RunningServer] = []

    def start(*args: str) -> RunningServer:
        common = ("--max-model-len", "2048", "--max-num-seqs", "2", "--ttft-slo", "600")  # nobody is refused here
        server = start_server(tmp_path, str(tiny_tools_model), *common, *args)
        started.append(server)
        server.wait_until_ready()
        return server

    yield start
    for server in started:
        server.kill()


class Caller:
    """One chat request in a thread of its own."""

    def __init__(self, server: RunningServer, *, stream: bool, max_tokens: int) -> None:
        self.lines: list[str] = []
        self.status = 0
        self.body: dict[str, Any] = {}
        self.ended_at_s = 0.0
        self.first_line = threading.Event()
        body = {**STORY, "stream": stream, "max_tokens": max_tokens}
        self._thread = threading.Thread(target=self._call, args=(f"{server.url}{CHAT}", body))
        self._thread.start()

    def _call(self, url: str, body: dict[str, Any]) -> None:
        with httpx.stream("POST", url, json=body, timeout=REPLACED_WITHIN_S + 30) as response:
            self.status = response.status_code
            if body["stream"] and self.status == 200:
                for line in response.iter_lines():
                    self.lines.append(line)
                    if line.startswith("data:"):
                        self.first_line.set()
            else:
                response.read()
                self.body = response.json()
        self.ended_at_s = time.monotonic()

    def join(self, timeout_s: float = REPLACED_WITHIN_S + 30) -> "Caller":
        self._thread.join(timeout_s)
        assert not self._thread.is_alive(), "the request never ended"
        return self


def engine_core(server: RunningServer) -> psutil.Process:
    (core,) = [child for child in server.children() if "EngineCore" in child.name()]
    return core


def wait_until_replaced(server: RunningServer, old: psutil.Process) -> None:
    """Until another engine serves; the port answers all the time."""
    deadline_s = time.monotonic() + REPLACED_WITHIN_S
    while time.monotonic() < deadline_s:
        assert httpx.get(f"{server.url}/health/live", timeout=15).status_code == 200
        assert "tidegate_engine_up " in httpx.get(f"{server.url}/metrics", timeout=15).text
        ready = httpx.get(f"{server.url}/health/ready", timeout=5)
        if ready.status_code == 200 and any(
            "EngineCore" in child.name() and child.pid != old.pid for child in server.children()
        ):
            return
        assert ready.status_code == 200 or ready.json()["stage"]
        time.sleep(0.1)
    raise AssertionError(f"the engine was not replaced:\n{server.log[-4000:]}")


def wait_for(holds: Callable[[], bool], what: str, timeout_s: float = 20.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline_s, what
        time.sleep(0.02)


def answer(server: RunningServer) -> dict[str, Any]:
    response = httpx.post(f"{server.url}{CHAT}", json={**STORY, "max_tokens": 8}, timeout=60)
    assert response.status_code == 200, response.text
    assert response.json()["usage"]["completion_tokens"] == 8
    answered: dict[str, Any] = response.json()
    return answered


def nothing_left_of(family: list[psutil.Process], shared_memory: set[str]) -> None:
    assert psutil.wait_procs(family, timeout=10)[1] == []
    mapped = {path.name for path in SHARED_MEMORY.iterdir()}
    assert not mapped & shared_memory


def shared_memory_of(family: list[psutil.Process]) -> set[str]:
    """The names that these processes have mapped; those that have ended, like what started a worker, have none."""
    names = set[str]()
    for member in family:
        with suppress(psutil.NoSuchProcess):
            mapped = (Path(mapping.path) for mapping in member.memory_maps())
            names |= {path.name for path in mapped if path.parent == SHARED_MEMORY}
    return names


def test_after_a_kill_open_streams_end_and_the_rest_runs_again(start_tiny: StartTiny) -> None:
    """Two streams that have begun end with an error within a second; what waited behind them is answered."""
    server = start_tiny()
    before = answer(server)
    core = engine_core(server)
    streaming = [Caller(server, stream=True, max_tokens=1900) for _ in range(2)]
    assert all(caller.first_line.wait(30) for caller in streaming)
    waiting = [Caller(server, stream=stream, max_tokens=8) for stream in (True, False, True, False)]
    wait_for(lambda: server.metric("tidegate_requests_waiting") == 4, "they wait behind the two that run")
    killed_at_s = time.monotonic()
    core.kill()
    for caller in streaming:
        caller.join()
        assert caller.ended_at_s - killed_at_s < 10  # measured by `python -m benchmarks engine-kills`
        assert '"code": "engine_lost"' in caller.lines[-4]
        assert caller.lines[-2:] == ["data: [DONE]", ""]
    assert httpx.get(f"{server.url}/health/ready").status_code == 503
    wait_until_replaced(server, core)
    for caller in waiting:
        caller.join()
        assert caller.status == 200
        assert not any('"error"' in line for line in caller.lines)
        assert caller.body.get("usage", {}).get("completion_tokens", 8) == 8
        assert caller.lines == [] or caller.lines[-2:] == ["data: [DONE]", ""]
    after = answer(server)
    assert after["choices"][0]["message"] == before["choices"][0]["message"]
    assert server.metric("tidegate_requests_rerun_total") == 4
    assert server.metric("tidegate_engine_restarts_total") == 1
    server.wait_until_idle()
    assert server.stop() == 0
    assert "output_handler failed" not in server.log.split("engine replaced")[1]


def test_requests_that_arrive_while_the_engine_is_down_are_answered_by_the_next(start_tiny: StartTiny) -> None:
    server = start_tiny()
    core = engine_core(server)
    core.kill()
    wait_for(lambda: httpx.get(f"{server.url}/health/ready").status_code == 503, "it still says ready")
    late = [Caller(server, stream=stream, max_tokens=8) for stream in (True, False)]
    for caller in late:
        assert caller.join().status == 200
    family = [child for child in server.children() if "VLLM::" in child.name()]
    assert len(family) == 3  # the fork server, the engine, its worker
    server.process.kill()
    assert psutil.wait_procs(family, timeout=10)[1] == []  # none outlives a server that is killed


def test_a_hung_engine_is_ended_and_replaced(start_tiny: StartTiny) -> None:
    server = start_tiny("--engine-hang-timeout", "3")
    core = engine_core(server)
    core.suspend()
    stopped_at_s = time.monotonic()
    caller = Caller(server, stream=False, max_tokens=8)
    core.wait(30)
    assert time.monotonic() - stopped_at_s >= 3
    assert caller.join().status == 200
    assert server.metric("tidegate_engine_restarts_total") == 1
    assert "makes no step" in server.log


def test_a_killed_worker_takes_the_engine_with_it_and_nothing_stays_behind(start_tiny: StartTiny) -> None:
    server = start_tiny("--tensor-parallel-size", "2")
    core = engine_core(server)
    family = [core, *core.children(recursive=True)]
    shared_memory = shared_memory_of(family)
    assert len(family) >= 3
    assert shared_memory
    caller = Caller(server, stream=True, max_tokens=1900)
    assert caller.first_line.wait(60)
    worker = next(child for child in family if "Worker" in child.name())
    os.kill(worker.pid, signal.SIGKILL)
    killed_at_s = time.monotonic()
    caller.join()
    assert caller.ended_at_s - killed_at_s < 10  # measured by `python -m benchmarks engine-kills`
    wait_until_replaced(server, core)
    nothing_left_of(family, shared_memory)
    answer(server)


def test_a_request_that_is_there_at_two_deaths_is_not_tried_again(start_tiny: StartTiny) -> None:
    server = start_tiny()
    first = engine_core(server)
    poisoned = Caller(server, stream=False, max_tokens=1900)
    server.wait_until_busy()
    first.kill()
    wait_until_replaced(server, first)
    server.wait_until_busy()
    second = engine_core(server)
    second.kill()
    poisoned.join()
    assert (poisoned.status, poisoned.body["error"]["code"]) == (500, "request_quarantined")
    wait_until_replaced(server, second)
    server.wait_until_idle()
    answer(server)


def test_many_deaths_leave_memory_files_and_processes_flat(start_tiny: StartTiny) -> None:
    server = start_tiny()
    me = psutil.Process(server.process.pid)
    figures: list[tuple[int, int, int, int]] = []
    for _ in range(3):
        answer(server)
        core = engine_core(server)
        core.kill()
        core.wait(10)
        wait_until_replaced(server, core)
        answer(server)
        figures.append((me.memory_info().rss >> 20, me.num_fds(), me.num_threads(), len(server.children())))
    megabytes, files, threads, processes = (last - first for first, last in zip(figures[0], figures[-1], strict=True))
    assert megabytes < 25, figures
    assert processes == 0, figures
    # A pool, of threads or of connections to Redis, may grow by one; one for each death would be two.
    assert max(files, threads) <= 1, figures
    page = httpx.get(f"{server.url}/metrics").text
    declared = [line for line in page.splitlines() if line.startswith("# TYPE ")]
    assert len(declared) == len(set(declared))
    assert server.metric("vllm:request_success_total") >= 1


def test_an_engine_that_cannot_be_built_again_ends_the_process(start_tiny: StartTiny) -> None:
    server = start_tiny("--engine-max-failed-restarts", "2")
    model = next(path for path in server.process.args if "tiny" in str(path))  # type: ignore[union-attr]
    hidden = Path(str(model)).with_name("hidden")
    Path(str(model)).rename(hidden)
    try:
        engine_core(server).kill()
        wait_for(lambda: server._status("/health/ready") != 200, "it still says ready")
        caller = Caller(server, stream=False, max_tokens=8)
        assert server.process.wait(180) == 1
        caller.join()
    finally:
        hidden.rename(Path(str(model)))
    assert (caller.status, caller.body["error"]["code"]) == (503, "engine_not_ready")
    assert "could not be replaced" in server.log


def test_a_stop_while_the_engine_is_replaced_ends_at_the_drain_deadline(start_tiny: StartTiny) -> None:
    server = start_tiny("--drain-timeout", "1")
    family = server.children()
    engine_core(server).kill()
    wait_for(lambda: httpx.get(f"{server.url}/health/ready").status_code == 503, "it still says ready")
    caller = Caller(server, stream=False, max_tokens=8)
    time.sleep(0.5)
    started_s = time.monotonic()
    assert server.stop(timeout_s=30) == 0
    assert time.monotonic() - started_s < 15
    assert (caller.join().status, caller.body["error"]["code"]) == (503, "server_draining")
    assert psutil.wait_procs(family, timeout=5)[1] == []
