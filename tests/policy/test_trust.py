"""How far forecasts are trusted follows their mistakes."""

import pytest

from server.policy.trust import Trust


def share(trust: Trust) -> float:
    return trust.share("default", first=False)


def test_who_waits_in_vain_makes_the_next_wait_shorter_and_others_earn_it_back() -> None:
    trust = Trust()
    at_first = share(trust)
    trust.broken("default")
    after = share(trust)
    assert after < at_first
    for _ in range(40):
        trust.kept("default", 0.5, last=False)
    assert after < share(trust) < at_first
    for _ in range(1000):
        trust.kept("default", 0.5, last=False)
    assert share(trust) == at_first


def test_what_an_overload_taught_is_forgotten_once_nobody_waits() -> None:
    trust = Trust()
    at_first = share(trust)
    for _ in range(10):
        trust.broken("default")
    for _ in range(5):
        trust.kept("default", 0.0, last=True)
    assert share(trust) == at_first


@pytest.mark.parametrize(("used_up", "last"), [(0.0, False), (0.5, True)])
def test_it_is_kept_in_mind_while_somebody_waits(used_up: float, last: bool) -> None:
    """A light tenant comes in at once also where the others wait, and the last of a queue did wait."""
    trust = Trust()
    for _ in range(10):
        trust.broken("default")
    for _ in range(5):
        trust.kept("default", used_up, last=last)
    assert share(trust) < 0.4


def test_it_never_falls_to_nothing() -> None:
    trust = Trust()
    for _ in range(100):
        trust.broken("default")
    assert share(trust) == pytest.approx(0.3)


def test_who_is_next_is_told_to_wait_for_nearly_all_of_the_deadline() -> None:
    trust = Trust()
    for _ in range(100):
        trust.broken("default")
    assert trust.share("default", first=True) == pytest.approx(0.9)


def test_a_class_does_not_pay_for_the_mistakes_made_with_another() -> None:
    trust = Trust()
    before = trust.share("critical", first=False)
    trust.broken("default")
    assert trust.share("critical", first=False) == before
