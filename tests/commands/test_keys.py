"""`tidegate keys` against a real server over HTTP."""

import re
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import httpx
import pytest
from click.testing import CliRunner, Result
from redis import Redis

from server.cli import cli
from server.store.keys import digest
from server.store.usage import TokenCounts, UsageEntry
from tests.api.running_application import OPERATOR_KEY, running
from tests.serving.fake_stack import FakeStack, RecordingOperation

CHAT = "/v1/chat/completions"


class Terminal:
    """Where the operator types, on the machine of a server."""

    def __init__(self, server: httpx.Client, data_folder: Path) -> None:
        self.server = server
        self._where = ("--url", str(server.base_url), "--data-folder", str(data_folder))

    def run(self, *args: str, **environment: str) -> Result:
        command = ["keys", *args, *self._where]
        return CliRunner().invoke(cli, command, prog_name="tidegate", env=environment, terminal_width=200)

    def works(self, key: str) -> bool:
        status = self.server.post(CHAT, json={}, headers={"authorization": f"Bearer {key}"}).status_code
        assert status in (200, 401)
        return status == 200

    def made(self, *args: str) -> str:
        """The key that a command prints, alone on its output."""
        result = self.run(*args)
        assert result.exit_code == 0, result.output
        assert re.fullmatch("tg-[0-9A-Za-z]{40}\n", result.stdout)
        return result.stdout.strip()


@pytest.fixture
def terminal(store_url: str, tmp_path: Path) -> Iterator[Terminal]:
    (tmp_path / "operator.key").write_text(f"{OPERATOR_KEY}\n")
    with running(FakeStack({("POST", CHAT): RecordingOperation()}), redis_url=store_url) as client:
        yield Terminal(client, tmp_path)


def test_a_new_key_is_printed_alone_and_works(terminal: Terminal) -> None:
    key = terminal.made("create", "search")
    assert terminal.works(key)
    assert not terminal.works("EMPTY")


def test_a_tenant_is_created_with_all_that_is_given(terminal: Terminal) -> None:
    options = (
        *("--class", "batch"), *("--rpm", "60"), *("--tpm", "10_000"), *("--tpd", "none"), *("--concurrency", "4"),
        *("--models", "smollm2, other"), *("--expires", "30d"),
    )  # fmt: skip
    terminal.made("create", "search", *options)
    shown = terminal.run("limits", "search").stdout
    assert shown == "search: class batch, 60 rpm, 10,000 tpm, 4 concurrency, models: other, smollm2\n"
    listed = terminal.run("list").stdout
    assert re.search(r"search .*batch .*60 rpm.*\d{4}-\d\d-\d\d \d\d:\d\d +.*\d{4}-\d\d-\d\d", listed)


def test_a_second_create_gives_the_tenant_one_more_key(terminal: Terminal) -> None:
    first, second = terminal.made("create", "search", "--rpm", "5"), terminal.made("create", "search")
    assert terminal.works(first)
    assert terminal.works(second)


def test_a_second_create_with_other_limits_is_refused_and_makes_no_key(terminal: Terminal) -> None:
    terminal.made("create", "search")
    result = terminal.run("create", "search", "--rpm", "5")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "There is a tenant `search` already." in result.stderr


def test_revoking_ends_one_key_or_all(terminal: Terminal) -> None:
    one, two, three = (terminal.made("create", "search") for _ in range(3))
    assert terminal.run("revoke", "search", "--key", digest(one)[:16]).exit_code == 0
    assert [terminal.works(key) for key in (one, two, three)] == [False, True, True]
    assert terminal.run("revoke", "search").exit_code == 0
    assert [terminal.works(key) for key in (two, three)] == [False, False]
    assert "had no key" in terminal.run("revoke", "search").stderr


def test_a_rotation_prints_the_new_key(terminal: Terminal) -> None:
    first = terminal.made("create", "search")
    second = terminal.made("rotate", "search", "--grace", "1h")
    assert [terminal.works(key) for key in (first, second)] == [True, True]
    third = terminal.made("rotate", "search")
    assert [terminal.works(key) for key in (first, second, third)] == [False, False, True]


def test_limits_are_changed_one_by_one_and_taken_away(terminal: Terminal) -> None:
    terminal.made("create", "search", "--rpm", "5", "--tpd", "7", "--models", "a")
    assert terminal.run("limits", "search", "--tpm", "9").stdout.endswith("5 rpm, 9 tpm, 7 tpd, models: a\n")
    changed = terminal.run("limits", "search", "--rpm", "none", "--tpm", "none", "--tpd", "none", "--models", "all")
    assert changed.stdout.endswith("no limits, models: all\n")


def test_a_deleted_tenant_is_gone_and_the_last_one_is_said(terminal: Terminal) -> None:
    for name in ("a", "b"):
        terminal.made("create", name)
    assert terminal.run("delete", "a").stderr == "Deleted a.\n"
    assert "the last tenant" in terminal.run("delete", "b").stderr
    assert terminal.run("list").stdout == "There is no tenant.\n"


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (["create", "a b"], "cannot be a tenant's name"),
        (["create", "a", "--rpm", "0"], "from 1 up"),
        (["create", "a", "--tpm", "-5"], "from 1 up"),
        (["create", "a", "--tpd", "many"], "from 1 up"),
        (["create", "a", "--expires", "soon"], "90s, 45m, 12h, 30d or 8w"),
        (["create", "a", "--expires", "0d"], "90s, 45m, 12h, 30d or 8w"),
        (["create", "a", "--class", "best"], "critical"),
        (["create", "a", "--models", ","], "models"),
        (["revoke", "nobody"], "There is no tenant `nobody`."),
        (["limits", "no/body"], "There is no"),
    ],
)
def test_what_cannot_be_done_is_said_in_a_sentence(terminal: Terminal, args: list[str], told: str) -> None:
    result = terminal.run(*args)
    assert result.exit_code != 0
    assert (result.stdout, told in result.stderr) == ("", True), result.stderr
    assert "Traceback" not in result.stderr


def test_the_key_may_come_from_a_flag_or_the_environment(terminal: Terminal) -> None:
    assert terminal.run("list", TIDEGATE_OPERATOR_KEY=OPERATOR_KEY).exit_code == 0
    assert terminal.run("list", "--operator-key", OPERATOR_KEY, TIDEGATE_OPERATOR_KEY="wrong").exit_code == 0
    refused = terminal.run("list", TIDEGATE_OPERATOR_KEY="wrong")
    assert refused.exit_code == 1
    assert "does not take this operator key" in refused.stderr


def test_without_a_key_the_operator_is_told_where_it_was_looked_for(tmp_path: Path) -> None:
    result = CliRunner().invoke(cli, ["keys", "list", "--data-folder", str(tmp_path)])
    assert result.exit_code == 1
    assert str(tmp_path) in result.stderr
    assert "--operator-key" in result.stderr


@pytest.mark.parametrize("url", ["http://127.0.0.1:1", "127.0.0.1:1", "http://[::bad"])
def test_a_server_that_does_not_answer_is_said_with_its_address(url: str) -> None:
    result = CliRunner().invoke(cli, ["keys", "list", "--url", url, "--operator-key", OPERATOR_KEY])
    assert result.exit_code == 1
    assert f"No server answers at {url}" in result.stderr
    assert "--url" in result.stderr


def test_a_key_for_the_file_is_made_without_a_server() -> None:
    result = CliRunner().invoke(cli, ["keys", "generate"])
    assert result.stderr == f'keys = [{{ sha256 = "{digest(result.stdout.strip())}" }}]\n'


def test_usage_is_shown_by_model(terminal: Terminal, stored: Redis) -> None:
    terminal.made("create", "search")
    assert terminal.run("usage", "search").stdout == "search has used nothing this month.\n"
    moment = datetime.now(UTC)
    for key in UsageEntry("search", "m", TokenCounts(), moment).keys:
        stored.hset(key, mapping={"m|requests": 3, "m|prompt_tokens": 12_000, "m|completion_tokens": 345})
    shown = terminal.run("usage", "search").stdout
    assert re.search(rf"{moment:%Y-%m-%d} .*m .*3 .*12,000 .*0 .*345 .*12,345", shown)
    assert re.search(rf"{moment:%Y-%m} .*m .*12,345", shown)
