"""A load test's report: one HTML page with its plots inside, so that it can be sent around."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import jinja2

_TEMPLATE: Final = "load_report.html.jinja"
_COLOURS: Final = ("#0b7285", "#e8590c")
_WIDTH, _HEIGHT, _LEFT, _BOTTOM = 460.0, 200.0, 46.0, 26.0
_STEPS: Final = 200
# A curve to its last sample would be one long tail.
_SHOWN: Final = 0.99
_PLOTS: Final = (
    ("ttft", "Time to first token"),
    ("itl", "Time between tokens"),
    ("total", "Time to the whole answer"),
)


def write_report(said: Mapping[str, Any], turns: Sequence[Mapping[str, Mapping[str, Any]]]) -> str:
    """The page for all turns of all servers; each plot is the share of samples that took at most so many ms."""
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    urls = list(turns[0])
    plots = [
        {"title": title, "most_ms": most_ms, "curves": curves}
        for key, title in _PLOTS
        for most_ms, curves in [_curves([_pooled(turns, url, key) for url in urls])]
        if any(curves)
    ]
    rows = [{"url": url, "turn": number + 1, **both[url]} for number, both in enumerate(turns) for url in both]
    page = environment.get_template(_TEMPLATE)
    return page.render(
        said=said, urls=urls, rows=rows, plots=plots, colours=_COLOURS, width=_WIDTH, height=_HEIGHT, left=_LEFT,
        bottom=_BOTTOM,
    )  # fmt: skip


def _pooled(turns: Sequence[Mapping[str, Mapping[str, Any]]], url: str, key: str) -> list[float]:
    return sorted(value for both in turns for value in both[url]["samples"][key])


def _curves(servers: Sequence[Sequence[float]]) -> tuple[float, list[str]]:
    """The right end of the axis in ms, and the points of each server's curve as SVG takes them."""
    most_ms = max((values[int(_SHOWN * (len(values) - 1))] for values in servers if values), default=0.0)
    return most_ms, [_points(values, most_ms) for values in servers]


def _points(values: Sequence[float], most_ms: float) -> str:
    if not values or not most_ms:
        return ""
    points = []
    for step in range(_STEPS + 1):
        at = min(round(step / _STEPS * len(values)), len(values) - 1)
        x = _LEFT + min(values[at] / most_ms, 1.0) * (_WIDTH - _LEFT)
        points.append(f"{x:.1f},{(1 - step / _STEPS) * (_HEIGHT - _BOTTOM):.1f}")
    return " ".join(points)
