"""The figures of several processes as one page."""

import time
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import (
    GC_COLLECTOR,
    PLATFORM_COLLECTOR,
    PROCESS_COLLECTOR,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
)
from prometheus_client.parser import text_string_to_metric_families

from server.app import build_application
from server.settings import Settings
from server.telemetry.merging import GAUGE_RULES, MergedRegistry, snapshot
from server.telemetry.metrics import Metrics
from server.telemetry.readings import Readings
from server.telemetry.tenants import KINDS, OTHER, Outcome, TenantMetrics, Work


def application_figures(registry: CollectorRegistry, tenants_shown: int = 100) -> Metrics:
    """The metrics of the whole application, as they are before anybody has called."""
    chosen: dict[str, Any] = {"data_folder": Path("/nowhere"), "metrics_tenants": tenants_shown}
    return build_application(Settings(**chosen), {"tidegate": "1.2.3"}, registry, "key").figures


@dataclass
class Process:
    """One process with a counter and a histogram, like those of an engine, which begin anew with the next."""

    figures: Metrics
    registry: CollectorRegistry
    made: list[Counter | Histogram] = field(default_factory=list)

    @classmethod
    def new(cls) -> "Process":
        registry = CollectorRegistry(auto_describe=True)
        process = cls(Metrics(registry), registry)
        process.next_engine()
        return process

    def next_engine(self) -> None:
        for metric in self.made:
            self.registry.unregister(metric)
        self.tokens = Counter("vllm:tokens", "Tokens", ("model",), registry=self.registry)
        self.gaps = Histogram("vllm:gap_seconds", "Gaps", ("model",), buckets=(1, 10), registry=self.registry)
        self.made = [self.tokens, self.gaps]

    def count(self, times: int, model: str = "m") -> None:
        for _ in range(times):
            self.tokens.labels(model).inc()
            self.gaps.labels(model).observe(5)
            self.figures.tenants.ended("a-tenant", "answered")


def figures(metrics: Metrics) -> dict[tuple[str, ...], float]:
    """The page's samples by name and the values of their labels, which stand in the order of their names."""
    page = metrics.page().decode()
    samples = [sample for family in text_string_to_metric_families(page) for sample in family.samples]
    found = {(sample.name, *sample.labels.values()): sample.value for sample in samples}
    assert len(found) == len(samples)
    return found


def test_the_page_of_one_process_alone_is_its_registrys_byte_for_byte() -> None:
    registry = CollectorRegistry(auto_describe=True)
    metrics = application_figures(registry)
    metrics.http_request("POST", "/v1/completions", 200, 0.1)
    metrics.tenants.used("a-tenant", "online", (1, 2, 3))
    assert metrics.page() == generate_latest(registry) + metrics.tenants.page().encode()


def test_counters_and_histograms_are_sums_by_their_labels() -> None:
    own, other = Process.new(), Process.new()
    own.count(2)
    other.count(3)
    other.count(4, model="adapter")
    own.figures.merged.told("1", other.figures.snapshot())
    found = figures(own.figures)
    assert (found["vllm:tokens_total", "m"], found["vllm:tokens_total", "adapter"]) == (5, 4)
    buckets = [found["vllm:gap_seconds_bucket", bound, "m"] for bound in ("1.0", "10.0", "+Inf")]
    assert (buckets, found["vllm:gap_seconds_count", "m"], found["vllm:gap_seconds_sum", "m"]) == ([0, 5, 5], 5, 25)
    assert found["vllm:gap_seconds_bucket", "10.0", "adapter"] == 4
    assert found["tidegate_tenant_requests_total", "a-tenant", "answered"] == 9


def test_a_series_was_created_when_the_first_process_made_it() -> None:
    own, other = Process.new(), Process.new()
    other.count(1)
    own.count(1)
    created = ("vllm:tokens_created", "m")
    own.figures.merged.told("1", other.figures.snapshot())
    assert figures(own.figures)[created] == figures(other.figures)[created]


def test_what_only_another_process_has_is_on_the_page_with_its_words_and_type() -> None:
    own, other = Process.new(), Process.new()
    Counter("tidegate_only_there", "Said there.", registry=other.registry).inc(7)
    own.figures.merged.told("1", other.figures.snapshot())
    page = own.figures.page().decode()
    assert "# HELP tidegate_only_there_total Said there.\n# TYPE tidegate_only_there_total counter\n" in page
    assert "tidegate_only_there_total 7.0\n" in page


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("tidegate_event_loop_tasks", 6.0),  # sum
        ("tidegate_limits_local", 3.0),  # max
        ("tidegate_fallback_up", 1.0),  # min
        ("tidegate_kv_used_tokens", 2.0),  # the first process alone knows it
        ("a_gauge_without_a_rule", 6.0),  # sum
        ("vllm:num_requests_running", 2.0),  # the scheduler reports to the first process
    ],
)
def test_a_gauge_is_made_one_by_its_rule(name: str, expected: float) -> None:
    own, *others = (gauge(name, value) for value in (2, 3, 1))
    merged = MergedRegistry(own, TenantMetrics(1))
    for number, other in enumerate(others):
        merged.told(str(number), snapshot(other, TenantMetrics(1)))
    assert value_of(merged, name) == expected


def gauge(name: str, value: float) -> CollectorRegistry:
    registry = CollectorRegistry()
    Gauge(name, "A state", registry=registry).set(value)
    return registry


def value_of(merged: MergedRegistry, name: str) -> float | None:
    """The one sample of this name, read as the console reads it; None where there is none."""
    return Readings(merged, (name,), ()).take().total(name)


def test_a_process_that_has_ended_leaves_what_it_counted_and_no_state() -> None:
    own, other = Process.new(), Process.new()
    Gauge("tidegate_open", "A state", registry=other.registry).set(9)
    other.count(3)
    own.figures.merged.told("1", other.figures.snapshot())
    assert figures(own.figures)[("tidegate_open",)] == 9
    own.figures.merged.gone("1")
    found = figures(own.figures)
    assert (found["vllm:tokens_total", "m"], found["vllm:gap_seconds_count", "m"]) == (3, 3)
    assert found["tidegate_tenant_requests_total", "a-tenant", "answered"] == 3
    assert ("tidegate_open",) not in found


def test_the_end_of_a_process_that_never_told_anything_changes_nothing() -> None:
    own = Process.new()
    before = own.figures.page()
    own.figures.merged.gone("1")
    assert own.figures.page() == before


OPERATIONS = st.one_of(
    st.tuples(st.just("count"), st.integers(0, 2), st.integers(1, 5)),
    st.tuples(st.sampled_from(("tell", "end", "next engine")), st.integers(0, 2), st.just(0)),
)


class Server:
    """A first process and others; what ends begins again under a new name, as front-ends do."""

    def __init__(self) -> None:
        self.processes = [Process.new() for _ in range(3)]
        self.started = len(self.processes)
        self.names = ["first", "1", "2"]
        self.first = self.processes[0].figures

    def tell(self, number: int) -> None:
        if number:
            self.first.merged.told(self.names[number], self.processes[number].figures.snapshot())

    def end(self, number: int) -> None:
        if number:
            self.first.merged.gone(self.names[number])
            self.started += 1
            self.processes[number], self.names[number] = Process.new(), str(self.started)

    def do(self, what: str, number: int, times: int) -> None:
        if what == "count":
            self.processes[number].count(times)
        elif what == "tell":
            self.tell(number)
        elif what == "end":
            self.end(number)
        else:
            self.processes[number].next_engine()


@given(st.lists(OPERATIONS, max_size=30))
def test_what_is_counted_never_goes_backwards(operations: list[tuple[str, int, int]]) -> None:
    """Whoever ends or begins anew, and whenever the page is asked for."""
    server = Server()
    server.tell(1)
    before: dict[tuple[str, ...], float] = {}
    for operation in operations:
        server.do(*operation)
        now = {key: value for key, value in figures(server.first).items() if not key[0].endswith("_created")}
        assert all(now[key] >= value for key, value in before.items())
        before = now


@given(st.lists(OPERATIONS, max_size=30))
def test_what_is_told_in_time_is_counted_exactly_once(operations: list[tuple[str, int, int]]) -> None:
    """A process that tells its figures before it ends or begins anew loses nothing, and nothing is counted twice."""
    server, counted = Server(), 0
    server.tell(1)
    for what, number, times in operations:
        server.tell(number)
        server.first.page()
        server.do(what, number, times)
        counted += times
    for number in (1, 2):
        server.tell(number)
    found = figures(server.first)
    assert found.get(("vllm:tokens_total", "m"), 0) == counted
    assert found.get(("vllm:gap_seconds_bucket", "10.0", "m"), 0) == counted
    assert found.get(("tidegate_tenant_requests_total", "a-tenant", "answered"), 0) == counted


def test_the_console_reads_what_all_processes_count_and_no_other_metrics() -> None:
    own, other, ended = Process.new(), Process.new(), Process.new()
    for process in (own, other, ended):
        process.count(2)
    readings = Readings(own.figures.merged, ("vllm:tokens_total",), ("vllm:gap_seconds",))
    own.figures.merged.told("1", other.figures.snapshot())
    own.figures.merged.told("2", ended.figures.snapshot())
    own.figures.merged.gone("2")
    reading = readings.take()
    distribution = reading.distribution("vllm:gap_seconds")
    assert reading.total("vllm:tokens_total") == 6
    assert distribution is not None
    assert (distribution.counts, distribution.sum) == ((0, 6, 6), 30)
    assert set(reading.samples) == {"vllm:tokens_total", "vllm:gap_seconds_bucket", "vllm:gap_seconds_sum"}


def test_every_gauge_of_the_application_has_a_rule() -> None:
    registry = CollectorRegistry(auto_describe=True)
    for collector in (PROCESS_COLLECTOR, PLATFORM_COLLECTOR, GC_COLLECTOR):
        registry.register(collector)
    application_figures(registry)
    gauges = {metric.name for metric in registry.collect() if metric.type == "gauge"}
    assert gauges == set(GAUGE_RULES)


def test_tenants_of_other_processes_take_labels_as_own_ones_do_and_keep_them() -> None:
    own, other = TenantMetrics(shown=2), TenantMetrics(shown=2)
    for name in ("b", "c", "d"):
        other.ended(name, "answered")
    own.ended("a", "answered")
    merged = MergedRegistry(CollectorRegistry(), own)
    merged.told("1", snapshot(CollectorRegistry(), other))
    assert requests_of(merged) == {"a": 1, "b": 1, OTHER: 2}
    own.ended("c", "answered")
    other.ended("b", "answered")
    merged.told("1", snapshot(CollectorRegistry(), other))
    assert requests_of(merged) == {"a": 1, "b": 2, OTHER: 3}
    merged.gone("1")
    assert requests_of(merged) == {"a": 1, "b": 2, OTHER: 3}


def requests_of(merged: MergedRegistry) -> dict[str, float]:
    """Requests that were answered, by tenant."""
    families = text_string_to_metric_families(merged.tenants_page())
    (family,) = [family for family in families if family.name == "tidegate_tenant_requests"]
    return {sample.labels["tenant"]: sample.value for sample in family.samples}


def test_three_processes_with_a_thousand_tenants_are_one_page_in_less_than_50_ms() -> None:
    """Told anew each time, with every label that tenants can have. The best of some tries: the machine is shared."""
    works, outcomes = get_args(Work), get_args(Outcome)
    first, *others = (application_figures(CollectorRegistry(auto_describe=True), 1000) for _ in range(3))
    for process, number, work, outcome in product((first, *others), range(1000), works, outcomes):
        process.tenants.used(f"tenant-{number}", work, (number, number, number))
        process.tenants.ended(f"tenant-{number}", outcome)
    told = [other.snapshot() for other in others]

    def took_s() -> float:
        started_s = time.perf_counter()
        for number, data in enumerate(told):
            first.merged.told(str(number), data)
        page = first.page()
        ended_s = time.perf_counter()
        assert page.count(b'{tenant="') == 1000 * (len(works) * len(KINDS) + len(outcomes))
        return ended_s - started_s

    assert min(took_s() for _ in range(10)) < 0.05
