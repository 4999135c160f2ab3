"""Reading figures back out of the metrics."""

import math

from prometheus_client import CollectorRegistry, Counter, Histogram

from server.telemetry.readings import Readings


def test_named_metrics_are_read_and_others_are_left_alone() -> None:
    registry = CollectorRegistry()
    tokens = Counter("tokens_total", "Tokens", ("source", "model"), registry=registry)
    tokens.labels("cache", "a").inc(3)
    tokens.labels("cache", "b").inc(4)
    tokens.labels("computed", "a").inc(5)
    Counter("other_total", "Not asked for", registry=registry).inc()
    reading = Readings(registry, ("tokens_total", "absent_total"), ()).take()
    assert (reading.total("tokens_total"), reading.total("tokens_total", source="cache")) == (12, 7)
    assert reading.by("tokens_total", "source") == {"cache": 7, "computed": 5}
    assert reading.total("absent_total") is None
    assert reading.total("other_total") is None


def test_a_histogram_is_read_over_all_of_its_labels() -> None:
    registry = CollectorRegistry()
    waits = Histogram("wait_seconds", "Waits", ("class",), buckets=(0.1, 1.0), registry=registry)
    for label, value in (("a", 0.05), ("b", 0.5), ("b", 7.0)):
        waits.labels(label).observe(value)
    found = Readings(registry, (), ("wait_seconds",)).take().distribution("wait_seconds")
    assert found is not None
    assert (found.bounds, found.counts, found.sum) == ((0.1, 1.0, math.inf), (1, 2, 3), 7.55)


def test_a_histogram_that_nobody_measures_is_none() -> None:
    assert Readings(CollectorRegistry(), (), ("wait_seconds",)).take().distribution("wait_seconds") is None
