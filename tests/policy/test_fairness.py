from hypothesis import given
from hypothesis import strategies as st

from server.policy.fairness import TokenCounters, cost


def test_an_answers_token_counts_twice_a_prompts() -> None:
    assert cost(100, 50) == 200


@given(st.lists(st.tuples(st.integers(1, 500), st.integers(1, 500), st.integers(1, 500)), min_size=1, max_size=300))
def test_tenants_that_always_wait_get_the_same_up_to_the_largest_request(costs: list[tuple[int, int, int]]) -> None:
    """Theorem 4.4 of the paper, for requests charged when they are let in."""
    counters, tenants = TokenCounters(), ["a", "b", "c"]
    for tenant in tenants:
        counters.arrived(tenant, [])
    served = dict.fromkeys(tenants, 0)
    for choices in costs:
        tenant = counters.next_of(tenants)
        served[tenant] += choices[tenants.index(tenant)]
        counters.served(tenant, choices[tenants.index(tenant)])
        largest = max(max(row) for row in costs)
        assert max(served.values()) - min(served.values()) <= largest


def test_a_tenant_that_was_away_cannot_make_up_for_it() -> None:
    counters = TokenCounters()
    counters.arrived("busy", [])
    counters.served("busy", 10_000)
    counters.arrived("new", ["busy"])
    assert counters["new"] == counters["busy"]


def test_a_tenant_is_lifted_to_the_lowest_of_those_who_wait() -> None:
    counters = TokenCounters()
    for tenant, used in (("a", 300), ("b", 100)):
        counters.charge(tenant, used)
    counters.arrived("c", ["a", "b"])
    assert counters["c"] == 100


def test_a_tenant_with_more_behind_it_is_not_lifted() -> None:
    counters = TokenCounters()
    counters.charge("heavy", 500)
    counters.charge("light", 100)
    counters.arrived("heavy", ["light"])
    assert counters["heavy"] == 500


def test_when_nobody_waits_a_newcomer_starts_where_the_last_one_left() -> None:
    counters = TokenCounters()
    counters.arrived("first", [])
    counters.served("first", 700)
    counters.arrived("second", [])
    assert counters["second"] == 700
