"""Start and stop of a real server: every start that fails says what to change, and a stop leaves nothing behind."""

import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from tests.live.running_server import RunningServer, run_serve, start_server

pytestmark = [pytest.mark.engine, pytest.mark.slow]

StartTiny = Callable[..., RunningServer]
_STORY = {"messages": [{"role": "user", "content": "Tell a story."}], "ignore_eos": True}


@pytest.fixture
def start_tiny(tmp_path: Path, tiny_tools_model: Path) -> Iterator[StartTiny]:
    """Start the tiny model, and end whatever is left of it after the test."""
    started: list[RunningServer] = []

    def start(*args: str) -> RunningServer:
        started.append(start_server(tmp_path, str(tiny_tools_model), "--max-model-len", "2048", *args))
        return started[-1]

    yield start
    for server in started:
        server.kill()


def _stream_in_background(server: RunningServer, max_tokens: int) -> tuple[threading.Thread, list[str]]:
    """A stream that has its first frame when this returns."""
    lines: list[str] = []
    first = threading.Event()

    def read() -> None:
        body = {**_STORY, "max_tokens": max_tokens, "stream": True}
        with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=body, timeout=120) as response:
            for line in response.iter_lines():
                lines.append(line)
                first.set()

    thread = threading.Thread(target=read)
    thread.start()
    assert first.wait(60)
    return thread, lines


def _alive(processes: list[psutil.Process]) -> list[psutil.Process]:
    _, alive = psutil.wait_procs(processes, timeout=3)
    return list(alive)


def test_it_is_live_at_once_and_tells_its_stage_until_it_is_ready(start_tiny: StartTiny) -> None:
    server = start_tiny()
    assert httpx.get(f"{server.url}/health/live").status_code == 200
    loading = httpx.get(f"{server.url}/health/ready")
    assert loading.status_code == 503
    assert loading.json()["stage"]
    refused = httpx.post(f"{server.url}/v1/chat/completions", json=_STORY)
    assert refused.status_code == 503
    assert refused.json()["error"]["code"] == "engine_not_ready"
    assert int(refused.headers["retry-after"]) > 0
    server.wait_until_ready()
    assert httpx.get(f"{server.url}/health").status_code == 200


def test_a_stop_lets_running_streams_finish_and_leaves_no_child(start_tiny: StartTiny) -> None:
    server = start_tiny()
    server.wait_until_ready()
    family = server.children()
    assert family
    reader, lines = _stream_in_background(server, max_tokens=400)
    stopping = threading.Thread(target=server.stop)
    stopping.start()
    deadline_s = time.monotonic() + 5
    while httpx.get(f"{server.url}/health/ready").status_code == 200:
        assert time.monotonic() < deadline_s
    refused = httpx.post(f"{server.url}/v1/chat/completions", json=_STORY)
    assert refused.status_code == 503
    assert refused.json()["error"]["code"] == "server_draining"
    reader.join(60)
    stopping.join(60)
    assert lines[-2:] == ["data: [DONE]", ""]
    assert not any('"error"' in line for line in lines)
    assert server.process.returncode == 0
    assert _alive(family) == []


@pytest.mark.parametrize("loaded", [True, False], ids=["serving", "loading"])
def test_a_stop_leaves_no_file_in_the_temporary_folder(start_tiny: StartTiny, loaded: bool) -> None:
    server = start_tiny()
    if loaded:
        server.wait_until_ready()
        assert list(server.temporary.rglob("vllm_dist_*"))
    else:
        deadline_s = time.monotonic() + 30
        while not list(server.temporary.glob("pymp-*")):
            assert time.monotonic() < deadline_s
            time.sleep(0.01)
    assert server.stop() == 0
    assert {path.name for path in server.temporary.iterdir() if not path.name.startswith("torchinductor_")} == set()


def test_a_second_signal_ends_open_streams_with_an_error_event(start_tiny: StartTiny) -> None:
    server = start_tiny()
    server.wait_until_ready()
    family = server.children()
    reader, lines = _stream_in_background(server, max_tokens=1900)
    server.process.terminate()
    time.sleep(0.3)
    server.process.terminate()
    server.process.wait(20)
    reader.join(20)
    assert any("server_draining" in line for line in lines)
    assert _alive(family) == []


def test_a_balancer_has_time_to_see_that_the_server_leaves(start_tiny: StartTiny) -> None:
    server = start_tiny("--drain-delay", "3")
    server.wait_until_ready()
    server.process.terminate()
    time.sleep(0.5)
    assert httpx.get(f"{server.url}/health/ready").status_code == 503
    late = httpx.post(f"{server.url}/v1/chat/completions", json={**_STORY, "max_tokens": 4}, timeout=60)
    assert late.status_code == 200
    assert server.process.wait(30) == 0


def test_a_stop_while_loading_ends_at_once(start_tiny: StartTiny) -> None:
    server = start_tiny()
    while "loading the model" not in httpx.get(f"{server.url}/health/ready").text:
        time.sleep(0.1)
    time.sleep(2)  # its child processes are being started
    family = server.children()
    started_s = time.monotonic()
    assert server.stop(timeout_s=20) == 0
    assert time.monotonic() - started_s < 15
    assert _alive(family) == []


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["/no/such/folder"], ["/no/such/folder", "config.json"]),
        (["--max-modl-len", "10"], ["--max-modl-len", "--max-model-len"]),
        (["--headless"], ["--headless"]),
        (["--tensor-parallel-size", "two"], ["tensor-parallel-size", "two"]),
    ],
)
def test_a_start_that_cannot_work_says_why_and_fails(args: list[str], words: list[str]) -> None:
    ended = run_serve("--port", "0", *args)
    assert ended.returncode != 0
    last = [line for line in ended.stderr.splitlines() if '"error"' in line][-1]
    assert all(word in last for word in words), ended.stderr[-2000:]
    assert "Traceback" not in ended.stderr


def test_a_port_that_is_taken_is_said_at_once() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        ended = run_serve("--port", str(taken.getsockname()[1]), timeout_s=10)
    assert ended.returncode == 1
    assert "--port" in ended.stderr


def test_a_window_that_the_kv_cache_cannot_hold_is_answered_with_what_fits(embedded_model: Path) -> None:
    ended = run_serve(
        str(embedded_model), "--port", "0", "--max-model-len", "8192", "--kv-cache-memory-bytes", "64M",
        environment={"VLLM_CPU_KVCACHE_SPACE": ""},
    )  # fmt: skip
    assert ended.returncode == 1
    sentence = next(line for line in ended.stderr.splitlines() if "maximum number of tokens" in line)
    assert "max seq len (8192) is larger than the maximum number of tokens that can be stored in KV cache" in sentence
    for remedy in ("--max-model-len", "VLLM_CPU_KVCACHE_SPACE", "--kv-cache-dtype"):
        assert remedy in sentence


def test_two_ranks_share_a_model_whose_heads_divide(start_tiny: StartTiny) -> None:
    server = start_tiny("--tensor-parallel-size", "2")
    server.wait_until_ready()
    body = {**_STORY, "max_tokens": 8}
    answer = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60)
    assert answer.json()["usage"]["completion_tokens"] == 8
    assert sum("Worker" in child.name() for child in server.children()) == 2
    assert server.stop() == 0
