"""The overload benchmark's figures: per turn, as a table, as curves, and as the few numbers that sum it up."""

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.open_loop import Outcome, Run

OURS: Final = "tidegate"
TUNED: Final = "tuned"
_TABLE_WIDTH: Final = 220
_COLOURS: Final[Mapping[str, str]] = {"plain": "#b04a3a", TUNED: "#c99a2e", OURS: "#2a6f97"}
_PAIR: Final = 2
# A client that was told to go away after this time has waited for it.
_ON_ARRIVAL_S: Final = 0.5
_WIDTH: Final = 640
_HEIGHT: Final = 360
_MARGIN: Final = 50


@dataclass(frozen=True, slots=True)
class Objective:
    """When an answer counts: seconds to the first token, and seconds per token after it."""

    ttft_s: float
    tpot_s: float


@dataclass(slots=True)
class Measured:
    """One turn of one server. `load` 0 is the light tenant alone; `callers` are who asked."""

    server: str
    load: float
    burstiness: float
    duration_s: float
    callers: tuple[str, ...]
    turn: Run
    preemptions: int = 0

    def good(self, slo: Objective) -> list[Outcome]:
        return [outcome for outcome in self.turn.outcomes if outcome.within(slo.ttft_s, slo.tpot_s)]

    def goodput_per_s(self, slo: Objective) -> float:
        return len(self.good(slo)) / self.duration_s

    def of(self, caller: str) -> list[Outcome]:
        return [outcome for outcome in self.turn.outcomes if outcome.arrival.caller.name == caller]

    def ratio_within(self, caller: str, slo: Objective) -> float | None:
        """The share of a caller's requests that were answered in time."""
        asked = self.of(caller)
        return sum(outcome.within(slo.ttft_s, slo.tpot_s) for outcome in asked) / len(asked) if asked else None

    def as_dict(self, slo: Objective) -> dict[str, Any]:
        """For `--json`."""
        outcomes = self.turn.outcomes
        endings = {name: sum(o.ending == name for o in outcomes) for name in ("refused", "failed", "unfinished")}
        callers = sorted({outcome.arrival.caller.name for outcome in outcomes})
        return {
            "server": self.server,
            "callers": self.callers,
            "load": self.load,
            "burstiness": self.burstiness,
            "arrivals": len(outcomes),
            "goodput_per_s": self.goodput_per_s(slo),
            "answered": sum(outcome.ending == "answered" for outcome in outcomes),
            **endings,
            "preemptions": self.preemptions,
            "ttft_p50_s": percentile(_ttfts(outcomes), 50),
            "ttft_p99_s": percentile(_ttfts(outcomes), 99),
            "tpot_p50_s": percentile(_tpots(outcomes), 50),
            "refusal_p50_s": percentile(_refusals(outcomes), 50),
            "refusal_p99_s": percentile(_refusals(outcomes), 99),
            "by_caller": {
                name: {
                    "arrivals": len(self.of(name)),
                    "within_slo": self.ratio_within(name, slo),
                    "ttft_p99_s": percentile(_ttfts(self.of(name)), 99),
                }
                for name in callers
            },
            "generator_cpu_ratio": self.turn.generator_cpu_s / self.turn.wall_s,
            "generator_late_p99_s": percentile([outcome.late_s for outcome in outcomes], 99),
        }


def percentile(values: Iterable[float], percent: float) -> float | None:
    """The nearest-rank percentile."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(percent / 100 * len(ordered)) - 1)] if ordered else None


def headline(measured: Sequence[Measured], slo: Objective) -> dict[str, float | None]:
    """The numbers that sum it up; None where the turns that they need were not run."""

    def goodput(server: str, load: float) -> float | None:
        return _mean(m.goodput_per_s(slo) for m in _steady(measured, server, load))

    ours_4x = _steady(measured, OURS, 4.0)
    light_alone = [t for m in measured if (m.server, m.load) == (OURS, 0.0) for t in _ttfts(m.of("light"))]
    pairs = [m for m in measured if m.server == OURS and len(m.callers) == _PAIR]
    light_beside = [t for m in pairs for t in _ttfts(m.of("light"))]
    refusals_s = [t for m in ours_4x for t in _refusals(m.turn.outcomes)]
    ours = [m for m in measured if m.server == OURS]
    return {
        "goodput_1x": goodput(OURS, 1.0),
        "goodput_4x_over_1x": _ratio(goodput(OURS, 4.0), goodput(OURS, 1.0)),
        "goodput_2x_over_plain": _ratio(goodput(OURS, 2.0), goodput("plain", 2.0)),
        "goodput_2x_over_tuned": _ratio(goodput(OURS, 2.0), goodput(TUNED, 2.0)),
        "goodput_4x_over_tuned": _ratio(goodput(OURS, 4.0), goodput(TUNED, 4.0)),
        "goodput_half_over_plain": _ratio(goodput(OURS, 0.5), goodput("plain", 0.5)),
        "critical_slo_ratio_4x": _mean(r for m in ours_4x if (r := m.ratio_within("critical", slo)) is not None),
        "alone_slo_ratio": _mean(r for m in ours if m.load == 0.0 and (r := m.ratio_within("light", slo)) is not None),
        "light_slo_ratio_4x": _mean(r for m in ours_4x if (r := m.ratio_within("light", slo)) is not None),
        "light_tenant_p99_ratio": _ratio(percentile(light_beside, 99), percentile(light_alone, 99)),
        "refusal_p50_s_4x": percentile(refusals_s, 50),
        "refusal_p99_s_4x": percentile(refusals_s, 99),
        "refusal_on_arrival_p99_s_4x": percentile([t for t in refusals_s if t <= _ON_ARRIVAL_S], 99),
        "refused_after_a_wait_ratio_4x": _mean(float(t > _ON_ARRIVAL_S) for t in refusals_s),
        "preemptions": float(sum(m.preemptions for m in ours)) if ours else None,
        "preemptions_plain": float(sum(m.preemptions for m in measured if m.server == "plain")),
        "generator_cpu_ratio": max((m.turn.generator_cpu_s / m.turn.wall_s for m in measured), default=None),
    }


def print_table(measured: Sequence[Measured], slo: Objective) -> None:
    """Every turn on stdout, as Markdown."""
    table = Table(box=box.MARKDOWN)
    columns: dict[str, Callable[[dict[str, Any]], Any]] = {
        "server": lambda row: row["server"],
        "load": lambda row: f"{row['load']:g}x",
        "asked by": lambda row: "all" if len(row["callers"]) > _PAIR else " and ".join(row["callers"]),
        "gaps": lambda row: "bursts" if row["burstiness"] > 1 else "Poisson",
        "arrivals": lambda row: row["arrivals"],
        "goodput/s": lambda row: row["goodput_per_s"],
        "refused": lambda row: row["refused"],
        "TTFT p50 s": lambda row: row["ttft_p50_s"],
        "TTFT p99 s": lambda row: row["ttft_p99_s"],
        "TPOT p50 s": lambda row: row["tpot_p50_s"],
        "critical in time": lambda row: row["by_caller"].get("critical", {}).get("within_slo"),
        "light TTFT p99 s": lambda row: row["by_caller"].get("light", {}).get("ttft_p99_s"),
        "refusal p99 s": lambda row: row["refusal_p99_s"],
        "preemptions": lambda row: row["preemptions"],
    }
    for heading in columns:
        table.add_column(heading, justify="left" if heading == "server" else "right", no_wrap=True)
    servers = list(dict.fromkeys(m.server for m in measured))
    for turn in sorted(measured, key=lambda m: servers.index(m.server)):
        row = turn.as_dict(slo)
        table.add_row(*(_shown(cell(row)) for cell in columns.values()))
    console = Console(width=_TABLE_WIDTH)
    console.print(table)
    console.print(f"In time: first token within {slo.ttft_s:g} s, {slo.tpot_s:.3g} s per token.", highlight=False)


def write_curves(measured: Sequence[Measured], slo: Objective) -> str:
    """Goodput over load as an SVG."""
    points = {
        server: [(load, value) for load in _loads(measured) if (value := _at(measured, slo, server, load)) is not None]
        for server in dict.fromkeys(m.server for m in measured)
    }
    most = max((value for line in points.values() for _, value in line), default=1.0) or 1.0
    widest = max(_loads(measured), default=1.0)

    def spot(load: float, value: float) -> str:
        x = _MARGIN + load / widest * (_WIDTH - 2 * _MARGIN)
        return f"{x:.1f},{_HEIGHT - _MARGIN - value / most * (_HEIGHT - 2 * _MARGIN):.1f}"

    lines = [
        f'<polyline fill="none" stroke="{_COLOURS.get(server, "#555")}" stroke-width="2" '
        f'points="{" ".join(spot(*point) for point in line)}"/>'
        f'<text x="{_MARGIN + 10}" y="{_MARGIN + 16 * number}" fill="{_COLOURS.get(server, "#555")}">{server}</text>'
        for number, (server, line) in enumerate(points.items())
    ]
    ticks = [
        f'<text x="{spot(load, 0).split(",")[0]}" y="{_HEIGHT - _MARGIN + 18}" text-anchor="middle">{load:g}x</text>'
        for load in _loads(measured)
    ]
    axes = (
        f'<path d="M{_MARGIN},{_MARGIN} V{_HEIGHT - _MARGIN} H{_WIDTH - _MARGIN}" fill="none" stroke="#333"/>'
        f'<text x="{_MARGIN}" y="{_MARGIN - 12}">answers in time per second (top: {most:.2f})</text>'
        f'<text x="{_WIDTH // 2}" y="{_HEIGHT - 10}" text-anchor="middle">load, in multiples of the capacity</text>'
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" font-family="sans-serif" '
        f'font-size="13">{axes}{"".join(ticks)}{"".join(lines)}</svg>\n'
    )


def _steady(measured: Sequence[Measured], server: str, load: float) -> list[Measured]:
    all_callers = [m for m in measured if len(m.callers) > _PAIR]
    return [m for m in all_callers if (m.server, m.load, m.burstiness) == (server, load, 1.0)]


def _at(measured: Sequence[Measured], slo: Objective, server: str, load: float) -> float | None:
    return _mean(m.goodput_per_s(slo) for m in _steady(measured, server, load))


def _loads(measured: Sequence[Measured]) -> list[float]:
    return sorted({m.load for m in measured if m.load})


def _ttfts(outcomes: Iterable[Outcome]) -> list[float]:
    return [outcome.ttft_s for outcome in outcomes if outcome.ttft_s is not None]


def _tpots(outcomes: Iterable[Outcome]) -> list[float]:
    return [outcome.tpot_s for outcome in outcomes if outcome.tpot_s is not None]


def _refusals(outcomes: Iterable[Outcome]) -> list[float]:
    """How long refused clients waited for their refusal, from when they sent it."""
    return [o.total_s - o.late_s for o in outcomes if o.ending == "refused" and o.total_s is not None]


def _mean(values: Iterable[float]) -> float | None:
    known = list(values)
    return statistics.fmean(known) if known else None


def _ratio(part: float | None, whole: float | None) -> float | None:
    """None where one of them is; nothing at all counts as one in a thousand, so that JSON can hold the ratio."""
    if part is None or whole is None:
        return None
    return part / max(whole, 0.001)


def _shown(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else "" if value is None else str(value)
