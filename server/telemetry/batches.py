"""The metrics of batches."""

import time
from collections.abc import Callable

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge

from server.policy.batches import Usage


class BatchMetrics:
    """Lines by what became of them, what they used, and how much of the engine's time went to them."""

    def __init__(
        self, registry: CollectorRegistry = REGISTRY, clock: Callable[[], float] = time.monotonic
    ) -> None:  # fmt: skip
        self._clock = clock
        self._running = 0
        self._running_since_s = 0.0
        self._lines = Counter(
            "tidegate_batch_lines_total", "Lines of batches by what became of them", ("state",), registry=registry
        )
        self._in_flight = Gauge(
            "tidegate_batch_lines_in_flight", "Lines of batches at the gate and in the engine", ("where",),
            registry=registry,
        )  # fmt: skip
        self._tokens = Counter(
            "tidegate_batch_tokens_total", "Tokens of answered lines", ("kind",), registry=registry
        )  # fmt: skip
        self._engine_seconds = Counter(
            "tidegate_batch_engine_seconds_total",
            "Seconds in which the engine worked on at least one line; its rate is the share of time given to batches",
            registry=registry,
        )
        self._open = Gauge("tidegate_batches_open", "Batches that have not ended", registry=registry)
        self._pending = Gauge("tidegate_batch_lines_pending", "Lines without an answer yet", registry=registry)
        self._oldest = Gauge(
            "tidegate_batch_queue_age_seconds", "Age of the oldest batch that has not ended", registry=registry
        )

    def line_offered(self) -> None:
        self._in_flight.labels("gate").inc()

    def line_entered(self) -> None:
        """A line went from the gate into the engine."""
        self._in_flight.labels("gate").dec()
        self._in_flight.labels("engine").inc()
        if self._running == 0:
            self._running_since_s = self._clock()
        self._running += 1
        self._count_time()

    def line_left(self, inside: bool) -> None:
        self._in_flight.labels("engine" if inside else "gate").dec()
        if inside:
            self._count_time()
            self._running -= 1

    def line_done(self, state: str, usage: Usage) -> None:
        """A line has its answer: `completed`, `failed`, `batch_expired` or `batch_cancelled`."""
        self._lines.labels(state).inc()
        self._tokens.labels("input").inc(usage.input_tokens)
        self._tokens.labels("cached").inc(usage.cached_tokens)
        self._tokens.labels("output").inc(usage.output_tokens)

    def queued(self, batches: int, pending_lines: int, oldest_age_s: float) -> None:
        """What is left to do."""
        self._open.set(batches)
        self._pending.set(pending_lines)
        self._oldest.set(oldest_age_s)

    def _count_time(self) -> None:
        now_s = self._clock()
        self._engine_seconds.inc(now_s - self._running_since_s)
        self._running_since_s = now_s
