"""How many replicas there should be, by the wait for the engine: the figure that the Helm chart goes by too.

Ray asks each replica for its figures now and then, keeps them for `look_back_period_s`, and runs the policy on them
in a process of its own. That one has none of our modules, so the policy uses nothing from outside this one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import ceil, inf
from typing import Any, Final, Protocol

from server.telemetry.readings import Reading

WAIT: Final = "tidegate_queue_wait_seconds"
_BUCKET: Final = f"{WAIT}_bucket"
_BATCH: Final = "batch"  # waits on purpose
_QUANTILE: Final = 0.9
_TOLERANCE: Final = 0.1  # that of Kubernetes' HorizontalPodAutoscaler


class Stamped(Protocol):
    """A figure at a moment, as Ray keeps it."""

    @property
    def value(self) -> float: ...


class Context(Protocol):
    """What we use of Ray's `AutoscalingContext`: the figures by name and by replica, each in the order of time."""

    @property
    def current_num_replicas(self) -> int: ...

    @property
    def target_num_replicas(self) -> int: ...

    @property
    def raw_metrics(self) -> Mapping[str, Mapping[Any, Sequence[Stamped]]]: ...


def wait_counts(reading: Reading) -> dict[str, float]:
    """A replica's figures: how many requests have waited so long at most, by `name:seconds`, batch work left out."""
    counts: dict[str, float] = {}
    for sample in reading.samples.get(_BUCKET, ()):
        if sample.labels["class"] != _BATCH:
            name = f"{WAIT}:{float(sample.labels['le'])}"
            counts[name] = counts.get(name, 0.0) + sample.value
    return counts


class QueueWait:
    """Ray's policy. `seconds`: what nine of ten requests may wait; above it there should be more replicas."""

    def __init__(self, seconds: float = 2.0) -> None:
        self._seconds = seconds

    def __call__(self, context: Context) -> tuple[float, dict[str, Any]]:
        """The number of replicas wanted; Ray applies its delays and bounds to it."""
        wait_s = quantile(_QUANTILE, _waited_within(context.raw_metrics))
        return wanted(context.current_num_replicas, context.target_num_replicas, wait_s / self._seconds), {}


def _waited_within(figures: Mapping[str, Mapping[Any, Sequence[Stamped]]]) -> dict[float, float]:
    """How many requests have waited so long at most over all replicas, by seconds, in the time that Ray keeps."""
    counts: dict[float, float] = {}
    for name, by_replica in figures.items():
        metric, _, seconds = name.rpartition(":")
        if metric == WAIT:
            counts[float(seconds)] = sum(_growth(series) for series in by_replica.values())
    return counts


def _growth(series: Sequence[Stamped]) -> float:
    return series[-1].value - series[0].value if series else 0.0


def wanted(running: int, target: int, ratio: float) -> int:
    """The replicas there should be, of which `target` are ordered, where `ratio` is the wait over the wait to keep.

    The rule of Kubernetes' HorizontalPodAutoscaler, one replica at a time. While one is on its way none is added: it
    loads its model for minutes, perhaps, and the wait stays long until it has.
    """
    desired = ceil(running * ratio)
    if abs(ratio - 1) <= _TOLERANCE or desired == running:
        return target
    return max(target, running + 1) if desired > running else target - 1


def quantile(share: float, counts: Mapping[float, float]) -> float:
    """The value that this share of the observations does not exceed, by cumulative counts; 0 if there are none.

    As Prometheus' `histogram_quantile`: linear inside a bucket, and the highest finite bound for what lies above it.
    """
    bounds = sorted(counts)
    if not bounds or counts[bounds[-1]] <= 0:
        return 0.0
    rank, lower, below = share * counts[bounds[-1]], 0.0, 0.0
    for bound in bounds:
        if counts[bound] >= rank:
            return lower if bound == inf else lower + (bound - lower) * (rank - below) / (counts[bound] - below)
        lower, below = bound, counts[bound]
    return lower
