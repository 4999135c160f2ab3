"""The gate's figures: what waits and runs, what is promised, who was refused, and how fast the engine is."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Histogram
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from server.policy.admission import Admission
from server.policy.forecast import Step
from server.policy.tenants import TrafficClass
from server.policy.terms import TRAFFIC_CLASSES

_WAIT_BUCKETS_S = (0.001, 0.005, 0.025, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 600)


class AdmissionMetrics:
    """Counted where it happens; what is a state is read when Prometheus asks."""

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        self._registry = registry
        self._wait = Histogram(
            "tidegate_queue_wait_seconds", "Time from a request's arrival to its place in the engine", ("class",),
            buckets=_WAIT_BUCKETS_S, registry=registry,
        )  # fmt: skip
        self._refused = Counter(
            "tidegate_overload_refusals_total",
            "Requests refused because the wait would be too long: at the door (before tokenizing), on arrival in the "
            "queue, or in the queue when their time had run out",
            ("class", "where"), registry=registry,
        )  # fmt: skip
        self._evicted = Counter(
            "tidegate_batch_evictions_total", "Batch requests put back in the queue so that others run",
            registry=registry,
        )  # fmt: skip
        self._preempted = Counter(
            "tidegate_engine_preemptions_total", "Sequences that the engine took out for lack of KV cache",
            registry=registry,
        )  # fmt: skip
        self._prompt_tokens = Counter(
            "tidegate_engine_prompt_tokens_total", "Prompt tokens by where they came from", ("source",),
            registry=registry,
        )  # fmt: skip
        self._computed, self._cached = (self._prompt_tokens.labels(source) for source in ("computed", "cache"))
        for name in TRAFFIC_CLASSES:  # a rate needs a zero to begin with
            for where in ("door", "arrival", "queue"):
                self._refused.labels(name, where)

    def watch(self, admission: Admission, clock: Callable[[], float]) -> None:
        """Show the state of this gate; `clock` is the one it counts ages on."""
        self._registry.register(_State(admission, clock))

    def admitted(self, traffic_class: TrafficClass, waited_s: float) -> None:
        self._wait.labels(traffic_class).observe(waited_s)

    def refused(self, traffic_class: TrafficClass, where: str) -> None:
        self._refused.labels(traffic_class, where).inc()

    def evicted(self) -> None:
        self._evicted.inc()

    def stepped(self, step: Step) -> None:
        """One engine step; most of them have nothing to count."""
        if step.preemptions:
            self._preempted.inc(step.preemptions)
        if step.prefilled_tokens:
            self._computed.inc(step.prefilled_tokens)
        if step.cached_tokens:
            self._cached.inc(step.cached_tokens)


class _State(Collector):
    def __init__(self, admission: Admission, clock: Callable[[], float]) -> None:
        self._admission = admission
        self._clock = clock

    def collect(self) -> Iterator[GaugeMetricFamily]:
        a = self._admission
        waiting = GaugeMetricFamily("tidegate_requests_waiting", "Requests in the queue", labels=["class"])
        running = GaugeMetricFamily("tidegate_requests_running", "Requests in the engine", labels=["class"])
        oldest = GaugeMetricFamily(
            "tidegate_queue_age_seconds", "Age of the oldest request in the queue, 0 where nobody waits",
            labels=["class"],
        )  # fmt: skip
        now_s = self._clock()
        ages_s = dict.fromkeys(TRAFFIC_CLASSES, 0.0)
        for ticket in a.backlog:
            ages_s[ticket.traffic_class] = max(ages_s[ticket.traffic_class], now_s - ticket.arrived_s)
        for name in TRAFFIC_CLASSES:
            oldest.add_metric([name], ages_s[name])
            waiting.add_metric([name], a.backlog.size(name))
            running.add_metric([name], a.ledger.running(name))
        yield waiting
        yield running
        yield oldest
        kv_tokens = a.capacity.kv_tokens if a.capacity is not None else 0
        for gauge, text, value in (
            ("kv_reserved_tokens", "KV cache tokens promised to running requests", a.ledger.reserved),
            ("kv_used_tokens", "KV cache tokens in use, by the engine's count", a.kv_usage_ratio * kv_tokens),
            ("kv_capacity_tokens", "KV cache tokens there are", kv_tokens),
            ("running_cap", "Sequences that may run at once without missing the TPOT objective", a.cap.limit),
            ("step_seconds", "Time between two tokens of a stream, smoothed", a.cap.itl_s),
            ("prefill_tokens_per_second", "Prompt tokens worked off per second", a.rates.prefill_tokens_per_s(None)),
            ("decode_tokens_per_second", "Tokens generated per second, smoothed", a.rates.decode_tokens_per_s),
            ("expected_growth_ratio", "Share of max_tokens that reservations count on", a.growth.expected),
        ):
            yield GaugeMetricFamily(f"tidegate_{gauge}", text, value=value)
