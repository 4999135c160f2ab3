"""The level and the fallback on real servers: set by the command line, told to clients, with a second Tidegate."""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.live.running_server import RunningServer, start_server

pytestmark = [pytest.mark.engine, pytest.mark.slow]

CHAT = "/v1/chat/completions"
STORY = {"messages": [{"role": "user", "content": "Tell a story."}], "ignore_eos": True, "temperature": 0}
OPERATOR = "the-operators-key"
StartTiny = Callable[..., RunningServer]


@pytest.fixture
def start_tiny(tmp_path: Path, tiny_tools_model: Path) -> Iterator[StartTiny]:
    """Start a server of the tiny model, and end whatever is left of it after the test."""
    started: list[RunningServer] = []

    def start(*args: str) -> RunningServer:
        folder = tmp_path / str(len(started))
        folder.mkdir()
        common = ("--max-model-len", "2048", "--operator-key", OPERATOR, "--data-folder", str(folder / "data"))
        server = start_server(folder, str(tiny_tools_model), *common, *args)
        started.append(server)
        server.wait_until_ready()
        return server

    yield start
    for server in started:
        server.kill()


def tidegate_level(server: RunningServer, *args: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "server", "level", *args, "--url", server.url, "--operator-key", OPERATOR]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def ask(server: RunningServer, headers: dict[str, str] | None = None, **body: Any) -> httpx.Response:
    return httpx.post(f"{server.url}{CHAT}", json={**STORY, **body}, headers=headers, timeout=120)


def test_the_operator_sets_the_level_and_clients_are_told(start_tiny: StartTiny) -> None:
    server = start_tiny("--canned-reply", "We are closed.", "--economy-max-tokens", "16")
    assert "x-degradation-level" not in ask(server, max_tokens=4).headers

    shown = tidegate_level(server, "set", "1", "--reason", "a test", "--ttl", "10m")
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.startswith("level 1: economy")
    short = ask(server, n=2, logprobs=True)
    assert short.headers["x-degradation-level"] == "1"
    assert short.headers["x-degradation-applied"] == "max_tokens=16,n=1,logprobs=off"
    assert short.json()["usage"]["completion_tokens"] == 16
    assert len(short.json()["choices"]) == 1
    refused = ask(server, {"x-degradation": "none"}, n=2)
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "degraded_service")

    tidegate_level(server, "set", "2", "--reason", "a test")
    long_chat = [
        {"role": role, "content": f"{number} " * 40}
        for number in range(12)
        for role in ("user", "assistant")
    ] + [{"role": "user", "content": "And now?"}]  # fmt: skip
    cut = ask(server, messages=long_chat, max_tokens=4)
    assert "context=0.5" in cut.headers["x-degradation-applied"]
    assert "x-context-truncated" in cut.headers
    assert cut.json()["usage"]["prompt_tokens"] <= 1024

    tidegate_level(server, "set", "5", "--reason", "maintenance")
    closed = ask(server)
    assert (closed.status_code, closed.json()["error"]["code"]) == (503, "server_closed")
    assert int(closed.headers["retry-after"]) > 0
    canned = ask(server, {"x-degradation": "canned"})
    assert canned.json()["choices"][0]["message"]["content"] == "We are closed."

    assert tidegate_level(server, "clear").stdout.startswith("level 0: normal")
    assert ask(server, max_tokens=4).status_code == 200
    changes = [(event["from"], event["to"]) for event in server.log_events() if event.get("event") == "level changed"]
    assert changes == [(0, 1), (1, 2), (2, 5), (5, 0)]


def said(stream: str) -> tuple[str, list[str], str]:
    """A stream's text, which may be cut into frames as it likes, its other words, and its end."""
    lines = [line.removeprefix("data: ") for line in stream.splitlines() if line]
    choices = [choice for line in lines[:-1] for choice in json.loads(line)["choices"]]
    text = "".join(choice["delta"].get("content") or "" for choice in choices)
    return text, [choice["finish_reason"] for choice in choices if choice["finish_reason"]], lines[-1]


def test_a_second_tidegate_answers_while_the_engine_is_down(start_tiny: StartTiny) -> None:
    small = start_tiny("--served-model-name", "small")
    server = start_tiny("--fallback-url", f"{small.url}/v1", "--fallback-model", "small")
    body = {**STORY, "max_tokens": 8, "stream": True}
    direct = httpx.post(f"{small.url}{CHAT}", json={**body, "model": "small"}, timeout=60).text
    (core,) = [child for child in server.children() if "EngineCore" in child.name()]
    core.kill()
    deadline_s = time.monotonic() + 20
    while httpx.get(f"{server.url}/health/ready").status_code == 200:
        assert time.monotonic() < deadline_s
    meanwhile = ask(server, stream=True, max_tokens=8)
    assert meanwhile.status_code == 200
    assert meanwhile.headers["x-degradation-level"] == "4"
    assert meanwhile.headers["x-degradation-applied"].startswith("fallback=127.0.0.1:")
    assert said(meanwhile.text) == said(direct)
    assert '"model":"small"' in meanwhile.text
    waited = ask(server, {"x-degradation": "none"}, max_tokens=8)
    assert (waited.status_code, "x-degradation-applied" in waited.headers) == (200, False)
    assert psutil.pid_exists(server.process.pid)
    assert ask(server, max_tokens=8).headers.get("x-degradation-level") is None
