"""A step's latencies are observed together, and no sample differs from those that are observed one by one."""

from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Histogram, generate_latest

from server.engine.latencies import observe_all

_BOUNDS = (0.25, 0.5, 1.0, 2.0)


def _histogram(registry: CollectorRegistry) -> Histogram:
    made = Histogram("itl_seconds", "Latencies", ("engine",), buckets=_BOUNDS, registry=registry).labels("0")
    assert isinstance(made, Histogram)
    return made


def _page(registry: CollectorRegistry) -> list[str]:
    return [line for line in generate_latest(registry).decode().splitlines() if "_created" not in line]


@given(steps=st.lists(st.lists(st.sampled_from([0.0, 0.125, *_BOUNDS, 1.5, 64.0]))))
def test_the_samples_are_the_same(steps: list[list[float]]) -> None:
    together, one_by_one = CollectorRegistry(), CollectorRegistry()
    first, second = _histogram(together), _histogram(one_by_one)
    for amounts in steps:
        observe_all(first, amounts)
        for amount in amounts:
            second.observe(amount)
    assert _page(together) == _page(one_by_one)
