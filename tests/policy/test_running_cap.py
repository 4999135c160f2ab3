import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.policy.running_cap import RunningCap

SLO_S = 0.1


def machine_itl_s(running: int) -> float:
    """A machine on which 25 streams are just fast enough."""
    return 0.05 + 0.002 * running


def driven(cap: RunningCap, steps: int, wanted: int = 1000) -> RunningCap:
    for _ in range(steps):
        running = min(cap.limit, wanted)
        cap = cap.stepped(machine_itl_s(running), running, SLO_S, wanted=wanted > running)
    return cap


def test_the_cap_finds_how_many_streams_are_fast_enough_and_stays_there() -> None:
    cap = driven(RunningCap.up_to(256), 2000)
    seen = []
    for _ in range(500):
        cap = driven(cap, 1)
        seen.append(cap.limit)
    assert min(seen) >= 7
    assert max(seen) <= 30


def test_the_cap_comes_near_within_a_hundred_steps() -> None:
    assert 7 <= driven(RunningCap.up_to(256), 100).limit <= 45


def test_a_cap_that_nobody_reaches_is_not_raised() -> None:
    assert driven(RunningCap.up_to(256), 500, wanted=3).limit == RunningCap.up_to(256).limit


def test_a_cap_that_is_not_obeyed_yet_is_not_lowered_again() -> None:
    cap = RunningCap(limit=20, most=256, starting=False)
    for _ in range(200):
        cap = cap.stepped(1.0, 40, SLO_S, wanted=True)
    assert cap.limit == 20


def test_one_stalled_step_does_not_lower_the_cap() -> None:
    cap = RunningCap(limit=20, most=256, itl_s=0.06, starting=False)
    for itl_s in (9.0, 0.06, 0.06):
        cap = cap.stepped(itl_s, 20, SLO_S, wanted=True)
    assert cap.limit >= 20


def test_a_cap_that_fell_in_a_bad_moment_is_up_again_soon() -> None:
    cap = RunningCap(limit=1, most=64, itl_s=0.2, starting=False)
    steps = 0
    while cap.limit < 16:
        cap, steps = cap.stepped(0.01, cap.limit, SLO_S, wanted=True), steps + 1
    assert steps < 100


def test_a_slow_engine_still_runs_a_few() -> None:
    cap = RunningCap.up_to(256)
    for _ in range(500):
        cap = cap.stepped(9.0, cap.limit, SLO_S, wanted=True)
    assert cap.limit == 3


@pytest.mark.parametrize("itl_s", [0.074, 0.064])
def test_a_pace_that_is_right_for_others_is_too_slow_beside_a_critical_stream(itl_s: float) -> None:
    """Of an objective of 0.1 s: the first is lowered for it, the second is not raised."""
    usual = careful = RunningCap(limit=40, most=64, starting=False)
    for _ in range(20):
        usual = usual.stepped(itl_s, 40, SLO_S, wanted=True)
        careful = careful.stepped(itl_s, 40, SLO_S, wanted=True, careful=True)
    assert careful.limit < usual.limit


def test_an_engine_without_streams_is_not_slowed_down() -> None:
    cap = RunningCap.up_to(64)
    for _ in range(200):
        cap = cap.stepped(None, cap.limit, SLO_S, wanted=True)
    assert cap.limit == 64


@given(st.integers(1, 64), st.lists(st.tuples(st.floats(0, 1), st.integers(0, 80), st.booleans()), max_size=200))
def test_the_cap_stays_between_one_and_what_the_engine_takes(most: int, steps: list[tuple[float, int, bool]]) -> None:
    cap = RunningCap.up_to(most)
    for itl_s, running, wanted in steps:
        cap = cap.stepped(itl_s, running, SLO_S, wanted=wanted)
        assert 1 <= cap.limit <= most


def test_a_slow_minute_with_one_stream_does_not_close_the_door_to_others() -> None:
    cap = RunningCap(limit=32, most=64, starting=False)
    for _ in range(100):
        cap = cap.stepped(1.0, 1, SLO_S, wanted=False)
    assert cap.limit == 32


def test_a_few_streams_always_go_and_more_where_nobody_asked_for_a_pace() -> None:
    asked, unasked = RunningCap.up_to(64), RunningCap.up_to(64, asked=False)
    for _ in range(500):
        asked = asked.stepped(1.0, asked.limit, SLO_S, wanted=True)
        unasked = unasked.stepped(1.0, unasked.limit, SLO_S, wanted=True)
    assert (asked.limit, unasked.limit) == (3, 8)
    assert RunningCap.up_to(1).stepped(1.0, 1, SLO_S, wanted=True).limit == 1


def test_a_limit_that_nobody_reached_promises_nothing() -> None:
    """A crowd brought it down; alone it grew to 256, and the next crowd will bring it back."""
    crowded = driven(RunningCap(limit=64, most=256, starting=False), 1000)
    alone = crowded
    for _ in range(500):
        alone = alone.stepped(0.02, 1, SLO_S, wanted=True)
    assert alone.limit == 256
    assert alone.soon <= 30
    crowd_again = alone
    for _ in range(300):
        crowd_again = crowd_again.stepped(0.02, crowd_again.limit, SLO_S, wanted=True)
    assert crowd_again.soon > 200
