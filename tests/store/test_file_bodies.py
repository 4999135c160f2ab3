import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from server.store.file_bodies import FileBodies, new_file_id


def test_what_was_kept_is_there(tmp_path: Path) -> None:
    bodies, file_id = FileBodies(tmp_path), new_file_id()
    with bodies.upload(file_id) as upload:
        upload.write(b"one")
        upload.write(b"two")
        upload.keep()
    assert bodies.path(file_id).read_bytes() == b"onetwo"
    assert upload.size == 6


def test_what_was_not_kept_leaves_nothing(tmp_path: Path) -> None:
    bodies = FileBodies(tmp_path)
    with bodies.upload(new_file_id()) as upload:
        upload.write(b"half")
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


@pytest.mark.parametrize("name", ["../../etc/passwd", "file-", "file-" + "A" * 32, "file-" + "0" * 32 + "/x", "", "."])
def test_only_our_own_ids_are_names_on_disk(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="no id of a file"):
        FileBodies(tmp_path).path(name)


def test_a_folder_has_one_name_for_all_who_use_it(tmp_path: Path) -> None:
    first, second = FileBodies(tmp_path / "a"), FileBodies(tmp_path / "a")
    assert first.folder_id() == second.folder_id()
    assert FileBodies(tmp_path / "b").folder_id() != first.folder_id()


def test_nobody_else_may_read_the_files(tmp_path: Path) -> None:
    bodies, file_id = FileBodies(tmp_path), new_file_id()
    with bodies.upload(file_id) as upload:
        upload.keep()
    assert bodies.path(file_id).stat().st_mode & 0o077 == 0
    assert bodies.path(file_id).parent.stat().st_mode & 0o077 == 0


def test_deleting_twice_is_as_once(tmp_path: Path) -> None:
    bodies, file_id = FileBodies(tmp_path), new_file_id()
    with bodies.upload(file_id) as upload:
        upload.keep()
    bodies.delete(file_id)
    bodies.delete(file_id)
    assert not bodies.path(file_id).exists()


def test_a_sweep_removes_uploads_that_were_cut_off_and_no_others(tmp_path: Path) -> None:
    bodies, kept = FileBodies(tmp_path), new_file_id()
    with bodies.upload(kept) as upload:
        upload.keep()
    folder = bodies.path(kept).parent
    abandoned, fresh = folder / f"{new_file_id()}.part", folder / f"{new_file_id()}.part"
    abandoned.touch()
    fresh.touch()
    long_ago_s = time.time() - 48 * 3600
    os.utime(abandoned, (long_ago_s, long_ago_s))
    os.utime(bodies.path(kept), (long_ago_s, long_ago_s))
    bodies.sweep()
    assert (abandoned.exists(), fresh.exists(), bodies.path(kept).exists()) == (False, True, True)


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
from server.store.file_bodies import DiskFull, FileBodies, new_file_id

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
bodies = FileBodies(Path(sys.argv[1]))
try:
    with bodies.upload(new_file_id()) as upload:
        upload.write(b"x" * 2000)
except DiskFull:
    print("full", len(list(Path(sys.argv[1]).rglob("*.part"))))
"""


def test_a_full_disk_is_said_and_leaves_nothing(tmp_path: Path) -> None:
    said = subprocess.run([sys.executable, "-c", FULL_DISK, tmp_path], capture_output=True, text=True, check=True)
    assert said.stdout.split() == ["full", "0"]
