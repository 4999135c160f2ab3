"""Limits from end to end: a tenant's key, the official client, the real engine and a real Redis."""

import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
from openai import OpenAI

from tests.live.running_server import RunningServer, start_server

pytestmark = [pytest.mark.engine, pytest.mark.slow]

HI: Any = [{"role": "user", "content": "Hi"}]
# Small enough that a token comes back only every half minute or so.
TOKENS_PER_DAY = 2_500


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("limits")


@pytest.fixture(scope="module")
def server(folder: Path, tiny_tools_model: Path) -> Iterator[RunningServer]:
    running = start_server(
        folder, str(tiny_tools_model), "--max-model-len", "2048", "--served-model-name", "tiny",
        "--data-folder", str(folder),
    )  # fmt: skip
    running.wait_until_ready()
    yield running
    running.kill()


class Team:
    """A tenant of its own, and what is left of its tokens."""

    def __init__(self, server: RunningServer, folder: Path, name: str, *limits: str) -> None:
        command = [sys.executable, "-m", "server", "keys", "create", name, *limits]
        command += ["--url", server.url, "--data-folder", str(folder)]
        self.key = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.strip()
        self._server = server
        self.client = OpenAI(base_url=f"{server.url}/v1", api_key=self.key, max_retries=0)

    def post(self, path: str, **body: Any) -> httpx.Response:
        headers = {"authorization": f"Bearer {self.key}"}
        return httpx.post(f"{self._server.url}{path}", json={"model": "tiny", **body}, headers=headers, timeout=60)

    def used(self) -> int:
        """Tokens used before this call, which costs two."""
        probe = self.post("/v1/completions", prompt=[1], max_tokens=1)
        assert probe.status_code == 200, probe.text
        return TOKENS_PER_DAY - int(probe.headers["x-ratelimit-remaining-tokens"]) - 2


@pytest.fixture
def team(server: RunningServer, folder: Path) -> Team:
    return Team(server, folder, f"team-{uuid.uuid4().hex[:8]}", "--tpd", str(TOKENS_PER_DAY))


def test_an_answer_costs_what_its_usage_says_streamed_or_not(team: Team) -> None:
    whole = team.client.chat.completions.create(model="tiny", messages=HI, max_tokens=12)
    assert whole.usage is not None
    stream = team.client.chat.completions.create(
        model="tiny", messages=HI, max_tokens=12, stream=True, n=2, stream_options={"include_usage": True}
    )
    (usage,) = [chunk.usage for chunk in stream if chunk.usage is not None]
    assert team.used() == pytest.approx(whole.usage.total_tokens + usage.total_tokens, abs=1)


def test_several_prompts_are_one_request_and_all_their_tokens(server: RunningServer, folder: Path) -> None:
    team = Team(server, folder, "several", "--rpm", "3", "--tpd", str(TOKENS_PER_DAY))
    answer = team.post("/v1/completions", prompt=["a b", "c d e", "f"], max_tokens=4)
    assert team.used() == pytest.approx(answer.json()["usage"]["total_tokens"], abs=1)
    assert team.post("/v1/completions", prompt="a", max_tokens=1).status_code == 200
    refused = team.post("/v1/completions", prompt="a", max_tokens=1)
    assert refused.status_code == 429
    assert refused.json()["error"]["message"].startswith("Your team has reached the limit of 3 requests per minute")


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_pays_for_what_was_generated(server: RunningServer, team: Team, stream: bool) -> None:
    generated_before = server.metric("vllm:generation_tokens_total")
    prompts_before = server.metric("vllm:prompt_tokens_total")
    body = {"model": "tiny", "messages": HI, "max_tokens": 1900, "ignore_eos": True, "stream": stream}
    with httpx.Client(timeout=60) as client:
        call = client.build_request(
            "POST", f"{server.url}/v1/chat/completions", json=body, headers={"authorization": f"Bearer {team.key}"}
        )
        if stream:
            answer = client.send(call, stream=True)
            next(answer.iter_lines())
            assert int(answer.headers["x-ratelimit-remaining-tokens"]) < TOKENS_PER_DAY - 1900
            answer.close()
        else:
            call.extensions["timeout"] = {"connect": 5, "write": 5, "read": 0.5, "pool": 5}
            with pytest.raises(httpx.ReadTimeout):
                client.send(call)
    server.wait_until_idle()
    used = team.used()
    generated = server.metric("vllm:generation_tokens_total") - generated_before - 1
    prompt = server.metric("vllm:prompt_tokens_total") - prompts_before - 1
    assert 0 < generated < 1900
    assert used == pytest.approx(generated + prompt, abs=3)  # the engine's last step may come after the abort


def test_a_refusal_tells_the_sdk_when_to_come_back_and_it_does(server: RunningServer, folder: Path) -> None:
    team = Team(server, folder, "patient", "--rpm", "30")
    while (refused := team.post("/v1/completions", prompt="a", max_tokens=1)).status_code == 200:
        pass
    assert refused.status_code == 429
    assert refused.json()["error"]["code"] == "rate_limit_exceeded"
    wait_ms = int(refused.headers["retry-after-ms"])
    assert 0 < wait_ms <= 2000
    assert refused.headers["retry-after"] == str(-(-wait_ms // 1000))
    started_s = time.monotonic()
    answer = team.client.with_options(max_retries=2).completions.create(model="tiny", prompt="a", max_tokens=1)
    assert answer.usage is not None
    assert time.monotonic() - started_s < 10


def test_a_cost_above_the_limit_is_a_400_with_both_numbers(server: RunningServer, folder: Path) -> None:
    team = Team(server, folder, "small", "--tpm", "100")
    with pytest.raises(openai.BadRequestError) as refused:
        team.client.completions.create(model="tiny", prompt="a", max_tokens=500)
    assert refused.value.code == "tokens_above_limit"
    assert "limit of 100 tokens per minute" in refused.value.message


def test_a_redis_that_hangs_fails_nobody_and_is_used_again(server: RunningServer, team: Team) -> None:
    assert team.used() <= 0  # its key is known from here on
    (redis,) = [child for child in server.children() if "valkey" in child.name() or "redis" in child.name()]
    redis.send_signal(signal.SIGSTOP)
    try:
        answers = [team.post("/v1/completions", prompt="a", max_tokens=1) for _ in range(6)]
        assert {answer.status_code for answer in answers} == {200}
        assert answers[-1].headers["x-ratelimit-mode"] == "local"
        assert httpx.get(f"{server.url}/health/ready").json()["limits"] == "local"
    finally:
        redis.send_signal(signal.SIGCONT)
    deadline_s = time.monotonic() + 10
    while httpx.get(f"{server.url}/health/ready").json()["limits"] != "redis":
        assert time.monotonic() < deadline_s
        time.sleep(0.1)
    # What Redis had been sent before it was given up, at most three charges, it takes up when it goes on.
    assert 7 * 2 - 1 <= team.used() <= 10 * 2


def test_redis_dies_with_a_server_that_is_killed(tmp_path: Path) -> None:
    running = start_server(tmp_path, "no-such-model")
    deadline_s = time.monotonic() + 20
    redis: list[psutil.Process] = []
    while not redis and time.monotonic() < deadline_s:
        redis = [child for child in running.children() if "valkey" in child.name() or "redis" in child.name()]
        time.sleep(0.01)
    running.process.kill()
    running.process.wait(10)
    assert redis
    psutil.wait_procs(redis, timeout=5)
    assert not any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in redis)
