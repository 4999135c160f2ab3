"""Every metric of ours, declared once. vLLM's own `vllm:*` metrics share the registry and the page."""

from collections.abc import Callable, Mapping

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    REGISTRY,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
)

from server.telemetry.merging import MergedRegistry, snapshot
from server.telemetry.tenants import TenantMetrics

CONTENT_TYPE = CONTENT_TYPE_LATEST
# A generation takes from some milliseconds (a refusal) to many minutes (a long answer on a busy server).
_DURATION_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
# One round trip to Redis: well under a millisecond nearby, and never over its timeout.
_LIMITER_BUCKETS_S = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1)
TENANTS_SHOWN = 100
_FIT_BUCKETS_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)


class Metrics:
    """Our metrics on one registry. Labels are bounded: routes are templates, never paths.

    `tenants_shown`: how many tenants have a label of their own. `merged` has those of other processes as well.
    """

    def __init__(self, registry: CollectorRegistry = REGISTRY, tenants_shown: int = TENANTS_SHOWN) -> None:
        self._registry = registry
        self.tenants = TenantMetrics(tenants_shown)
        self.merged = MergedRegistry(registry, self.tenants)
        self._http_requests = Counter(
            "tidegate_http_requests_total", "HTTP requests by route and status", ("method", "route", "status"),
            registry=registry,
        )  # fmt: skip
        self._http_duration = Histogram(
            "tidegate_http_request_duration_seconds", "Time from a request's first byte to its answer's last",
            ("method", "route"), buckets=_DURATION_BUCKETS_S, registry=registry,
        )  # fmt: skip

        self._refusals = Counter(
            "tidegate_refusals_total", "Refusals by reason, the `code` that the client is told", ("reason",),
            registry=registry,
        )  # fmt: skip
        self._truncated_requests = Counter(
            "tidegate_context_truncated_requests_total", "Prompts that lost messages or tokens", registry=registry
        )
        self._dropped_messages = Counter(
            "tidegate_context_dropped_messages_total", "Messages left out of prompts", registry=registry
        )
        self._dropped_tokens = Counter(
            "tidegate_context_dropped_tokens_total", "Tokens left out of prompts", registry=registry
        )
        counted = Counter(
            "tidegate_context_counted_messages_total", "Messages counted, by where the count came from", ("source",),
            registry=registry,
        )  # fmt: skip
        self._counted_before, self._counted_anew = counted.labels("cache"), counted.labels("tokenizer")
        self._fit_duration = Histogram(
            "tidegate_context_fit_duration_seconds", "Counting and planning of histories that do not fit by length",
            buckets=_FIT_BUCKETS_S, registry=registry,
        )  # fmt: skip

        self._limit_refusals = Counter(
            "tidegate_limit_refusals_total", "Requests refused with 429, by the limit they met", ("limit",),
            registry=registry,
        )  # fmt: skip
        self._limiter_duration = Histogram(
            "tidegate_limiter_duration_seconds", "Charging a request before it runs", buckets=_LIMITER_BUCKETS_S,
            registry=registry,
        )  # fmt: skip
        self._limits_local = Gauge(
            "tidegate_limits_local", "1 while Redis does not answer and each replica limits alone", registry=registry
        )
        self._event_loop_tasks = Gauge(
            "tidegate_event_loop_tasks",
            "Tasks of the server's event loop, requests and its own work",
            registry=registry,
        )

    def limit_refused(self, limit: str) -> None:
        self._limit_refusals.labels(limit).inc()

    def limiter_asked(self, duration_s: float) -> None:
        self._limiter_duration.observe(duration_s)

    def watch_limiter(self, is_local: Callable[[], bool]) -> None:
        """Read at each scrape."""
        self._limits_local.set_function(lambda: float(is_local()))

    def watch_event_loop(self, tasks: Callable[[], int]) -> None:
        """Read at each scrape."""
        self._event_loop_tasks.set_function(tasks)

    def truncated(self, messages: int, tokens: int) -> None:
        """A prompt was cut."""
        self._truncated_requests.inc()
        self._dropped_messages.inc(messages)
        self._dropped_tokens.inc(tokens)

    def fitted(self, duration_s: float, cached: int, counted: int) -> None:
        """A history was counted, so many of its messages from the cache, and planned."""
        self._fit_duration.observe(duration_s)
        self._counted_before.inc(cached)
        if counted:
            self._counted_anew.inc(counted)

    def http_request(self, method: str, route: str, status: int, duration_s: float) -> None:
        self._http_requests.labels(method, route, str(status)).inc()
        self._http_duration.labels(method, route).observe(duration_s)

    def refused(self, reason: str) -> None:
        self._refusals.labels(reason).inc()

    def describe(self, versions: Mapping[str, str]) -> None:
        """Show what runs here; the values are labels, as is usual for this."""
        info = Gauge("tidegate_build_info", "1, with the versions that run", tuple(versions), registry=self._registry)
        info.labels(*versions.values()).set(1)

    def page(self) -> bytes:
        """The text that Prometheus scrapes."""
        return generate_latest(self.merged) + self.merged.tenants_page().encode()

    def snapshot(self) -> bytes:
        """The figures of this process alone, for another one to show."""
        return snapshot(self._registry, self.tenants)
