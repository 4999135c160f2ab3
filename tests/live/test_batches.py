"""Batches on the real engine: from upload to output, and through kills at any moment."""

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from openai import OpenAI
from openai.types import Batch

from tests.live.running_server import TEST_ENVIRONMENT, RunningServer, start_server
from tests.serving.batch_files import CHAT, jsonl, line, records

pytestmark = [pytest.mark.engine, pytest.mark.slow]

WITHIN_S = 240.0
SEQUENCES = 8
GOING_ON = ("validating", "in_progress", "finalizing", "cancelling")
Start = Callable[..., RunningServer]


@pytest.fixture
def start(tmp_path: Path, tiny_tools_model: Path) -> Iterator[Start]:
    """Start the tiny model on the same data folder each time, and end whatever is left of it after the test."""
    started: list[RunningServer] = []

    def one(*args: str) -> RunningServer:
        usual = ("--max-model-len", "2048", "--served-model-name", "a-model", "--data-folder", str(tmp_path / "data"))
        started.append(start_server(tmp_path, str(tiny_tools_model), *usual, *args))
        return started[-1]

    yield one
    for server in started:
        server.kill()


def sdk(server: RunningServer) -> OpenAI:
    return OpenAI(base_url=f"{server.url}/v1", api_key="EMPTY", max_retries=4)


def questions(number: int, max_tokens: int) -> bytes:
    return jsonl(line(f"id-{n}", f"Count to {n}.", max_tokens=max_tokens, ignore_eos=True) for n in range(number))


def submit(client: OpenAI, content: bytes) -> Batch:
    file = client.files.create(file=("in.jsonl", content), purpose="batch")
    return client.batches.create(input_file_id=file.id, endpoint=CHAT, completion_window="24h")


def ended(client: OpenAI, batch: Batch) -> Batch:
    deadline_s = time.monotonic() + WITHIN_S
    while batch.status in GOING_ON:
        assert time.monotonic() < deadline_s, batch
        time.sleep(0.2)
        batch = client.batches.retrieve(batch.id)
    return batch


def output(client: OpenAI, batch: Batch) -> list[dict[str, Any]]:
    assert batch.output_file_id is not None
    return records(client.files.content(batch.output_file_id).read())


def test_a_batch_is_answered_by_the_engine(start: Start) -> None:
    server = start("--max-num-seqs", str(SEQUENCES))
    server.wait_until_ready()
    client = sdk(server)
    content = questions(30, 8) + jsonl(
        [line("bad", temperature=-1.0), line("long", "word " * 4000, truncation="disabled")]
    )
    batch = ended(client, submit(client, content))
    assert (batch.status, batch.model) == ("completed", "a-model")
    assert batch.request_counts is not None
    assert (batch.request_counts.completed, batch.request_counts.failed) == (30, 2)
    answers = output(client, batch)
    assert {item["custom_id"] for item in answers} == {f"id-{n}" for n in range(30)}
    assert {item["response"]["body"]["usage"]["completion_tokens"] for item in answers} == {8}
    assert batch.usage is not None
    assert batch.usage.output_tokens == 240
    assert batch.error_file_id is not None
    errors = {item["custom_id"]: item for item in records(client.files.content(batch.error_file_id).read())}
    assert errors["bad"]["response"]["status_code"] == 400
    assert errors["long"]["response"]["body"]["error"]["code"] == "context_length_exceeded"
    assert server.metric("tidegate_batch_lines_total") == 32
    the_whole_engine_is_the_batchs_until_somebody_comes(server, client)
    several = client.completions.create(model="a-model", prompt=["Hello", "word " * 4000, "Bye"], max_tokens=4)
    assert [choice.finish_reason for choice in several.choices] == ["length", "error", "length"]


def the_whole_engine_is_the_batchs_until_somebody_comes(server: RunningServer, client: OpenAI) -> None:
    endless = submit(client, questions(200, 400))
    deadline_s = time.monotonic() + WITHIN_S
    while server.metric("tidegate_requests_running") < SEQUENCES:
        assert time.monotonic() < deadline_s
        time.sleep(0.1)
    while server.metric("tidegate_batch_evictions_total") == 0:  # lines that began together also end together
        assert time.monotonic() < deadline_s
        said = client.completions.create(model="a-model", prompt="Hello", max_tokens=4)
        assert said.choices[0].finish_reason == "length"
    client.batches.cancel(endless.id)
    assert ended(client, client.batches.retrieve(endless.id)).status == "cancelled"


def test_each_line_is_answered_once_through_kills_at_random_moments(start: Start) -> None:
    seeds = random.Random(11)
    lines, batch = 120, None
    for _ in range(2):
        server = start()
        server.wait_until_ready()
        client = sdk(server)
        batch = client.batches.retrieve(batch.id) if batch is not None else submit(client, questions(lines, 16))
        time.sleep(seeds.uniform(1.0, 5.0))
        server.kill()
    server = start()
    server.wait_until_ready()
    client = sdk(server)
    assert batch is not None
    batch = ended(client, client.batches.retrieve(batch.id))
    answers = [item["custom_id"] for item in output(client, batch)]
    assert sorted(answers) == sorted(f"id-{n}" for n in range(lines))
    assert batch.request_counts is not None
    assert (batch.status, batch.request_counts.completed, batch.request_counts.failed) == ("completed", lines, 0)
    assert server.stop() == 0


def test_the_command_line_brings_its_own_engine(tmp_path: Path, tiny_tools_model: Path) -> None:
    data = tmp_path / "data.json"
    data.write_text(json.dumps([{"instruction": f"Say {n}.", "output": str(n)} for n in range(8)]))
    command = [
        sys.executable, "-m", "server", "batch", "run", str(data), "-o", str(tmp_path / "out.jsonl"), "--local",
        "--max-tokens", "6", str(tiny_tools_model), "--max-model-len", "1024",
    ]  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="home-") as home:  # the socket in it takes no long path
        environment = {**os.environ, **TEST_ENVIRONMENT, "XDG_DATA_HOME": home}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(records((tmp_path / "out.jsonl").read_bytes())) == 8
