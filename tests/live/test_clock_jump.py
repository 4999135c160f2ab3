"""A clock that is set forward and back under a running server: nothing ends, and nobody is kept out."""

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

FAKETIME = next(iter(sorted(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"))), None)
READ_AGAIN_S = 1

pytestmark = [
    pytest.mark.engine,
    pytest.mark.slow,
    pytest.mark.skipif(FAKETIME is None, reason="NOT SHOWN: a clock that jumps. It takes Debian's libfaketime."),
]


class Clock:
    """What a server and its Redis take for the time of day; what measures durations is left alone."""

    def __init__(self, file: Path) -> None:
        self._file = file
        file.write_text("+0")
        self.environment = {
            "LD_PRELOAD": str(FAKETIME),
            "FAKETIME_TIMESTAMP_FILE": str(file),
            "FAKETIME_CACHE_DURATION": str(READ_AGAIN_S),
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
            "DONT_FAKE_MONOTONIC": "1",
        }

    def jump(self, offset: str) -> None:
        self._file.write_text(offset)
        time.sleep(READ_AGAIN_S + 0.5)


@pytest.fixture
def clock(tmp_path: Path) -> Clock:
    return Clock(tmp_path / "time")


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
        body = {"model": "a-model", "max_tokens": 300, "extra_body": {"ignore_eos": True}}
        messages = [{"role": "user", "content": "Tell a story."}]
        for chunk in self._client.chat.completions.create(messages=messages, stream=True, **body):  # type: ignore[call-overload]
            self.begun.set()
            self.finish = chunk.choices[0].finish_reason


def test_nothing_ends_and_nobody_is_kept_out(server: RunningServer, clock: Clock) -> None:
    client = sdk(server).with_options(max_retries=0, api_key=new_key(server))
    today = says_day(server)
    assert chat(client) >= 1
    for offset in ("+2d", "-2d", "+0"):  # the last also because under libfaketime nobody can sleep in the past
        story = Story(client)
        assert story.begun.wait(60)
        clock.jump(offset)
        assert (says_day(server) == today) == (offset == "+0")
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
