"""What two snapshots of `/admin/overview` say together: counters become rates, histograms become quantiles."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Snapshot = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Spread:
    """Seconds; None where nothing was observed."""

    p50_s: float | None
    p95_s: float | None


@dataclass(frozen=True, slots=True)
class Figures:
    """Per second, between two snapshots; None where nobody counts."""

    prompt_tokens: float | None
    completion_tokens: float | None
    requests: Mapping[str, float]
    ttft: Spread
    itl: Spread
    queue_wait: Spread


def figures_between(before: Snapshot, after: Snapshot) -> Figures:
    """The figures of the time between two snapshots. A counter that has fallen began anew with a new engine."""
    seconds = max(after["taken_at_s"] - before["taken_at_s"], 1e-3)
    old, new = before["counters"], after["counters"]

    def per_second(name: str) -> float | None:
        change = _growth(old[name], new[name])
        return None if change is None else change / seconds

    by_status = new["requests_by_status"]
    return Figures(
        prompt_tokens=per_second("prompt_tokens"),
        completion_tokens=per_second("completion_tokens"),
        requests={
            group: (_growth(old["requests_by_status"].get(group, 0), count) or 0.0) / seconds
            for group, count in by_status.items()
        },
        ttft=_spread(before, after, "ttft_s"),
        itl=_spread(before, after, "itl_s"),
        queue_wait=_spread(before, after, "queue_wait_s"),
    )


def _growth(before: float | None, after: float | None) -> float | None:
    if after is None:
        return None
    return after if before is None or after < before else after - before


def _spread(before: Snapshot, after: Snapshot, name: str) -> Spread:
    old, new = before["histograms"][name], after["histograms"][name]
    if new is None:
        return Spread(None, None)
    counts = new["counts"]
    if old is not None and len(old["counts"]) == len(counts) and old["counts"][-1] <= counts[-1]:
        counts = [count - seen for count, seen in zip(counts, old["counts"], strict=True)]
    return Spread(quantile(new["bounds"], counts, 0.5), quantile(new["bounds"], counts, 0.95))


def quantile(bounds: list[float | None], counts: list[int], share: float) -> float | None:
    """The value below which a share of the observations lies, by a straight line inside its bucket.

    `counts` are cumulative, and the last bound is None, for infinity: what lies there is put at the bound before it.
    """
    total = counts[-1]
    if not total:
        return None
    rank = share * total
    place = next(i for i, count in enumerate(counts) if count >= rank)
    low, under = ((bounds[place - 1] or 0.0), counts[place - 1]) if place else (0.0, 0)
    high = bounds[place]
    if high is None or counts[place] == under:
        return low
    return low + (high - low) * (rank - under) / (counts[place] - under)
