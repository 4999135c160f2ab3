"""Reads figures back out of the metrics, for the operator's overview: what is counted is counted once."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from prometheus_client import CollectorRegistry
from prometheus_client.samples import Sample

from server.telemetry.merging import MergedRegistry

_PARTS = ("bucket", "sum")


@dataclass(frozen=True, slots=True)
class Distribution:
    """A histogram as it stands. `counts[i]` are the observations up to `bounds[i]`, whose last one is infinite."""

    bounds: tuple[float, ...]
    counts: tuple[float, ...]
    sum: float


@dataclass(frozen=True, slots=True)
class Reading:
    """The samples of one moment, by name."""

    samples: Mapping[str, Sequence[Sample]]

    def total(self, name: str, **labels: str) -> float | None:
        """The sum of the samples that carry these labels; None where nobody counts them."""
        found = [sample.value for sample in self.samples.get(name, ()) if labels.items() <= sample.labels.items()]
        return sum(found) if found else None

    def by(self, name: str, label: str) -> dict[str, float]:
        """The sums of a metric by one of its labels."""
        sums: defaultdict[str, float] = defaultdict(float)
        for sample in self.samples.get(name, ()):
            sums[sample.labels[label]] += sample.value
        return dict(sums)

    def distribution(self, name: str) -> Distribution | None:
        """A histogram over all of its labels; None where nobody measures it."""
        counts = {float(bound): count for bound, count in self.by(f"{name}_bucket", "le").items()}
        if not counts:
            return None
        bounds = tuple(sorted(counts))
        return Distribution(bounds, tuple(counts[bound] for bound in bounds), self.total(f"{name}_sum") or 0.0)


class Readings:
    """Some metrics of a registry, named once, read as often as somebody looks."""

    def __init__(
        self, registry: CollectorRegistry | MergedRegistry, counters: Iterable[str], histograms: Iterable[str]
    ) -> None:
        self._registry = registry
        self._names = {*counters, *(f"{name}_{part}" for name in histograms for part in _PARTS)}

    def take(self) -> Reading:
        """The samples as they stand. Metrics that are not named are not collected."""
        samples: defaultdict[str, list[Sample]] = defaultdict(list)
        for metric in self._registry.restricted_registry(self._names).collect():
            for sample in metric.samples:
                samples[sample.name].append(sample)
        return Reading(samples)
