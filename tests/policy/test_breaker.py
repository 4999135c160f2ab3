from hypothesis import given
from hypothesis import strategies as st

from server.policy.breaker import Breaker, BreakerRules

RULES = BreakerRules(failures=3, first_pause_s=2.0, longest_pause_s=60.0)


def failed(times: int, at_s: float = 0.0) -> Breaker:
    breaker = Breaker(RULES)
    for _ in range(times):
        breaker = breaker.failed(at_s)
    return breaker


def test_it_is_closed_until_three_failures_in_a_row() -> None:
    assert failed(2).allows(0)
    assert not failed(3).allows(0)


def test_a_success_in_between_starts_the_count_anew() -> None:
    assert failed(2).succeeded().failed(0).failed(0).allows(0)


def test_an_open_one_lets_a_single_trial_through_after_its_pause() -> None:
    opened = failed(3)
    assert not opened.allows(1.9)
    assert opened.allows(2.0)
    assert not opened.passed().allows(100.0)


def test_a_trial_that_succeeds_closes_it() -> None:
    assert failed(3).passed().succeeded().closed


def test_a_trial_that_fails_doubles_the_pause_up_to_a_minute() -> None:
    opened, pauses = failed(3), []
    for _ in range(7):
        pauses.append(opened.pause_s)
        opened = opened.passed().failed(0.0)
    assert pauses == [2, 4, 8, 16, 32, 60, 60]


def test_a_trial_that_told_nothing_may_be_tried_again_at_once() -> None:
    assert failed(3).passed().abandoned().allows(2.0)


def test_a_request_that_passes_a_closed_one_is_no_trial() -> None:
    assert Breaker(RULES).passed().allows(0)


@given(st.lists(st.booleans(), max_size=60))
def test_it_always_opens_again_in_the_end(outcomes: list[bool]) -> None:
    breaker, now_s = Breaker(RULES), 0.0
    for well in outcomes:
        now_s += RULES.longest_pause_s
        assert breaker.allows(now_s)
        breaker = breaker.passed()
        breaker = breaker.succeeded() if well else breaker.failed(now_s)
