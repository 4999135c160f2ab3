"""What the replayed turns of long chats come to: figures, bars, tables and a plot."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Final
from xml.sax.saxutils import escape

from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.comparison import Better, Metric, machine

TIDEGATE: Final = "tidegate"
SLICING: Final = "token slicing"
DROP_OLDEST: Final = "drop-oldest"
WAYS: Final = (TIDEGATE, SLICING, DROP_OLDEST)

_HIT: Final = Metric("prefix_hit_ratio", "prefix hit rate", "higher")
_PREFILL: Final = Metric("prefill_tokens", "prefill, tokens/turn", "lower")
_TTFT: Final = Metric("ttft_p50_ms", "TTFT p50, ms", "lower")
_HISTORY: Final = Metric("prompt_tokens", "history kept, tokens/turn", "higher")
_METRICS: Final = (
    _HIT,
    _PREFILL,
    _HISTORY,
    _TTFT,
    Metric("ttft_p90_ms", "TTFT p90, ms", "lower"),
    Metric("cutting_turns_ratio", "turns in which the cut moves", "lower"),
    Metric("cutting_ttft_p50_ms", "TTFT p50 of those, ms", "lower"),
    Metric("cutting_ttft_p90_ms", "TTFT p90 of those, ms", "lower"),
    Metric("other_ttft_p50_ms", "TTFT p50 of the others, ms", "lower"),
    Metric("other_ttft_p90_ms", "TTFT p90 of the others, ms", "lower"),
)
_ARROWS: Final[Mapping[Better, str]] = {"higher": "↑", "lower": "↓"}
_TABLE_WIDTH: Final = 160
_LONG_WINDOW: Final = 8192
_COLOURS: Final = ("#0072b2", "#d55e00", "#7f7f7f")  # told apart by colour-blind readers too

Figures = Mapping[str, float | None]


@dataclass(frozen=True, slots=True)
class Turn:
    """One question past the window, asked in one way.

    `whole_messages` is the length of the history, and `kept_messages` what the model saw of it, None where tokens are
    sliced. `cutting`: the prompt begins elsewhere than that of the turn before.
    """

    conversation: int
    kind: str
    turn: int
    way: str
    ttft_s: float
    prompt_tokens: int
    cached_tokens: int
    whole_messages: int
    kept_messages: int | None
    cutting: bool

    @property
    def prefill_tokens(self) -> int:
        return self.prompt_tokens - self.cached_tokens


@dataclass(frozen=True, slots=True)
class Bar:
    """What Tidegate's figure, or its ratio to each of `against`, is expected to reach."""

    metric: Metric
    limit: float
    against: Sequence[str] = ()

    def met(self, figures: Mapping[str, Figures]) -> bool:
        """Whether it is reached. False where a figure is missing."""
        ours = figures[TIDEGATE][self.metric.key]
        reached = [ratio(ours, figures[way][self.metric.key]) for way in self.against] if self.against else [ours]
        if self.metric.better == "higher":
            return all(value is not None and value >= self.limit for value in reached)
        return all(value is not None and value <= self.limit for value in reached)

    def __str__(self) -> str:
        of = f" of {'both' if len(self.against) > 1 else self.against[0]}" if self.against else ""
        return f"{'≥' if self.metric.better == 'higher' else '≤'} {self.limit:.3g}{of}"


def bars(window: int) -> tuple[Bar, ...]:
    """The bars, which were set for windows of 2,048 and of 8,192 tokens; others get those of the nearer one below."""
    long = window >= _LONG_WINDOW
    return (
        Bar(_HIT, 0.75 if long else 0.70),
        Bar(_PREFILL, 0.40, (DROP_OLDEST,)),
        Bar(_TTFT, 1 / 10 if long else 1 / 6, (SLICING, DROP_OLDEST)),
        Bar(_HISTORY, 0.85, (DROP_OLDEST,)),
    )


def ratio(ours: float | None, theirs: float | None) -> float | None:
    """None where there is nothing to compare."""
    return None if ours is None or not theirs else ours / theirs


def figures_of(turns: Iterable[Turn]) -> dict[str, Figures]:
    """The figures of each way. A ratio of sums, as the prefix hit rate is, gives long prompts their weight."""
    asked = list(turns)
    return {way: _figures([turn for turn in asked if turn.way == way]) for way in WAYS}


def _figures(turns: Sequence[Turn]) -> Figures:
    prompts = sum(turn.prompt_tokens for turn in turns)
    cutting = [turn for turn in turns if turn.cutting]
    return {
        "turns": len(turns),
        "prefix_hit_ratio": sum(turn.cached_tokens for turn in turns) / prompts,
        "prefill_tokens": statistics.mean(turn.prefill_tokens for turn in turns),
        "prompt_tokens": prompts / len(turns),
        "cutting_turns_ratio": len(cutting) / len(turns),
        **_ttfts("", turns),
        **_ttfts("cutting_", cutting),
        **_ttfts("other_", [turn for turn in turns if not turn.cutting]),
    }


def _ttfts(name: str, turns: Sequence[Turn]) -> dict[str, float | None]:
    ordered = sorted(turn.ttft_s * 1000 for turn in turns)
    p90 = ordered[math.ceil(0.9 * len(ordered)) - 1] if ordered else None
    return {f"{name}ttft_p50_ms": statistics.median(ordered) if ordered else None, f"{name}ttft_p90_ms": p90}


@dataclass(frozen=True, slots=True)
class Report:
    """A run's result. `notes` are sentences for the reader, `settings` what all contenders were given."""

    window: int
    settings: Mapping[str, Any]
    turns: Sequence[Turn]
    notes: Sequence[str]

    def print(self) -> None:
        """The tables on stdout, as Markdown."""
        console = Console(width=_TABLE_WIDTH)
        console.print(self._overall())
        if len(self._kinds()) > 1:
            console.print(self._by_kind())
        for note in ("↑ higher is better, ↓ lower is better.", *self.notes):
            console.print(note, highlight=False)

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        figures = figures_of(self.turns)
        return {
            "settings": dict(self.settings),
            "machine": machine(),
            "figures": figures,
            "ratios": {
                way: {m.key: ratio(figures[TIDEGATE][m.key], figures[way][m.key]) for m in _METRICS}
                for way in (SLICING, DROP_OLDEST)
            },
            "bars": [{"metric": bar.metric.key, "bar": str(bar), "met": bar.met(figures)} for bar in bars(self.window)],
            "kinds": {kind: figures_of(turns) for kind, turns in self._kinds().items()},
            "turns": [asdict(turn) for turn in self.turns],
            "notes": list(self.notes),
        }

    def _overall(self) -> Table:
        figures = figures_of(self.turns)
        limits = {bar.metric.key: bar for bar in bars(self.window)}
        table = _table(("figure",), (*WAYS, f"/ {SLICING}", f"/ {DROP_OLDEST}"), ("bar", "met"))
        for metric in _METRICS:
            values = [figures[way][metric.key] for way in WAYS]
            ratios = [ratio(values[0], value) for value in values[1:]]
            bar = limits.get(metric.key)
            held = ("", "") if bar is None else (str(bar), "yes" if bar.met(figures) else "no")
            table.add_row(f"{metric.label} {_ARROWS[metric.better]}", *map(_shown, values + ratios), *held)
        return table

    def _by_kind(self) -> Table:
        ratios = (f"prefill / {DROP_OLDEST}", f"TTFT p50 / {SLICING}", f"TTFT p50 / {DROP_OLDEST}")
        hits = tuple(f"hit rate, {way}" for way in WAYS)
        table = _table(("conversations",), ("turns", *hits, *ratios))
        for kind, turns in self._kinds().items():
            figures = figures_of(turns)
            ours = figures[TIDEGATE]
            compared = ((_PREFILL, DROP_OLDEST), (_TTFT, SLICING), (_TTFT, DROP_OLDEST))
            against = [ratio(ours[metric.key], figures[way][metric.key]) for metric, way in compared]
            table.add_row(kind, *map(_shown, [ours["turns"], *(figures[way][_HIT.key] for way in WAYS), *against]))
        return table

    def _kinds(self) -> dict[str, list[Turn]]:
        kinds: dict[str, list[Turn]] = {}
        for turn in self.turns:
            kinds.setdefault(turn.kind, []).append(turn)
        return kinds


def _table(words: Sequence[str], numbers: Sequence[str], more_words: Sequence[str] = ()) -> Table:
    table = Table(box=box.MARKDOWN)
    for heading in words:
        table.add_column(heading)
    for heading in numbers:
        table.add_column(heading, justify="right")
    for heading in more_words:
        table.add_column(heading)
    return table


def _shown(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


_WIDTH: Final = 960
_HEIGHT: Final = 400
_LEFT: Final = 64
_RIGHT: Final = _WIDTH - 16
_TOP: Final = 56
_BOTTOM: Final = _HEIGHT - 44
_GRID_LINES: Final = 5
_GRID_STEPS: Final = (1, 2, 2.5, 5, 10)


def plot(turns: Sequence[Turn], title: str, file: Path) -> None:
    """Draw each way's prefill tokens, turn by turn, into an SVG file; a dotted line parts two conversations."""
    file.write_text("\n".join(_drawn(turns, title)), encoding="utf-8")


def _drawn(turns: Sequence[Turn], title: str) -> Iterable[str]:
    series = {way: [turn for turn in turns if turn.way == way] for way in WAYS}
    count = len(series[TIDEGATE])
    longest = max(turn.prefill_tokens for turn in turns)
    power = 10.0 ** math.floor(math.log10(longest / _GRID_LINES))
    highest = _GRID_LINES * next(power * step for step in _GRID_STEPS if power * step * _GRID_LINES >= longest)

    def x(place: float) -> float:
        return _LEFT + (_RIGHT - _LEFT) * (place + 0.5) / count

    def y(tokens: float) -> float:
        return _BOTTOM - (_BOTTOM - _TOP) * tokens / highest

    yield (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" '
        'font-family="sans-serif" font-size="12" fill="#222">'
    )
    yield '<rect width="100%" height="100%" fill="#fff"/>'
    yield f'<text x="{_LEFT}" y="20" font-size="15">{escape(title)}</text>'
    yield f'<text x="{(_LEFT + _RIGHT) / 2}" y="{_HEIGHT - 12}" text-anchor="middle">turns past the window</text>'
    for line in range(_GRID_LINES + 1):
        tokens = highest * line / _GRID_LINES
        yield f'<path d="M{_LEFT} {y(tokens):.1f}H{_RIGHT}" stroke="#ddd"/>'
        yield f'<text x="{_LEFT - 8}" y="{y(tokens) + 4:.1f}" text-anchor="end">{tokens:,.0f}</text>'
    for place, (before, after) in enumerate(pairwise(series[TIDEGATE])):
        if before.conversation != after.conversation:
            yield f'<path d="M{x(place + 0.5):.1f} {_TOP}V{_BOTTOM}" stroke="#999" stroke-dasharray="2 3"/>'
    for number, (way, colour) in enumerate(zip(reversed(WAYS), reversed(_COLOURS), strict=True)):
        points = " ".join(f"{x(i):.1f},{y(turn.prefill_tokens):.1f}" for i, turn in enumerate(series[way]))
        yield f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>'
        yield f'<text x="{_LEFT + 140 * (len(WAYS) - 1 - number)}" y="42" fill="{colour}">● {escape(way)}</text>'
    yield "</svg>"
