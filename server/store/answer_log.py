"""The answers of a batch while it runs: two append-only files, which are also the record of how far it came.

A line is done when its answer stands in one of them, whole. There is no second record that could disagree, so a
process that is killed at any moment loses what was not answered and repeats nothing. Whoever writes holds the lock of
the output file, which the kernel takes back when a process ends.
"""

import fcntl
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from server.store.file_bodies import disk_full_named

Kind = Literal["output", "error"]
_KINDS: Final[tuple[Kind, ...]] = ("output", "error")


class LogInUse(Exception):
    """Another process writes these files."""


@dataclass(frozen=True, slots=True)
class LogPaths:
    """Where the two files lie."""

    output: Path
    error: Path

    def of(self, kind: Kind) -> Path:
        return self.output if kind == "output" else self.error


class AnswerLog:
    """Both files, open for appending. Use `opened`."""

    def __init__(self, descriptors: dict[Kind, int]) -> None:
        self._descriptors = descriptors

    def append(self, kind: Kind, record: bytes) -> None:
        """Add a line, whole or not at all. Raises `DiskFull`."""
        descriptor = self._descriptors[kind]
        end = os.lseek(descriptor, 0, os.SEEK_END)
        try:
            with disk_full_named():
                written = os.write(descriptor, record)
                while written < len(record):  # the next write says why this one was short
                    written += os.write(descriptor, memoryview(record)[written:])
        except BaseException:
            os.ftruncate(descriptor, end)
            raise

    def sync(self) -> None:
        """Put both on disk for good. Raises `DiskFull`."""
        with disk_full_named():
            for descriptor in self._descriptors.values():
                os.fsync(descriptor)

    def size(self, kind: Kind) -> int:
        return os.fstat(self._descriptors[kind]).st_size


@contextmanager
def opened(paths: LogPaths) -> Iterator[AnswerLog]:
    """The log, locked. Raises `LogInUse`, and `DiskFull` where the files cannot be made."""
    descriptors: dict[Kind, int] = {}
    try:
        for kind in _KINDS:
            paths.of(kind).parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with disk_full_named():
                descriptors[kind] = os.open(paths.of(kind), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptors["output"], fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise LogInUse(str(paths.output)) from error
        yield AnswerLog(descriptors)
    finally:
        for descriptor in descriptors.values():
            os.close(descriptor)


def recover(paths: LogPaths, each: Callable[[Kind, dict[str, Any]], None]) -> None:
    """Hand over every answer that stands in the files, and cut off what a killed process left half written.

    Only for whoever holds the lock.
    """
    for kind in _KINDS:
        good = 0
        with paths.of(kind).open("r+b") as file:
            for raw in file:
                record = _whole(raw)
                if record is None:
                    break
                each(kind, record)
                good += len(raw)
            file.truncate(good)


def _whole(raw: bytes) -> dict[str, Any] | None:
    """A record that was written to its end. After a crash of the machine a line may hold anything."""
    if not raw.endswith(b"\n"):
        return None
    try:
        record = json.loads(raw)
    except ValueError:
        return None
    return record if isinstance(record, dict) and isinstance(record.get("custom_id"), str) else None
