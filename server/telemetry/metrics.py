"""Every metric of ours, declared once. vLLM's own `vllm:*` metrics share the registry and the page."""

from prometheus_client import CONTENT_TYPE_LATEST, REGISTRY, CollectorRegistry, Counter, Histogram, generate_latest

CONTENT_TYPE = CONTENT_TYPE_LATEST
# A generation takes from some milliseconds (a refusal) to many minutes (a long answer on a busy server).
_DURATION_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Metrics:
    """Our metrics on one registry. Labels are bounded: routes are templates, never paths."""

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        self._registry = registry
        self._http_requests = Counter(
            "tidegate_http_requests_total", "HTTP requests by route and status", ("method", "route", "status"),
            registry=registry,
        )  # fmt: skip
        self._http_duration = Histogram(
            "tidegate_http_request_duration_seconds", "Time from a request's first byte to its answer's last",
            ("method", "route"), buckets=_DURATION_BUCKETS_S, registry=registry,
        )  # fmt: skip

    def http_request(self, method: str, route: str, status: int, duration_s: float) -> None:
        self._http_requests.labels(method, route, str(status)).inc()
        self._http_duration.labels(method, route).observe(duration_s)

    def page(self) -> bytes:
        """The text that Prometheus scrapes."""
        return generate_latest(self._registry)
