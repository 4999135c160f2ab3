"""What a client sees of a request: how it ended, how long it took, and whether that kept what is promised."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final, Literal

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Histogram
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from server.policy.admission import Admission
from server.policy.tenants import TrafficClass
from server.policy.terms import TRAFFIC_CLASSES

Objective = Literal["answered", "ttft", "tpot"]
_OBJECTIVES: Final[tuple[Objective, ...]] = ("answered", "ttft", "tpot")
_CLIENTS_ERROR: Final = 400
_SERVERS_ERROR: Final = 500

# From a prefix-cache hit on a small model to a long prompt that waited in a queue.
_TTFT_BUCKETS_S: Final = (0.025, 0.05, 0.1, 0.25, 0.5, 0.75, 1, 2, 3, 5, 7.5, 10, 15, 20, 30, 60, 120, 300, 600)
# From 200 tokens per second to two.
_TPOT_BUCKETS_S: Final = (0.005, 0.01, 0.015, 0.02, 0.025, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1)
_DURATION_BUCKETS_S: Final = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 15, 20, 30, 45, 60, 90, 120, 180, 300, 600, 1200)


@dataclass(slots=True)
class RequestFigures:
    """What one client request used, and when; filled in on its way.

    Tokens are sums over its engine requests that are over, and `sequences` counts the answers in them.
    `first_frame_s` and `last_frame_s` are moments on the clock of `time.perf_counter`; None: nothing was streamed.
    `queue_wait_s` is None while it has not had a place in the engine. `level` is the one of degradation, and `upstream`
    the fallback that answered.
    """

    cached_tokens: int = 0
    completion_tokens: int = 0
    sequences: int = 0
    queue_wait_s: float | None = None
    first_frame_s: float | None = None
    last_frame_s: float | None = None
    level: int = 0
    upstream: str | None = None

    def used(self, cached_tokens: int, completion_tokens: int, sequences: int) -> None:
        """Add an engine request, and how many answers it made."""
        self.cached_tokens += cached_tokens
        self.completion_tokens += completion_tokens
        self.sequences += sequences

    def waited(self, seconds: float) -> None:
        """An engine request had its place after so long; the longest wait counts."""
        self.queue_wait_s = max(seconds, self.queue_wait_s or 0.0)

    @property
    def tpot_s(self) -> float | None:
        """Seconds per token after the first, as the client saw them; None for what was not streamed.

        Answers side by side in one stream each have their own pace.
        """
        if self.first_frame_s is None or self.last_frame_s is None or not self.sequences:
            return None
        further = self.completion_tokens / self.sequences - 1
        return (self.last_frame_s - self.first_frame_s) / further if further >= 1 else None


@dataclass(frozen=True, slots=True)
class Ended:
    """How a client's request ended. `status` is what was sent, or that of the refusal that ended a stream."""

    route: str
    traffic_class: TrafficClass
    status: int
    duration_s: float
    ttft_s: float | None = None
    tpot_s: float | None = None


class RequestMetrics:
    """Requests for the engine's operations, batch lines apart. The objectives are those of the gate."""

    def __init__(self, admission: Admission, registry: CollectorRegistry = REGISTRY) -> None:
        self._admission = admission
        self._requests = Counter(
            "tidegate_requests_total",
            "Requests by endpoint, class and status; a stream that an error ended has that error's status",
            ("route", "class", "status"), registry=registry,
        )  # fmt: skip
        self._ttft = Histogram(
            "tidegate_time_to_first_token_seconds", "From a request's first byte to its stream's first token",
            ("class",), buckets=_TTFT_BUCKETS_S, registry=registry,
        )  # fmt: skip
        self._tpot = Histogram(
            "tidegate_time_per_output_token_seconds", "A stream's mean time per token after the first", ("class",),
            buckets=_TPOT_BUCKETS_S, registry=registry,
        )  # fmt: skip
        self._duration = Histogram(
            "tidegate_request_duration_seconds", "From a request's first byte to its answer's last; refusals left out",
            ("class",), buckets=_DURATION_BUCKETS_S, registry=registry,
        )  # fmt: skip
        self._slo = Counter(
            "tidegate_slo_requests_total", "Requests that an objective holds for", ("class", "objective"),
            registry=registry,
        )  # fmt: skip
        self._missed = Counter(
            "tidegate_slo_missed_total",
            "Requests that missed an objective: a server's error instead of an answer, or too slow",
            ("class", "objective"), registry=registry,
        )  # fmt: skip
        # Looking a label up costs more than counting. It is done here, also because a rate needs a zero to begin with.
        self._of = {name: self._class_figures(name) for name in TRAFFIC_CLASSES}
        self._counted: dict[tuple[str, str, int], Counter] = {}
        registry.register(_Promised(admission))

    def _class_figures(self, name: TrafficClass) -> _OfClass:
        return _OfClass(
            self._ttft.labels(name),
            self._tpot.labels(name),
            self._duration.labels(name),
            {objective: (self._slo.labels(name, objective), self._missed.labels(name, objective))
             for objective in _OBJECTIVES},
        )  # fmt: skip

    def ended(self, ended: Ended) -> None:
        """A request is over. One that the client is to blame for, or left, says nothing about objectives."""
        name, status = ended.traffic_class, ended.status
        self._count(ended.route, name, status)
        of = self._of[name]
        failed = status >= _SERVERS_ERROR
        if failed or status < _CLIENTS_ERROR:
            of.judge("answered", missed=failed)
        if status >= _CLIENTS_ERROR:
            return
        objectives, unloaded = self._admission.objectives, self._admission.unloaded
        of.duration.observe(ended.duration_s)
        if ended.ttft_s is not None:
            of.ttft.observe(ended.ttft_s)
            of.judge("ttft", missed=ended.ttft_s > objectives.ttft(name, unloaded))
        if ended.tpot_s is not None:
            of.tpot.observe(ended.tpot_s)
            of.judge("tpot", missed=ended.tpot_s > objectives.tpot(unloaded))

    def _count(self, route: str, traffic_class: TrafficClass, status: int) -> None:
        key = route, traffic_class, status
        if (counter := self._counted.get(key)) is None:
            counter = self._counted[key] = self._requests.labels(route, traffic_class, str(status))
        counter.inc()


@dataclass(frozen=True, slots=True)
class _OfClass:
    """The figures of one class. Of each objective: whom it held for, and who missed it."""

    ttft: Histogram
    tpot: Histogram
    duration: Histogram
    objectives: Mapping[Objective, tuple[Counter, Counter]]

    def judge(self, objective: Objective, *, missed: bool) -> None:
        held_for, missed_by = self.objectives[objective]
        held_for.inc()
        if missed:
            missed_by.inc()


class _Promised(Collector):
    """The objectives in force: the operator's, or those learnt from the machine."""

    def __init__(self, admission: Admission) -> None:
        self._admission = admission

    def collect(self) -> Iterator[GaugeMetricFamily]:
        objectives, unloaded = self._admission.objectives, self._admission.unloaded
        ttft = GaugeMetricFamily(
            "tidegate_objective_ttft_seconds", "Longest time to a first token that is promised", labels=["class"]
        )
        for name in TRAFFIC_CLASSES:
            ttft.add_metric([name], objectives.ttft(name, unloaded))
        yield ttft
        yield GaugeMetricFamily(
            "tidegate_objective_tpot_seconds", "Longest time per token of a stream that is promised",
            value=objectives.tpot(unloaded),
        )  # fmt: skip
