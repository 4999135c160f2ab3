"""The table of `side-by-side`: three contenders, each measured against plain vLLM, and Tidegate against LiteLLM."""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.comparison import ARROWS, Metric, Row, median_interval

Turn = Mapping[str, float]
_TABLE_WIDTH: Final = 200
_ADDED_TO: Final = ("ttft_p50_ms", "total_p50_ms")


@dataclass(frozen=True, slots=True)
class Block:
    """One load: in each round a turn of plain vLLM, of the proxy and of Tidegate, in this order."""

    load: str
    metrics: Sequence[Metric]
    turns: Sequence[Sequence[Turn]]

    def values(self, contender: int, metric: Metric) -> list[float]:
        return [turns[contender][metric.key] for turns in self.turns]

    def row(self, metric: Metric, first: int, second: int) -> Row:
        """One contender against another."""
        return Row(self.load, metric, self.values(first, metric), self.values(second, metric))


@dataclass(frozen=True, slots=True)
class Added:
    """Milliseconds that LiteLLM and Tidegate add to plain vLLM's time, in each round."""

    load: str
    metric: Metric
    litellm: Sequence[float]
    tidegate: Sequence[float]

    @property
    def ratio(self) -> float:
        """Tidegate's over LiteLLM's, of the medians; below 0 where Tidegate takes less than plain vLLM alone."""
        return statistics.median(self.tidegate) / statistics.median(self.litellm)


@dataclass(frozen=True, slots=True)
class SideBySide:
    """A result. `names`: of plain vLLM, of the proxy, of Tidegate."""

    names: Sequence[str]
    blocks: Sequence[Block]
    settings: Mapping[str, Any]
    machine: Mapping[str, Any]
    note: str

    def print(self) -> None:
        """The tables on stdout, as Markdown, under a line that says where they come from."""
        console = Console(width=_TABLE_WIDTH)
        plain, proxy, ours = self.names
        table = _table("load", "figure", *self.names, f"{proxy} / {plain}", f"{ours} / {plain}", f"{ours} / {proxy}")
        for block in self.blocks:
            for metric in block.metrics:
                figures = [f"{statistics.median(block.values(one, metric)):.4g}" for one in range(3)]
                ratios = [_ratio(block.row(metric, *pair)) for pair in ((1, 0), (2, 0), (2, 1))]
                table.add_row(block.load, f"{metric.label} {ARROWS[metric.better]}", *figures, *ratios)
        added = _table("load", "figure", f"{proxy} adds, ms", f"{ours} adds, ms", "ratio")
        for one in self.added():
            added.add_row(one.load, one.metric.label, _spread(one.litellm), _spread(one.tidegate), f"{one.ratio:.3f}")
        console.print(f"{datetime.now(UTC):%Y-%m-%d}; {_shown(self.settings)}; {_shown(self.machine)}", highlight=False)
        console.print(table)
        console.print(added)
        console.print(self.note, highlight=False)

    def added(self) -> Iterator[Added]:
        """What each way adds to the time of a request that is alone, or among others."""
        for block in self.blocks:
            for metric in block.metrics:
                if metric.key in _ADDED_TO:
                    plain, litellm, ours = (block.values(one, metric) for one in range(3))
                    yield Added(block.load, metric, _minus(litellm, plain), _minus(ours, plain))

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "compared": list(self.names),
            "settings": dict(self.settings),
            "machine": dict(self.machine),
            "rows": [self._row(block, metric) for block in self.blocks for metric in block.metrics],
            "added": [
                {
                    "load": one.load, "metric": one.metric.key, self.names[1]: statistics.median(one.litellm),
                    self.names[2]: statistics.median(one.tidegate), "ratio": one.ratio,
                }
                for one in self.added()
            ],
        }  # fmt: skip

    def _row(self, block: Block, metric: Metric) -> dict[str, Any]:
        medians = {name: statistics.median(block.values(one, metric)) for one, name in enumerate(self.names)}
        pairs = {"litellm_to_plain": (1, 0), "tidegate_to_plain": (2, 0), "tidegate_to_litellm": (2, 1)}
        compared = {
            name: {
                "ratio": statistics.median(row.ratios),
                "interval": median_interval(row.ratios),
                "verdict": row.verdict,
            }
            for name, pair in pairs.items()
            for row in [block.row(metric, *pair)]
        }
        return {"load": block.load, "metric": metric.key, "better": metric.better, **medians, **compared}


def _minus(these: Sequence[float], those: Sequence[float]) -> list[float]:
    return [this - that for this, that in zip(these, those, strict=True)]


def _ratio(row: Row) -> str:
    low, high = median_interval(row.ratios)
    return f"{statistics.median(row.ratios):.3g} ({low:.3g} to {high:.3g})"


def _spread(values: Sequence[float]) -> str:
    low, high = median_interval(values)
    return f"{statistics.median(values):.2f} ({low:.2f} to {high:.2f})"


def _shown(what: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in what.items())


def _table(*headings: str) -> Table:
    table = Table(box=box.MARKDOWN)
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="left" if number < 2 else "right", no_wrap=True)
    return table
