import pytest

from server.policy.refusals import InvalidRequest
from server.policy.tenants import TrafficClass
from server.policy.terms import Terms, terms_of


@pytest.mark.parametrize(
    ("tier", "tenant", "served"),
    [
        (None, "critical", "critical"),
        ("auto", "default", "default"),
        ("priority", "critical", "critical"),
        ("priority", "default", "default"),
        ("priority", "batch", "batch"),
        ("default", "critical", "default"),
        ("default", "batch", "batch"),
        ("flex", "critical", "batch"),
        ("flex", "default", "batch"),
        ("nonsense", "default", "default"),
        (["priority"], "default", "default"),
    ],
)
def test_a_tier_chooses_a_class_that_is_not_above_the_tenants_own(
    tier: object, tenant: TrafficClass, served: TrafficClass
) -> None:
    assert terms_of({"service_tier": tier}, None, tenant).traffic_class == served


@pytest.mark.parametrize(("asked", "kept"), [(-5, 0), (0, 0), (3, 3), (10**6, 999), (True, 0), ("7", 0), (None, 0)])
def test_a_clients_priority_only_puts_a_request_behind_its_others(asked: object, kept: int) -> None:
    assert terms_of({"priority": asked}, None, "default").priority == kept


def test_the_engine_serves_every_critical_request_before_every_default_one() -> None:
    assert Terms("critical", priority=999).engine_priority(0) < Terms("default").engine_priority(-(2**62))
    assert Terms("default").engine_priority(10**9) < Terms("batch").engine_priority(0)


def test_a_timeout_is_seconds() -> None:
    assert terms_of({}, "2.5", "default").timeout_s == 2.5
    assert terms_of({}, None, "default").timeout_s is None


@pytest.mark.parametrize("value", ["", "soon", "0", "-1", "nan", "inf", "86401", "5s"])
def test_a_timeout_that_is_no_number_of_seconds_is_refused_by_name(value: str) -> None:
    with pytest.raises(InvalidRequest, match="seconds") as refused:
        terms_of({}, value, "default")
    assert refused.value.param == "x-request-timeout"
