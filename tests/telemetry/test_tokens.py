import time

from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from server.telemetry.metrics import Metrics
from server.telemetry.tokens import KINDS, OTHER, TokenMetrics


def samples(page: str) -> dict[tuple[str, str, str], float]:
    (family,) = text_string_to_metric_families(page)
    assert (family.name, family.type) == ("tidegate_tokens", "counter")
    return {(s.labels["tenant"], s.labels["work"], s.labels["kind"]): s.value for s in family.samples}


def test_tokens_are_counted_by_tenant_work_and_kind() -> None:
    tokens = TokenMetrics(tenants_shown=10)
    tokens.used("search", "online", (100, 64, 5))
    tokens.used("search", "online", (10, 0, 1))
    tokens.used("search", "batch", (7, 0, 2))
    assert samples(tokens.page()) == {
        ("search", "online", "prompt"): 110,
        ("search", "online", "cached"): 64,
        ("search", "online", "completion"): 6,
        ("search", "batch", "prompt"): 7,
        ("search", "batch", "cached"): 0,
        ("search", "batch", "completion"): 2,
    }


def test_tenants_over_the_number_share_one_label_and_the_first_keep_theirs() -> None:
    tokens = TokenMetrics(tenants_shown=2)
    for name in ("a", "b", "c", "d", "a"):
        tokens.used(name, "online", (1, 0, 0))
    assert [tokens.total(name, "online", "prompt") for name in ("a", "b", OTHER)] == [2, 1, 2]
    assert {tenant for tenant, _, _ in samples(tokens.page())} == {"a", "b", OTHER}


def test_no_tenant_has_a_label_where_none_is_wanted() -> None:
    tokens = TokenMetrics(tenants_shown=0)
    tokens.used("a", "online", (1, 2, 3))
    assert {tenant for tenant, _, _ in samples(tokens.page())} == {OTHER}


def test_a_page_with_a_thousand_tenants_takes_less_than_50_ms() -> None:
    """All of them with labels of their own, online and in batches. The best of some tries: the machine is shared."""
    metrics = Metrics(CollectorRegistry(), tenants_shown=1000)
    for number in range(1000):
        for work in ("online", "batch"):
            metrics.tokens.used(f"tenant-{number}", work, (number, number, number))

    def took_s() -> float:
        started_s = time.perf_counter()
        page = metrics.page()
        ended_s = time.perf_counter()
        assert page.count(b"tidegate_tokens_total{") == 1000 * 2 * len(KINDS)
        return ended_s - started_s

    assert min(took_s() for _ in range(10)) < 0.05
