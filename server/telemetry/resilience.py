"""Metrics of the engine's life, of the degradation ladder and of the fallback upstreams."""

from collections.abc import Callable

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram

# From a small model on a warm machine to a large one that is read from a network disk.
_DOWNTIME_BUCKETS_S = (5, 10, 15, 20, 30, 45, 60, 90, 120, 300, 600, 1200)


class ResilienceMetrics:
    """These metrics on one registry. Upstreams are labelled by their configured names."""

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        self._up = Gauge("tidegate_engine_up", "1 while an engine serves", registry=registry)
        self._restarts = Counter(
            "tidegate_engine_restarts_total", "Engines that were replaced, by what ended them", ("reason",),
            registry=registry,
        )  # fmt: skip
        self._failed_restarts = Counter(
            "tidegate_engine_failed_restarts_total", "Tries to replace the engine that failed", registry=registry
        )
        self._downtime = Histogram(
            "tidegate_engine_downtime_seconds", "From the death of an engine to the first request on the next",
            buckets=_DOWNTIME_BUCKETS_S, registry=registry,
        )  # fmt: skip
        self._rerun = Counter(
            "tidegate_requests_rerun_total", "Requests that ran again after an engine died", registry=registry
        )
        self._lost = Counter(
            "tidegate_requests_lost_total", "Requests that an engine's death ended, by why they did not run again",
            ("reason",), registry=registry,
        )  # fmt: skip
        for died in ("died", "hung"):  # a rate needs a zero to begin with
            self._restarts.labels(died)
        for lost in ("streamed", "quarantined"):
            self._lost.labels(lost)
        self._level = Gauge("tidegate_degradation_level", "The level that counts now, 0 to 5", registry=registry)
        self._pressure = Gauge(
            "tidegate_degradation_pressure_ratio", "Predicted wait for a first token over what is promised",
            registry=registry,
        )  # fmt: skip
        self._transitions = Counter(
            "tidegate_degradation_transitions_total", "Changes of the level", ("to",), registry=registry
        )
        self._degraded = Counter(
            "tidegate_degraded_requests_total", "Requests that a level changed or refused, by the level", ("level",),
            registry=registry,
        )  # fmt: skip
        self._fallback_requests = Counter(
            "tidegate_fallback_requests_total", "Requests sent to a fallback upstream, by how they ended",
            ("upstream", "outcome"), registry=registry,
        )  # fmt: skip
        self._fallback_up = Gauge(
            "tidegate_fallback_up", "1 while the upstream's circuit breaker is closed", ("upstream",),
            registry=registry,
        )  # fmt: skip

    def watch_engine(self, is_ready: Callable[[], bool]) -> None:
        """Read at each scrape."""
        self._up.set_function(lambda: float(is_ready()))

    def engine_died(self, *, hung: bool) -> None:
        self._restarts.labels("hung" if hung else "died").inc()

    def engine_replaced(self, downtime_s: float) -> None:
        self._downtime.observe(downtime_s)

    def restart_failed(self) -> None:
        self._failed_restarts.inc()

    def request_rerun(self) -> None:
        self._rerun.inc()

    def request_lost(self, reason: str) -> None:
        """`reason` is `streamed` or `quarantined`."""
        self._lost.labels(reason).inc()

    def level_is(self, level: int, pressure: float) -> None:
        self._level.set(level)
        self._pressure.set(pressure)

    def level_changed(self, level: int) -> None:
        self._transitions.labels(str(level)).inc()

    def degraded(self, level: int) -> None:
        self._degraded.labels(str(level)).inc()

    def fallback_request(self, upstream: str, outcome: str) -> None:
        """`outcome` is `answered`, `refused` (passed on), `failed`, `cut` or `left` (by the client)."""
        self._fallback_requests.labels(upstream, outcome).inc()

    def fallback_is(self, upstream: str, *, up: bool) -> None:
        self._fallback_up.labels(upstream).set(up)
