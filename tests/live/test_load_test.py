"""`python -m benchmarks load` against the running server, as an operator uses it."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from benchmarks.load_test import command
from tests.live.running_server import RunningServer

pytestmark = pytest.mark.engine

SHORT = ["--requests", "4", "--concurrency", "2", "--answer-tokens", "8"]


def test_a_load_test_says_what_came_and_how_fast(server: RunningServer, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    ran = CliRunner().invoke(command, [f"{server.url}/v1", *SHORT, "--html", str(page), "--json"])
    assert ran.exit_code == 0, ran.output
    said = json.loads(ran.stdout.splitlines()[-1])
    ((figures,),) = [list(both.values()) for both in said["turns"]]
    assert (figures["answered"], figures["errors"]) == (4, {})
    assert 0 < figures["ttft_p50_ms"] <= figures["ttft_p99_ms"]
    assert figures["tokens_per_s"] == pytest.approx(4 * 8 / figures["duration_s"])
    assert "<polyline" in page.read_text()


def test_two_servers_are_compared_pair_by_pair(server: RunningServer) -> None:
    again = server.url.replace("127.0.0.1", "localhost")
    ran = CliRunner().invoke(command, [server.url, "--compare", again, "--turns", "2", *SHORT, "--json"])
    assert ran.exit_code == 0, ran.output
    rows = json.loads(ran.stdout.splitlines()[-1])["comparison"]
    assert {row["metric"] for row in rows} >= {"tokens_per_s", "ttft_p50_ms"}
    assert all(len(row["ratios"]) == 2 and row["verdict"] == "too few pairs" for row in rows)


def test_what_was_refused_is_counted_by_its_reason(server: RunningServer) -> None:
    ran = CliRunner().invoke(command, [server.url, "--model", "no-such-model", *SHORT, "--json"])
    assert ran.exit_code == 0, ran.output
    ((figures,),) = [list(both.values()) for both in json.loads(ran.stdout.splitlines()[-1])["turns"]]
    assert figures["answered"] == 0
    assert figures["errors"] == {"Not Found": 4}


def test_a_server_that_is_not_there_is_a_sentence() -> None:
    ran = CliRunner().invoke(command, ["http://127.0.0.1:9", *SHORT])
    assert ran.exit_code == 1
    assert "Name one with --model" in ran.output
