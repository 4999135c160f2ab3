"""A clock that is set forward and back under a running server: nothing ends, and nobody is kept out."""

import shutil
import struct
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from openai import OpenAI

from tests.live.running_server import RunningServer, start_server
from tests.live.test_batches import ended, output, questions, sdk, submit
from tests.live.test_disk_full import OPERATOR_KEY, chat, new_key

COMPILER = shutil.which("cc")
SOURCE = Path(__file__).with_name("clock_that_jumps.c")
DAY_S = 86_400

pytestmark = [
    pytest.mark.engine,
    pytest.mark.slow,
    pytest.mark.skipif(COMPILER is None, reason="NOT SHOWN: a clock that jumps. It takes a C compiler."),
]


class Clock:
    """What a server and its Redis take for the time of day; what measures durations is left alone."""

    def __init__(self, folder: Path) -> None:
        library, self._file = folder / "clock.so", folder / "clock"
        subprocess.run([str(COMPILER), "-shared", "-fPIC", "-O2", str(SOURCE), "-o", str(library)], check=True)
        self._file.write_bytes(bytes(8))
        self.environment = {"LD_PRELOAD": str(library), "CLOCK_FILE": str(self._file)}

    def set_ahead(self, days: int) -> None:
        with self._file.open("r+b") as file:
            file.write(struct.pack("@q", days * DAY_S))


@pytest.fixture
def clock(tmp_path: Path) -> Clock:
    return Clock(tmp_path)


@pytest.fixture
def server(clock: Clock, tmp_path: Path, tiny_tools_model: Path) -> Iterator[RunningServer]:
    usual = ("--max-model-len", "2048", "--served-model-name", "a-model", "--operator-key", OPERATOR_KEY)
    running = start_server(tmp_path, str(tiny_tools_model), *usual, environment=clock.environment)
    running.wait_until_ready()
    yield running
    running.kill()


def says_day(server: RunningServer) -> str:
    """The day that the server takes it to be."""
    return httpx.get(f"{server.url}/health/live").headers["date"][5:16]


class Story(threading.Thread):
    """One long stream."""

    def __init__(self, client: OpenAI) -> None:
        super().__init__()
        self._client = client
        self.begun = threading.Event()
        self.finish: str | None = None
        self.start()

    def run(self) -> None:
        body = {"model": "a-model", "max_tokens": 1900, "extra_body": {"ignore_eos": True}}
        messages = [{"role": "user", "content": "Tell a story."}]
        for chunk in self._client.chat.completions.create(messages=messages, stream=True, **body):  # type: ignore[call-overload]
            self.begun.set()
            self.finish = chunk.choices[0].finish_reason


def test_nothing_ends_and_nobody_is_kept_out(server: RunningServer, clock: Clock) -> None:
    client = sdk(server).with_options(max_retries=0, api_key=new_key(server))
    today = says_day(server)
    assert chat(client) >= 1
    for days in (2, -2, 0):
        story = Story(client)
        assert story.begun.wait(60)
        clock.set_ahead(days)
        deadline_s = time.monotonic() + 10
        while (says_day(server) == today) != (days == 0):
            assert time.monotonic() < deadline_s
            time.sleep(0.1)
        for _ in range(5):
            assert chat(client) >= 1  # its limit was used up to a moment that now lies two days ahead
        story.join(120)
        assert story.finish == "length"
        batch = ended(client, submit(client, questions(10, 8)))
        assert (batch.status, len(output(client, batch))) == ("completed", 10)
    assert httpx.get(f"{server.url}/health/ready").json()["limits"] == "redis"
    server.wait_until_idle()
    assert server.metric("tidegate_kv_reserved_tokens") == 0
    assert server.metric("tidegate_engine_restarts_total") == 0
    assert server.stop() == 0
