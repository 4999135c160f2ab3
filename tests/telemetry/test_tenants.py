import time
from itertools import product
from typing import get_args

from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from server.telemetry.metrics import Metrics
from server.telemetry.tenants import KINDS, OTHER, Outcome, TenantMetrics, Work


def samples(page: str, name: str) -> dict[tuple[str, ...], float]:
    """A counter of the page, by the values of its labels."""
    families = {family.name: family for family in text_string_to_metric_families(page)}
    assert {family.type for family in families.values()} == {"counter"}
    return {tuple(sample.labels.values()): sample.value for sample in families[name].samples}


def test_tokens_are_counted_by_tenant_work_and_kind() -> None:
    tenants = TenantMetrics(shown=10)
    tenants.used("search", "online", (100, 64, 5))
    tenants.used("search", "online", (10, 0, 1))
    tenants.used("search", "batch", (7, 0, 2))
    assert samples(tenants.page(), "tidegate_tokens") == {
        ("search", "online", "prompt"): 110,
        ("search", "online", "cached"): 64,
        ("search", "online", "completion"): 6,
        ("search", "batch", "prompt"): 7,
        ("search", "batch", "cached"): 0,
        ("search", "batch", "completion"): 2,
    }


def test_requests_are_counted_by_tenant_and_how_they_ended() -> None:
    tenants = TenantMetrics(shown=10)
    outcomes: tuple[Outcome, ...] = ("answered", "limited", "answered")
    for outcome in outcomes:
        tenants.ended("search", outcome)
    found = samples(tenants.page(), "tidegate_tenant_requests")
    assert found == {("search", "answered"): 2, ("search", "limited"): 1}


def test_tenants_over_the_number_share_one_label_and_the_first_keep_theirs() -> None:
    tenants = TenantMetrics(shown=2)
    for name in ("a", "b", "c", "d", "a"):
        tenants.used(name, "online", (1, 0, 0))
        tenants.ended(name, "answered")
    assert [tenants.tokens(name, "online", "prompt") for name in ("a", "b", OTHER)] == [2, 1, 2]
    found = samples(tenants.page(), "tidegate_tenant_requests")
    assert found == {("a", "answered"): 2, ("b", "answered"): 1, (OTHER, "answered"): 2}


def test_no_tenant_has_a_label_where_none_is_wanted() -> None:
    tenants = TenantMetrics(shown=0)
    tenants.used("a", "online", (1, 2, 3))
    assert {labels[0] for labels in samples(tenants.page(), "tidegate_tokens")} == {OTHER}


def test_a_page_with_a_thousand_tenants_takes_less_than_50_ms() -> None:
    """All of them with every label they can have. The best of some tries: the machine is shared."""
    metrics = Metrics(CollectorRegistry(), tenants_shown=1000)
    works, outcomes = get_args(Work), get_args(Outcome)
    for number, work, outcome in product(range(1000), works, outcomes):
        metrics.tenants.used(f"tenant-{number}", work, (number, number, number))
        metrics.tenants.ended(f"tenant-{number}", outcome)

    def took_s() -> float:
        started_s = time.perf_counter()
        page = metrics.page()
        ended_s = time.perf_counter()
        assert page.count(b'{tenant="') == 1000 * (len(works) * len(KINDS) + len(outcomes))
        return ended_s - started_s

    assert min(took_s() for _ in range(10)) < 0.05
