import multiprocessing
import stat
from pathlib import Path

import pytest

from server.store.operator_key import OperatorKeyUnavailable, ensure_operator_key, read_operator_key


def test_a_key_is_made_once_for_its_owner_only(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "folder"
    assert read_operator_key(folder) is None
    key = ensure_operator_key(folder)
    assert key.startswith("tg-")
    assert (ensure_operator_key(folder), read_operator_key(folder)) == (key, key)
    assert [(file.name, stat.S_IMODE(file.stat().st_mode)) for file in folder.iterdir()] == [("operator.key", 0o600)]


def test_servers_that_start_at_once_get_the_same_key(tmp_path: Path) -> None:
    with multiprocessing.get_context("fork").Pool(8) as starters:
        keys = starters.map(ensure_operator_key, [tmp_path] * 40)
    assert len(set(keys)) == 1
    assert len(list(tmp_path.iterdir())) == 1


def test_an_empty_file_is_said_and_not_taken_for_a_key(tmp_path: Path) -> None:
    (tmp_path / "operator.key").write_text("\n")
    with pytest.raises(OperatorKeyUnavailable, match="is empty"):
        ensure_operator_key(tmp_path)


def test_a_folder_that_cannot_be_made_is_said_in_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OperatorKeyUnavailable, match=r"Not a directory|File exists"):
        ensure_operator_key(tmp_path / "file")
