"""`tidegate top` against a real server over HTTP."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress

import httpx
import pytest
from click.testing import CliRunner, Result

from server.cli import cli
from server.commands.top import plain
from server.commands.top_figures import figures_between, quantile
from tests.api.running_application import OPERATOR_KEY, running
from tests.serving.fake_stack import FakeStack, RecordingOperation

CHAT = "/v1/chat/completions"


@pytest.fixture
def server(store_url: str) -> Iterator[httpx.Client]:
    with running(FakeStack({("POST", CHAT): RecordingOperation()}), redis_url=store_url) as client:
        yield client


def top(server: httpx.Client, *args: str, key: str = OPERATOR_KEY) -> Result:
    command = ["top", *args, "--url", str(server.base_url), "--operator-key", key]
    return CliRunner().invoke(cli, command, prog_name="tidegate")


def test_one_look_shows_state_level_and_tenants(server: httpx.Client) -> None:
    headers = {"authorization": f"Bearer {OPERATOR_KEY}"}
    server.post("/admin/tenants", json={"name": "search", "class": "critical"}, headers=headers)
    server.put("/admin/level", json={"level": 1, "reason": "a [bold]test[/]", "by": "anna"}, headers=headers)
    shown = top(server, "--once")
    assert shown.exit_code == 0, shown.output
    for words in (
        "Tidegate 1.2.3",
        "ready",
        "level 1 economy",
        "a [bold]test[/]",
        "anna",
        "a-model",
        "search",
        "critical",
    ):
        assert words in shown.stdout, words
    assert "\x1b" not in shown.stdout


def _heed_interrupts() -> None:
    """Tests that a shell runs in the background are started with interrupts ignored, and so is what they start."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_in_a_terminal_it_goes_on_until_it_is_interrupted(server: httpx.Client) -> None:
    terminal, inside = os.openpty()
    command = [
        sys.executable, "-m", "server", "top", "--interval", "0.5", "--url", str(server.base_url), "--operator-key",
        OPERATOR_KEY,
    ]  # fmt: skip
    process = subprocess.Popen(command, stdin=inside, stdout=inside, stderr=inside, preexec_fn=_heed_interrupts)
    os.close(inside)
    seen = b""
    try:
        while seen.count(b"a-model") < 3:  # drawn again and again
            seen += os.read(terminal, 4096)
    finally:
        process.send_signal(signal.SIGINT)
    with suppress(OSError):  # Linux says so when the other end is closed
        while os.read(terminal, 4096):
            pass
    os.close(terminal)
    assert process.wait(20) == 0
    assert b"Traceback" not in seen


def test_the_json_is_what_the_server_gives(server: httpx.Client) -> None:
    shown = top(server, "--json")
    assert shown.exit_code == 0, shown.output
    assert json.loads(shown.stdout)["object"] == "overview"


def test_without_the_operators_key_a_sentence_says_so(server: httpx.Client) -> None:
    refused = top(server, "--once", key="somebody-elses-key-here")
    assert refused.exit_code != 0
    assert "does not take this operator key" in refused.output


def test_text_from_outside_cannot_steer_the_terminal() -> None:
    assert plain("red\x1b[31m\r\nname é") == "red?[31m??name é"


@pytest.mark.parametrize(
    ("counts", "share", "expected"),
    [
        ([0, 0, 0], 0.5, None),
        ([10, 10, 10], 0.5, 0.5),  # the middle of the first bucket
        ([0, 4, 4], 0.5, 1.5),
        ([1, 3, 4], 0.95, 2.0),  # beyond the last finite bound
    ],
)
def test_a_quantile_is_read_off_cumulative_buckets(counts: list[int], share: float, expected: float | None) -> None:
    assert quantile([1.0, 2.0, None], counts, share) == expected


def snapshot(taken_at_s: float, tokens: float | None, ttft: list[int] | None) -> dict[str, object]:
    histogram = None if ttft is None else {"bounds": [1.0, None], "counts": ttft, "sum": 0.0}
    return {
        "taken_at_s": taken_at_s,
        "counters": {
            "prompt_tokens": 0.0,
            "completion_tokens": tokens,
            "requests_by_status": {"2xx": int(tokens or 0)},
        },
        "histograms": {"ttft_s": histogram, "itl_s": None, "queue_wait_s": None},
    }


def test_rates_are_differences_and_a_counter_that_fell_began_anew() -> None:
    grown = figures_between(snapshot(10, 100, [4, 4]), snapshot(12, 140, [8, 8]))
    assert (grown.completion_tokens, grown.requests["2xx"], grown.ttft.p50_s) == (20.0, 20.0, 0.5)
    anew = figures_between(snapshot(10, 100, [4, 4]), snapshot(12, 30, [2, 2]))
    assert (anew.completion_tokens, anew.ttft.p50_s) == (15.0, 0.5)
    unknown = figures_between(snapshot(10, None, None), snapshot(12, None, None))
    assert (unknown.completion_tokens, unknown.ttft.p50_s) == (None, None)
