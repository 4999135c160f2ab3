import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks import litellm_proxy
from benchmarks.comparison import Metric
from benchmarks.contenders import Contender
from benchmarks.side_by_side_report import Block, SideBySide

TTFT, TOKENS = Metric("ttft_p50_ms", "TTFT p50, ms", "lower"), Metric("tokens_per_s", "tokens/s", "higher")


@pytest.fixture
def upstream(tmp_path: Path) -> Iterator[Contender]:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    yield Contender("plain", "http://127.0.0.1:1", process, tmp_path / "log", 0.0, "/health")
    process.kill()
    process.wait()


def result(*turns: tuple[tuple[float, float], ...]) -> SideBySide:
    rounds = [[{"ttft_p50_ms": ttft, "tokens_per_s": tokens} for ttft, tokens in turn] for turn in turns]
    return SideBySide(["plain", "litellm + plain", "tidegate"], [Block("x", (TTFT, TOKENS), rounds)], {}, {}, "")


def test_what_is_added_is_over_plain_vllm_of_the_same_round() -> None:
    (added,) = result(((10, 1), (30, 1), (11, 1)), ((50, 1), (70, 1), (51, 1))).added()
    assert (list(added.litellm), list(added.tidegate), added.ratio) == ([20, 20], [1, 1], 0.05)


def test_each_pair_of_contenders_has_its_ratio() -> None:
    said = result(((10, 100), (20, 5), (5, 200)))
    _, tokens = said.as_dict()["rows"]
    ratios = {name: tokens[name]["ratio"] for name in ("litellm_to_plain", "tidegate_to_plain", "tidegate_to_litellm")}
    assert ratios == {"litellm_to_plain": 0.05, "tidegate_to_plain": 2, "tidegate_to_litellm": 40}


def test_the_table_names_all_three(capsys: pytest.CaptureFixture[str]) -> None:
    result(((10, 100), (20, 5), (5, 200))).print()
    printed = capsys.readouterr().out
    assert "| tidegate / litellm + plain |" in printed
    assert "40 (40 to 40)" in printed


def test_an_installed_proxy_is_not_installed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = tmp_path / "tidegate" / "benchmarks" / f"litellm-{litellm_proxy.VERSION}"
    folder.mkdir(parents=True)
    (folder / "complete").touch()
    assert litellm_proxy.installed() == folder
    assert [file.name for file in folder.iterdir()] == ["complete"]


def test_the_proxy_starts_in_front_of_the_server_and_without_the_callers_database(
    upstream: Contender, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("DATABASE_URL", "postgresql://somewhere")
    script = tmp_path / "tidegate" / "benchmarks" / f"litellm-{litellm_proxy.VERSION}" / "bin" / "litellm"
    script.parent.mkdir(parents=True)
    (script.parents[1] / "complete").touch()
    script.write_text('#!/bin/sh\nenv > "$0.env"\ncp "$2" "$0.config"\necho "$@" > "$0.arguments"\nexec sleep 60\n')
    script.chmod(0o755)
    with litellm_proxy.proxied(upstream, workers=2) as proxy:
        while not (arguments := script.with_suffix(".arguments")).exists() or not arguments.read_text():
            assert proxy.process.poll() is None
        assert proxy.name == "litellm + plain"
    assert "DATABASE_URL" not in script.with_suffix(".env").read_text()
    assert "--num_workers 2" in arguments.read_text()
    (model,) = json.loads(script.with_suffix(".config").read_text())["model_list"]
    assert model["litellm_params"]["api_base"] == "http://127.0.0.1:1/v1"
