"""`tidegate level` against a real server over HTTP."""

from collections.abc import Iterator

import httpx
import pytest
from click.testing import CliRunner, Result

from server.cli import cli
from tests.api.running_application import OPERATOR_KEY, running
from tests.serving.fake_stack import FakeStack, RecordingOperation

CHAT = "/v1/chat/completions"


class Terminal:
    """Where the operator types."""

    def __init__(self, server: httpx.Client) -> None:
        self.server = server

    def run(self, *args: str, key: str = OPERATOR_KEY) -> Result:
        command = ["level", *args, "--url", str(self.server.base_url), "--operator-key", key]
        return CliRunner().invoke(cli, command, prog_name="tidegate", terminal_width=200)


@pytest.fixture
def terminal(store_url: str) -> Iterator[Terminal]:
    with running(FakeStack({("POST", CHAT): RecordingOperation()}), redis_url=store_url) as client:
        yield Terminal(client)


def test_the_level_is_set_shown_and_cleared(terminal: Terminal) -> None:
    assert "level 0: normal" in terminal.run("get").stdout
    pinned = terminal.run("set", "1", "--reason", "a test", "--ttl", "10m")
    assert pinned.exit_code == 0, pinned.output
    shown = terminal.run("get").stdout
    assert "level 1: economy" in shown
    assert "a test" in shown
    assert "pinned for another 600 s" in shown or "pinned for another 59" in shown
    answered = terminal.server.post(CHAT, json={"messages": []})
    assert answered.headers["x-degradation-level"] == "1"
    assert "level 0: normal" in terminal.run("clear").stdout
    assert "x-degradation-level" not in terminal.server.post(CHAT, json={"messages": []}).headers


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("set", "6", "--reason", "x"), "6"),
        (("set", "-1", "--reason", "x"), "-1"),
        (("set", "1"), "--reason"),
        (("set", "1", "--reason", " "), "reason"),
        (("set", "1", "--reason", "x", "--ttl", "soon"), "soon"),
        (("set", "1", "--reason", "x", "--ttl", "500d"), "ttl_s"),
        (("set", "4", "--reason", "x"), "--fallback-url"),
    ],
)
def test_a_wrong_command_says_what_is_wrong_and_changes_nothing(
    args: tuple[str, ...], words: str, terminal: Terminal
) -> None:
    refused = terminal.run(*args)
    assert refused.exit_code != 0
    assert words in refused.output
    assert "level 0: normal" in terminal.run("get").stdout


def test_without_the_operators_key_nothing_is_shown_and_nothing_changes(terminal: Terminal) -> None:
    for args in (("get",), ("set", "1", "--reason", "x"), ("clear",)):
        refused = terminal.run(*args, key="somebody-elses-key-here")
        assert refused.exit_code != 0
        assert "operator key" in refused.output
    assert "level 0: normal" in terminal.run("get").stdout
