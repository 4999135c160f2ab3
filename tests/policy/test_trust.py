"""How far forecasts are trusted follows their mistakes."""

import pytest

from server.policy.trust import Trust


def test_who_waits_in_vain_makes_the_next_wait_shorter_and_others_earn_it_back() -> None:
    trust = Trust()
    at_first = trust.share("default")
    trust.broken("default")
    after = trust.share("default")
    assert after < at_first
    for _ in range(40):
        trust.kept("default")
    assert after < trust.share("default") < at_first
    for _ in range(1000):
        trust.kept("default")
    assert trust.share("default") == at_first


def test_it_never_falls_to_nothing() -> None:
    trust = Trust()
    for _ in range(100):
        trust.broken("default")
    assert trust.share("default") == pytest.approx(0.3)


def test_a_class_does_not_pay_for_the_mistakes_made_with_another() -> None:
    trust = Trust()
    before = trust.share("critical")
    trust.broken("default")
    assert trust.share("critical") == before
