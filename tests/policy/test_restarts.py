import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.policy.restarts import HangWatch, Pulse, RestartRules

IDLE = Pulse(steps=5, unfinished=0)
WORKING = Pulse(steps=5, unfinished=2)


def watch(pulse: Pulse = IDLE, timeout_s: float = 30.0) -> HangWatch:
    return HangWatch(timeout_s, 1.0, pulse, 0.0)


def looked(begun: HangWatch, pulse: Pulse, seconds: int) -> HangWatch:
    """The watch after a look in each of so many seconds."""
    start = round(begun.looked_at_s)
    for now_s in range(start + 1, start + seconds + 1):
        begun = begun.look(pulse, float(now_s))
    return begun


def test_a_dead_engine_is_built_again_at_once() -> None:
    assert RestartRules().pause_s(0) == 0


def test_pauses_grow_from_one_second_to_thirty() -> None:
    assert [RestartRules().pause_s(failures) for failures in range(1, 8)] == [1, 2, 4, 8, 16, 30, 30]


def test_five_failed_restarts_in_a_row_are_enough() -> None:
    assert [RestartRules().gives_up(failures) for failures in range(7)] == [False] * 5 + [True] * 2


def test_an_engine_with_requests_and_no_step_is_hung_after_the_timeout() -> None:
    stalled = looked(watch(), WORKING, 30)
    assert not looked(watch(), WORKING, 29).is_hung(WORKING)
    assert stalled.is_hung(WORKING)


def test_an_idle_engine_is_never_hung() -> None:
    assert not looked(watch(), IDLE, 1000).is_hung(IDLE)


def test_a_sleeping_engine_is_never_hung() -> None:
    asleep = Pulse(steps=5, unfinished=2, asleep=True)
    assert not looked(watch(), asleep, 1000).is_hung(asleep)


def test_time_without_requests_does_not_count_against_the_engine() -> None:
    """A request that arrives after an hour of silence has the whole timeout."""
    quiet = looked(watch(), IDLE, 3600)
    assert not looked(quiet, WORKING, 29).is_hung(WORKING)


def test_a_step_starts_the_time_anew() -> None:
    later = Pulse(steps=6, unfinished=2)
    stepped = looked(watch(), WORKING, 29).look(later, 30.0)
    assert stepped.stalled_s == 0
    assert not looked(stepped, later, 29).is_hung(later)


def test_a_machine_that_was_suspended_has_not_hung_its_engine() -> None:
    woken = looked(watch(), WORKING, 5).look(WORKING, 10_000.0)
    assert woken.stalled_s <= 7
    assert not woken.is_hung(WORKING)


@pytest.mark.parametrize(("cores", "seconds", "hung"), [(1.0, 31, False), (0.1, 31, True), (1.0, 300, True)])
def test_processes_that_compute_have_ten_times_as_long(cores: float, seconds: int, hung: bool) -> None:
    """A step of a long prompt on a small machine may be long; processes that wait or are stopped compute nothing."""
    begun = looked(watch(Pulse(5, 0, computing_s=None)), Pulse(5, 0, computing_s=100.0), 1)
    now = Pulse(5, 2, computing_s=100.0 + cores * seconds)
    assert looked(begun, now, seconds).is_hung(now) is hung


def test_a_stopped_process_is_hung_although_another_computes() -> None:
    begun = looked(watch(), Pulse(5, 0, computing_s=1.0), 1)
    stopped = Pulse(5, 2, computing_s=None)
    assert looked(begun, stopped, 30).is_hung(stopped)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2), st.floats(0, 100)), max_size=50), st.floats(0.5, 60))
def test_an_engine_is_hung_only_after_that_much_time_without_a_step(
    looks: list[tuple[int, int, float]], timeout_s: float
) -> None:
    seen, now_s, last_sign_s = watch(Pulse(0, 0), timeout_s), 0.0, 0.0
    steps = 0
    for stepped, unfinished, passed_s in looks:
        steps += stepped
        now_s += passed_s
        pulse = Pulse(steps, unfinished)
        if stepped or not unfinished:
            last_sign_s = now_s
        seen = seen.look(pulse, now_s)
        if seen.is_hung(pulse):
            assert now_s - last_sign_s >= timeout_s - 1e-6
