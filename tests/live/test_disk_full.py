"""A disk without room: what is written is refused with its reason, and what only needs the engine goes on."""

import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest
from openai import OpenAI
from openai.types import Batch

from tests.live.running_server import RunningServer, start_server
from tests.live.test_batches import ended, output, questions, sdk, submit

pytestmark = [pytest.mark.engine, pytest.mark.slow]

DISK_BYTES = 24 << 20
OPERATOR_KEY = "operator-key-of-a-test"
LIMITS = {"requests_per_minute": 600}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of `DISK_BYTES`."""
    disk = tmp_path / "d"
    disk.mkdir()
    mounting = ["/usr/bin/env", "mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(mounting, check=False).returncode:
        pytest.skip("NOT SHOWN: a full disk. Mounting a small one takes root and the right to mount.")
    yield disk
    subprocess.run(["/usr/bin/env", "umount", "--lazy", str(disk)], check=True)


@pytest.fixture
def server(small_disk: Path, tmp_path: Path, tiny_tools_model: Path) -> Iterator[RunningServer]:
    usual = ("--max-model-len", "2048", "--served-model-name", "a-model", "--operator-key", OPERATOR_KEY)
    running = start_server(tmp_path, str(tiny_tools_model), *usual, "--data-folder", str(small_disk))
    running.wait_until_ready()
    yield running
    running.kill()


def filled(disk: Path) -> Path:
    """A file that takes all the room there is."""
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file:
        for size in (1 << 20, 4096, 1):
            try:
                while True:
                    file.write(bytes(size))
            except OSError:
                continue
    return filler


def new_key(server: RunningServer) -> str:
    """A tenant whose limits are kept in Redis."""
    tenants, headers = f"{server.url}/admin/tenants", {"authorization": f"Bearer {OPERATOR_KEY}"}
    httpx.post(tenants, json={"name": "team", "limits": LIMITS}, headers=headers).raise_for_status()
    made = httpx.post(f"{tenants}/team/keys", json={}, headers=headers).raise_for_status()
    return str(made.json()["key"])


def chat(client: OpenAI) -> int:
    answer = client.chat.completions.create(
        model="a-model", messages=[{"role": "user", "content": "Hello."}], max_tokens=4
    )
    assert answer.usage is not None
    return answer.usage.completion_tokens


def nothing_is_lost_of(client: OpenAI, done: Batch) -> None:
    """It fails where its answers had no room, and waits where Redis had none first; what was answered is there."""
    assert done.request_counts is not None
    answered = len(output(client, done)) if done.output_file_id else 0
    assert answered == done.request_counts.completed
    if done.status == "failed":
        assert done.errors is not None
        assert [error.code for error in done.errors.data or []] == ["disk_full"]
    else:
        assert (done.status, answered) == ("completed", 40)


def chat_until_limits_are(server: RunningServer, client: OpenAI, mode: str) -> None:
    """Every chat meanwhile is answered."""
    deadline_s = time.monotonic() + 60
    while httpx.get(f"{server.url}/health/ready").raise_for_status().json()["limits"] != mode:
        assert time.monotonic() < deadline_s, server.log[-3000:]
        assert chat(client) >= 1


def test_chats_go_on_and_nothing_answered_is_lost(server: RunningServer, small_disk: Path) -> None:
    client = sdk(server).with_options(max_retries=0, api_key=new_key(server))
    assert chat(client) >= 1
    batch = submit(client, questions(40, 200))
    filler = filled(small_disk)
    with pytest.raises(openai.APIStatusError) as refused:
        client.files.create(file=("in.jsonl", questions(5000, 8)), purpose="batch")
    assert refused.value.status_code == 507
    assert "no room" in str(refused.value)
    chat_until_limits_are(server, client, "local")  # Redis takes no writes that it cannot keep
    filler.unlink()
    nothing_is_lost_of(client, ended(client, batch))
    again = ended(client, submit(client, questions(10, 8)))
    assert (again.status, len(output(client, again))) == ("completed", 10)
    chat_until_limits_are(server, client, "redis")
    server.wait_until_idle()
    assert server.metric("tidegate_kv_reserved_tokens") == 0
    assert server.stop() == 0
