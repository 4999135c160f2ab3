"""The bodies of files on disk. A name on disk is an id of ours, never a client's text."""

import errno
import os
import re
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Final

_FILES: Final = "files"
_PART: Final = ".part"
_FOLDER_ID: Final = "folder-id"
_FILE_ID: Final = re.compile(r"file-[0-9a-f]{32}")
_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_ABANDONED_AFTER_S: Final = 24 * 3600.0


class DiskFull(Exception):
    """There is no room for what was to be written. What was written before is as it was."""


def new_file_id() -> str:
    return f"file-{secrets.token_hex(16)}"


class FileBodies:
    """One folder of bodies. Replicas that are given the same folder see the same files."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._folder_id: str | None = None

    def folder_id(self) -> str:
        """A name for this folder, made at its first use. Raises `DiskFull` and `OSError`."""
        if self._folder_id is None:
            self._files().mkdir(mode=0o700, parents=True, exist_ok=True)
            named = self._folder / _FOLDER_ID
            if not named.exists():
                _write_once(named, secrets.token_hex(8))
            self._folder_id = named.read_text(encoding="ascii")
        return self._folder_id

    def path(self, file_id: str) -> Path:
        """Where a body lies, if it does. Raises `ValueError` for what is no id of ours."""
        if _FILE_ID.fullmatch(file_id) is None:
            raise ValueError(f"no id of a file: {file_id!r}")
        return self._files() / file_id

    def upload(self, file_id: str) -> "Upload":
        """A body that is being written, for `with`: it is there when it was kept, and gone otherwise."""
        return Upload(self.path(file_id))

    def delete(self, file_id: str) -> None:
        """Remove a body, if it is there. Whoever reads it now may finish."""
        self.path(file_id).unlink(missing_ok=True)

    def sweep(self) -> None:
        """Remove what uploads left that were cut off by the end of their process."""
        oldest_s = time.time() - _ABANDONED_AFTER_S
        for part in self._files().glob(f"*{_PART}"):
            with suppress(FileNotFoundError):
                if part.stat().st_mtime < oldest_s:
                    part.unlink()

    def _files(self) -> Path:
        return self._folder / _FILES


def _write_once(path: Path, text: str) -> None:
    """Write a small file whole, or leave the one that somebody else wrote at the same time."""
    fresh = path.with_name(f"{path.name}.{secrets.token_hex(4)}")
    with disk_full_named():
        fresh.write_text(text, encoding="ascii")
    try:
        with suppress(FileExistsError):
            os.link(fresh, path)
    finally:
        fresh.unlink()


class Upload:
    """A body on its way to disk."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._part = path.with_name(path.name + _PART)
        self.size = 0

    def __enter__(self) -> "Upload":
        self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with disk_full_named():
            self._fd = os.open(self._part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        return self

    def write(self, data: bytes) -> None:
        """Raises `DiskFull`."""
        with disk_full_named():
            left = memoryview(data)
            while left:
                left = left[os.write(self._fd, left) :]
        self.size += len(data)

    def keep(self) -> None:
        """Make it a file: on disk for good, and whole."""
        with disk_full_named():
            os.fsync(self._fd)
        self._part.rename(self._path)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._fd)
        self._part.unlink(missing_ok=True)


@contextmanager
def disk_full_named() -> Iterator[None]:
    """Inside it, the ways in which a disk is full become `DiskFull`."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise DiskFull(error.strerror) from error
        raise
