"""The figures of several processes as one: what they count is summed, and a state is told by whoever knows it."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Final, Literal

import msgspec
from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

from server.telemetry.tenants import TenantCounts, TenantMetrics

# A sample's name, then the names and the values of its labels by turns.
Key = tuple[str, ...]
Rule = Literal["sum", "max", "min", "own"]

_COUNTED: Final = frozenset({"counter", "histogram", "summary"})
_CREATED: Final = "_created"
_VLLM: Final = "vllm:"
# `own`: the first process alone knows it.
GAUGE_RULES: Final[Mapping[str, Rule]] = {
    "process_max_fds": "own",
    "process_open_fds": "sum",
    "process_resident_memory_bytes": "sum",
    "process_start_time_seconds": "own",
    "process_virtual_memory_bytes": "sum",
    "python_info": "own",
    "tidegate_batch_lines_in_flight": "own",
    "tidegate_batch_lines_pending": "own",
    "tidegate_batch_queue_age_seconds": "own",
    "tidegate_batches_open": "own",
    "tidegate_build_info": "own",
    "tidegate_decode_tokens_per_second": "own",
    "tidegate_degradation_level": "own",
    "tidegate_degradation_pressure_ratio": "own",
    "tidegate_engine_up": "own",
    "tidegate_event_loop_tasks": "sum",
    "tidegate_expected_growth_ratio": "own",
    "tidegate_fallback_up": "min",  # every process has its own circuit breakers, and an open one is what matters
    "tidegate_kv_capacity_tokens": "own",
    "tidegate_kv_reserved_tokens": "own",
    "tidegate_kv_used_tokens": "own",
    "tidegate_limits_local": "max",  # one process that limits alone is what matters
    "tidegate_objective_tpot_seconds": "own",
    "tidegate_objective_ttft_seconds": "own",
    "tidegate_prefill_tokens_per_second": "own",
    "tidegate_queue_age_seconds": "own",
    "tidegate_requests_running": "own",
    "tidegate_requests_waiting": "own",
    "tidegate_running_cap": "own",
    "tidegate_step_seconds": "own",
}
_PAIRWISE: Final[Mapping[Rule, Callable[[float, float], float]]] = {"sum": operator.add, "max": max, "min": min}


class Family(msgspec.Struct, array_like=True, frozen=True):
    """One metric of one process as it stands."""

    name: str
    documentation: str
    type: str
    samples: dict[Key, float]


class Snapshot(msgspec.Struct, array_like=True, frozen=True):
    """All figures of one process."""

    families: list[Family]
    tenants: TenantCounts


@dataclass(frozen=True, slots=True)
class _Other:
    """What another process has told last."""

    families: Mapping[str, Family]
    tenants: TenantCounts


_encode: Final = msgspec.msgpack.Encoder().encode
_decode: Final = msgspec.msgpack.Decoder(Snapshot).decode


def snapshot(registry: Collector, tenants: TenantMetrics) -> bytes:
    """This process's figures, for the process that shows them."""
    return _encode(Snapshot(list(_families(registry.collect()).values()), tenants.counts))


class MergedRegistry:
    """Reads like a registry: the metrics of this process, and those of others as they have told them last.

    What is counted never goes backwards: if a process ends, or counts anew with the next engine, what it had counted
    until then stays in the sums. Before another process has told anything, this is the own registry.
    """

    def __init__(self, registry: CollectorRegistry, tenants: TenantMetrics) -> None:
        self._registry = registry
        self._tenants = tenants
        self._own: Mapping[str, Family] = {}
        self._others: dict[str, _Other] = {}
        self._past: dict[str, Family] = {}

    def told(self, process: str, data: bytes) -> None:
        """Take another process's snapshot. A process that follows on a dead one has a name of its own."""
        decoded = _decode(data)
        now = _Other({family.name: family for family in decoded.families}, decoded.tenants)
        if (before := self._others.get(process)) is not None:
            self._keep_what_began_anew(before.families, now.families)
        self._others[process] = now

    def gone(self, process: str) -> None:
        """A process has ended: what it counted stays, and its states do not."""
        if (last := self._others.pop(process, None)) is not None:
            self._keep_what_began_anew(last.families, {})
            self._tenants.add(last.tenants)

    def tenants_page(self) -> str:
        """The tenants' part of the page."""
        return self._tenants.page([other.tenants for other in self._others.values()])

    def collect(self) -> Iterator[Metric]:
        """Every metric."""
        if self._alone:
            yield from self._registry.collect()
            return
        own = _families(self._registry.collect())
        self._keep_what_began_anew(self._own, own)
        self._own = own
        yield from self._merged(own, None)

    def restricted_registry(self, names: Iterable[str]) -> Collector:
        """What collects only the samples of these names, as the method of a registry does."""
        wanted = frozenset(names)
        restricted = self._registry.restricted_registry(wanted)
        if self._alone:
            return restricted
        return _Collecting(lambda: self._merged(_families(restricted.collect()), wanted))

    @property
    def _alone(self) -> bool:
        return not self._others and not self._past

    def _keep_what_began_anew(self, before: Mapping[str, Family], now: Mapping[str, Family]) -> None:
        for name, family in before.items():
            if family.type in _COUNTED and _began_anew(family, now.get(name)):
                kept = [self._past[name], family] if name in self._past else [family]
                self._past[name] = _folded(kept, operator.add)

    def _merged(self, mine: Mapping[str, Family], wanted: frozenset[str] | None) -> Iterator[Metric]:
        """One metric for each name, with the samples whose names are wanted."""
        past = _only(self._past, wanted)
        theirs = [_only(other.families, wanted) for other in self._others.values()]
        for name in dict.fromkeys(chain(mine, *theirs, past)):
            own = mine.get(name)
            told = [families[name] for families in (mine, *theirs, past) if name in families]
            how = operator.add if told[0].type in _COUNTED else _PAIRWISE.get(_rule_of(name))
            family = own if how is None else _folded(told, how)
            if family is not None:
                yield _metric(family)


class _Collecting(Collector):
    """Collects when it is asked to."""

    def __init__(self, collect: Callable[[], Iterator[Metric]]) -> None:
        self._collect = collect

    def collect(self) -> Iterator[Metric]:
        return self._collect()


def _rule_of(gauge: str) -> Rule:
    """How a gauge is made one. vLLM's are of the engine, whose scheduler reports to the first process."""
    return GAUGE_RULES.get(gauge, "own" if gauge.startswith(_VLLM) else "sum")


def _began_anew(before: Family, now: Family | None) -> bool:
    """Whether a metric was made again after it had counted this.

    A sum of observations says nothing about that: it may fall. Labels are never taken away from a metric that stays.
    """
    if now is None:
        return True
    created, summed = before.name + _CREATED, before.name + "_sum"
    for key, value in before.samples.items():
        current = now.samples.get(key)
        if current is None or (key[0] == created and current != value) or (key[0] != summed and current < value):
            return True
    return False


def _folded(families: Iterable[Family], how: Callable[[float, float], float]) -> Family:
    """One metric of several; a series was created when the first of them was."""
    first, *rest = families
    created, samples = first.name + _CREATED, dict(first.samples)
    for family in rest:
        for key, value in family.samples.items():
            known = samples.get(key)
            if known is None:
                samples[key] = value
            else:
                samples[key] = min(known, value) if key[0] == created else how(known, value)
    return msgspec.structs.replace(first, samples=samples)


def _only(families: Mapping[str, Family], wanted: frozenset[str] | None) -> Mapping[str, Family]:
    """The metrics with samples of these names, and nothing else of them."""
    if wanted is None:
        return families
    found = {}
    for name, family in families.items():
        samples = {key: value for key, value in family.samples.items() if key[0] in wanted}
        if samples:
            found[name] = msgspec.structs.replace(family, samples=samples)
    return found


def _families(metrics: Iterable[Metric]) -> dict[str, Family]:
    return {
        metric.name: Family(
            metric.name,
            metric.documentation,
            metric.type,
            {(sample.name, *chain.from_iterable(sample.labels.items())): sample.value for sample in metric.samples},
        )
        for metric in metrics
    }


def _metric(family: Family) -> Metric:
    metric = Metric(family.name, family.documentation, family.type)
    metric.samples = [
        Sample(key[0], dict(zip(key[1::2], key[2::2], strict=True)), value) for key, value in family.samples.items()
    ]
    return metric
