"""A soak's result: what the server held as the requests went by, and how much of it grew in the second half."""

import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final, Literal

from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.holdings import Holdings

_MOST_GROWTH: Final = 0.02
_MOST_MORE: Final = {"fds": 2, "threads": 2, "children": 0, "tasks": 10}  # these come and go with the requests
_MEMORY: Final = ("rss_mib", "family_anon_mib")
_PARTS: Final = 10
_TABLE_WIDTH: Final = 160


@dataclass(frozen=True, slots=True)
class Sample:
    """What was held after so many requests. `at_s` is on the clock of `time.perf_counter`."""

    requests: int
    at_s: float
    tasks: int
    held: Holdings

    def figure(self, name: str) -> int:
        value: int = self.tasks if name == "tasks" else getattr(self.held, name)
        return value


@dataclass(frozen=True, slots=True)
class Growth:
    """One figure: its median over the tenth of the run around the middle, and over the last twentieth."""

    figure: str
    middle: float
    end: float

    @property
    def ratio(self) -> float:
        return self.end / self.middle - 1 if self.middle else 0.0

    @property
    def verdict(self) -> Literal["flat", "grows"]:
        """Memory is flat below 2%; a count also if it is higher by no more than comes and goes."""
        few_more = self.figure in _MOST_MORE and self.end - self.middle <= _MOST_MORE[self.figure]
        return "flat" if self.ratio < _MOST_GROWTH or few_more else "grows"


@dataclass(frozen=True, slots=True)
class Soak:
    """All samples, and how often each kind of request ended how; `unexpected` are those that should not have."""

    samples: Sequence[Sample]
    outcomes: Counter[tuple[str, str]]
    unexpected: Counter[tuple[str, str]]

    def growths(self) -> list[Growth]:
        """How each figure grew from the middle to the end."""
        middle, around = len(self.samples) // 2, len(self.samples) // (2 * _PARTS)
        return [
            Growth(
                name,
                statistics.median(
                    sample.figure(name) for sample in self.samples[middle - around : middle + around + 1]
                ),
                statistics.median(sample.figure(name) for sample in self.samples[-around - 1 :]),
            )
            for name in (*_MEMORY, *_MOST_MORE)
        ]

    def print(self) -> None:
        """The tables on stdout, as Markdown."""
        console, names = Console(width=_TABLE_WIDTH), (*_MEMORY, *_MOST_MORE)
        held = _table("requests", "minutes", *names)
        for sample in self._tenths():
            minutes = (sample.at_s - self.samples[0].at_s) / 60
            held.add_row(f"{sample.requests:,}", f"{minutes:.1f}", *(str(sample.figure(name)) for name in names))
        console.print(held)
        growths = _table("figure", "in the middle", "at the end", "growth", "verdict")
        for growth in self.growths():
            growths.add_row(
                growth.figure, f"{growth.middle:g}", f"{growth.end:g}", f"{growth.ratio:+.2%}", growth.verdict
            )
        console.print(growths)
        asked = _table("request", "outcome", "count")
        for (kind, outcome), count in sorted(self.outcomes.items()):
            asked.add_row(kind, outcome, f"{count:,}")
        console.print(asked)
        wrong = sum(self.unexpected.values())
        console.print(f"{wrong:,} ended as they should not: {_named(self.unexpected)}" if wrong else "All as expected.")

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "requests": self.samples[-1].requests,
            "duration_s": self.samples[-1].at_s - self.samples[0].at_s,
            "flat": all(growth.verdict == "flat" for growth in self.growths()),
            "growth": {growth.figure: {**asdict(growth), "ratio": growth.ratio} for growth in self.growths()},
            "outcomes": _named(self.outcomes),
            "unexpected": _named(self.unexpected),
            "samples": [
                {"requests": sample.requests, "tasks": sample.tasks, **asdict(sample.held)} for sample in self.samples
            ],
        }

    def _tenths(self) -> list[Sample]:
        last = len(self.samples) - 1
        return [self.samples[round(part * last / _PARTS)] for part in range(_PARTS + 1)]


def _named(counts: Counter[tuple[str, str]]) -> dict[str, int]:
    return {f"{kind}: {outcome}": count for (kind, outcome), count in sorted(counts.items())}


def _table(*headings: str) -> Table:
    table = Table(box=box.MARKDOWN)
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    return table
