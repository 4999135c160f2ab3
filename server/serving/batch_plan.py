"""Reads a batch's input file once: is every line good, where does each lie, and in which order do they run best."""

from __future__ import annotations

import time
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Final

from server.policy.batch_lines import Line, duplicate, other_model, parsed, read_line
from server.policy.batches import BatchError

# The scan runs in a thread, and holds Python's lock while it parses. It lets go this often, so that nobody's next
# token waits for it longer than that.
_WORK_S: Final = 0.002
_REST_S: Final = 0.001
_MOST_ERRORS: Final = 1000


class BadInput(Exception):
    """The file cannot be run; `errors` say why, line by line."""

    def __init__(self, errors: list[BatchError]) -> None:
        super().__init__(errors[0].message)
        self.errors = errors


@dataclass(frozen=True, slots=True)
class InputLimits:
    """What an input file may hold."""

    max_lines: int
    max_line_bytes: int


@dataclass(slots=True)
class Plan:
    """Every line of a file: where it begins, how long it is, its name. `order` is the one in which they run."""

    path: Path
    model: str | None = None
    numbers: array[int] = field(default_factory=lambda: array("I"))
    offsets: array[int] = field(default_factory=lambda: array("Q"))
    lengths: array[int] = field(default_factory=lambda: array("I"))
    custom_ids: list[str] = field(default_factory=list)
    order: array[int] = field(default_factory=lambda: array("I"))

    def __len__(self) -> int:
        return len(self.custom_ids)

    def request(self, file: IO[bytes], index: int) -> dict[str, Any]:
        """The JSON object on a line. Raises `BadInput` where the file is not the one that was scanned."""
        file.seek(self.offsets[index])
        read = parsed(file.read(self.lengths[index]), self.numbers[index])
        if isinstance(read, BatchError) or read.get("custom_id") != self.custom_ids[index]:
            raise BadInput([BatchError("input_changed", "The input file was changed.", self.numbers[index])])
        return read


def scan(path: Path, endpoint: str, limits: InputLimits) -> Plan:
    """The plan for a file. Blocks; call it in a thread. Raises `BadInput` and `FileNotFoundError`."""
    scanning = _Scan(path, endpoint, limits)
    for number, raw in _breathing(path, limits.max_line_bytes):
        if not scanning.take(number, raw):
            break
    return scanning.plan()


class _Scan:
    """A plan in the making, and what is wrong with the file so far."""

    def __init__(self, path: Path, endpoint: str, limits: InputLimits) -> None:
        self._plan = Plan(path)
        self._endpoint = endpoint
        self._limits = limits
        self._begin: list[str] = []
        self._seen: set[str] = set()
        self._errors: list[BatchError] = []
        self._offset = 0

    def take(self, number: int, raw: bytes) -> bool:
        """Look at the next line. False: it makes no sense to go on."""
        start, self._offset = self._offset, self._offset + len(raw)
        if not raw.strip():
            return True
        if (end := self._over_limits(number, raw)) is not None:
            self._errors.append(end)
            return False
        line = read_line(raw, number, self._endpoint)
        problem = line if isinstance(line, BatchError) else self._unfit(line, number)
        if isinstance(line, Line) and problem is None:
            self._add(line, number, start, len(raw))
        elif problem is not None:
            self._errors.append(problem)
        return len(self._errors) < _MOST_ERRORS

    def plan(self) -> Plan:
        """The whole plan. Raises `BadInput`."""
        if not self._errors and not len(self._plan):
            self._errors.append(BatchError("empty_file", "The input file holds no requests."))
        if self._errors:
            raise BadInput(self._errors)
        self._plan.order.extend(sorted(range(len(self._begin)), key=self._begin.__getitem__))
        return self._plan

    def _over_limits(self, number: int, raw: bytes) -> BatchError | None:
        limits = self._limits
        if len(raw) > limits.max_line_bytes:
            return BatchError("line_too_long", f"A line may have at most {limits.max_line_bytes} bytes.", number)
        if len(self._plan) >= limits.max_lines:
            message = f"The file has more requests than one batch may have ({limits.max_lines})."
            return BatchError("too_many_requests", message, number)
        return None

    def _unfit(self, line: Line, number: int) -> BatchError | None:
        """What is wrong with a line next to the others."""
        if line.custom_id in self._seen:
            return duplicate(number)
        if self._seen and line.model != self._plan.model:
            return other_model(number, line.model, self._plan.model)
        return None

    def _add(self, line: Line, number: int, start: int, length: int) -> None:
        self._seen.add(line.custom_id)
        plan = self._plan
        plan.model = line.model
        plan.numbers.append(number)
        plan.offsets.append(start)
        plan.lengths.append(length)
        plan.custom_ids.append(line.custom_id)
        self._begin.append(line.order)


def _breathing(path: Path, max_line_bytes: int) -> Iterator[tuple[int, bytes]]:
    """The lines with their numbers, with rests between them; one that is too long comes as its beginning, last."""
    rest_at_s = time.perf_counter() + _WORK_S
    with path.open("rb") as file:
        number = 0
        while raw := file.readline(max_line_bytes + 1):
            number += 1
            yield number, raw
            if time.perf_counter() >= rest_at_s:
                time.sleep(_REST_S)
                rest_at_s = time.perf_counter() + _WORK_S
