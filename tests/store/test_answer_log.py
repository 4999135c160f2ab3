import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from server.store.answer_log import AnswerLog, Kind, LogInUse, LogPaths, opened, recover


def record(custom_id: str) -> bytes:
    return json.dumps({"custom_id": custom_id, "text": "x" * 50}).encode() + b"\n"


@pytest.fixture
def paths(tmp_path: Path) -> LogPaths:
    return LogPaths(tmp_path / "output", tmp_path / "error")


def found(paths: LogPaths) -> dict[Kind, list[str]]:
    seen: dict[Kind, list[str]] = {"output": [], "error": []}

    def each(kind: Kind, value: dict[str, Any]) -> None:
        seen[kind].append(value["custom_id"])

    recover(paths, each)
    return seen


def test_what_was_appended_is_found_again(paths: LogPaths) -> None:
    with opened(paths) as log:
        log.append("output", record("a"))
        log.append("error", record("b"))
        log.append("output", record("c"))
        log.sync()
    assert found(paths) == {"output": ["a", "c"], "error": ["b"]}


@pytest.mark.parametrize("cut", [1, 30, len(record("c")) - 1])
def test_a_record_that_was_cut_off_by_a_kill_is_cut_away(paths: LogPaths, cut: int) -> None:
    with opened(paths) as log:
        log.append("output", record("a"))
    with paths.output.open("ab") as file:
        file.write(record("b")[:cut])
    with opened(paths) as log:
        assert found(paths)["output"] == ["a"]
        log.append("output", record("b"))
    assert paths.output.read_bytes() == record("a") + record("b")


@pytest.mark.parametrize("garbage", [b"\0" * 40 + b"\n", b"{}\n", b'{"custom_id": null}\n', b"\xff\n"])
def test_what_a_crash_of_the_machine_left_is_cut_away(paths: LogPaths, garbage: bytes) -> None:
    with opened(paths) as log:
        log.append("output", record("a"))
    with paths.output.open("ab") as file:
        file.write(garbage + record("b"))
    assert found(paths)["output"] == ["a"]
    assert paths.output.read_bytes() == record("a")


def test_two_never_write_the_same_files(paths: LogPaths) -> None:
    with opened(paths), pytest.raises(LogInUse), opened(paths):
        pass
    with opened(paths) as log:
        assert isinstance(log, AnswerLog)


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
from server.store.answer_log import LogPaths, opened
from server.store.file_bodies import DiskFull

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (250, 250))
with opened(LogPaths(Path(sys.argv[1]), Path(sys.argv[2]))) as log:
    try:
        while True:
            log.append("output", sys.argv[3].encode() + b"\\n")
    except DiskFull:
        print("full", log.size("output"))
"""


def test_on_a_full_disk_the_records_before_stay_whole(paths: LogPaths) -> None:
    text = record("a").decode().strip()
    said = subprocess.run(
        [sys.executable, "-c", FULL_DISK, paths.output, paths.error, text], capture_output=True, text=True, check=True
    )
    assert said.stdout.split() == ["full", str(3 * len(record("a")))]
    assert found(paths)["output"] == ["a", "a", "a"]
