from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.policy.ladder import Ladder, LadderRules, Level, Pin, at_rest, effective, step, with_engine_state

RULES = LadderRules(highest=Level.FALLBACK)
PIN = Pin(Level.SHORT_CONTEXT, "a test", "somebody", 60.0)
INTERVAL_S = 0.25


def under(pressure: float, seconds: float, ladder: Ladder | None = None, rules: LadderRules = RULES) -> Ladder:
    """The ladder after so long under one pressure, sampled four times a second."""
    ladder = ladder or Ladder()
    start_s = ladder.seen_at_s or 0.0
    for i in range(1, round(seconds / INTERVAL_S) + 1):
        ladder = step(ladder, pressure, start_s + i * INTERVAL_S, rules)
    return ladder


def test_two_seconds_of_high_pressure_lead_one_level_up() -> None:
    assert under(3.0, 2.0).level == Level.NORMAL
    assert under(3.0, 2.5).level == Level.ECONOMY


def test_a_short_burst_leads_nowhere() -> None:
    ladder = under(0.0, 60.0)
    for _ in range(5):
        ladder = under(0.0, 20.0, under(10.0, 1.0, ladder))
        assert ladder.level == Level.NORMAL


def rested() -> Ladder:
    """The ladder after a while of looks that are a second apart."""
    ladder = Ladder()
    for second in range(60):
        ladder = step(ladder, 0.01, second, RULES)
    return ladder


def test_a_moment_of_high_pressure_after_a_pause_counts_like_any_other() -> None:
    ladder = step(rested(), 20.0, 60.0, RULES)
    for i in range(1, 80):
        ladder = step(ladder, 0.0, 60.0 + i * INTERVAL_S, RULES)
        assert ladder.level == Level.NORMAL


def test_pressure_that_comes_in_a_pause_leads_up_as_from_its_end() -> None:
    ladder, from_s = rested(), 60.0
    for i in range(round(2.5 / INTERVAL_S) + 1):
        ladder = step(ladder, 9.0, from_s + i * INTERVAL_S, RULES)
    assert ladder.level == Level.ECONOMY


def test_it_is_at_rest_at_its_foot_without_pressure_and_nowhere_else() -> None:
    assert at_rest(Ladder(), RULES)
    assert at_rest(under(0.4, 60.0), RULES)
    assert not at_rest(under(0.6, 60.0), RULES)
    high = under(9.0, 3.0)
    assert not at_rest(under(0.0, 10.0, high), RULES)
    assert at_rest(under(0.0, 60.0, high), RULES)


def test_it_stays_five_seconds_on_each_level_on_the_way_up() -> None:
    reached: dict[Level, float] = {}
    ladder = Ladder()
    for i in range(1, 200):
        ladder = step(ladder, 9.0, i * INTERVAL_S, RULES)
        reached.setdefault(ladder.level, i * INTERVAL_S)
    times = [reached[level] for level in (Level.ECONOMY, Level.SHORT_CONTEXT, Level.ESSENTIAL, Level.FALLBACK)]
    assert [later - earlier for earlier, later in pairwise(times)] == [5.0, 5.0, 5.0]


def test_pressure_alone_goes_no_higher_than_the_rules_allow() -> None:
    assert under(100.0, 300.0).level == Level.FALLBACK
    assert under(100.0, 300.0, rules=LadderRules(highest=Level.NORMAL)).level == Level.NORMAL


def test_fifteen_seconds_of_low_pressure_lead_one_level_down() -> None:
    high = under(9.0, 8.0)
    assert high.level == Level.SHORT_CONTEXT
    assert under(0.0, 17.0, high).level == Level.SHORT_CONTEXT  # the average takes three seconds to fall below
    assert under(0.0, 18.5, high).level == Level.ECONOMY
    assert under(0.0, 40.0, high).level == Level.NORMAL


@pytest.mark.parametrize("pressure", [0.55, 0.95])
def test_between_the_thresholds_it_stays_where_it_is(pressure: float) -> None:
    assert under(pressure, 600.0, under(pressure, 5.0)).level == Level.NORMAL
    high = under(9.0, 3.0)
    assert high.level == Level.ECONOMY
    settled = under(pressure, 5.0, high)
    assert under(pressure, 600.0, settled).level == settled.level


@given(st.lists(st.tuples(st.floats(0, 20), st.floats(0.01, 20)), max_size=200))
def test_it_moves_by_single_levels_that_last_and_within_its_bounds(samples: list[tuple[float, float]]) -> None:
    ladder, now_s = Ladder(), 0.0
    moved_at_s: float | None = None
    for pressure, passed_s in samples:
        now_s += passed_s
        before = ladder.level
        ladder = step(ladder, pressure, now_s, RULES)
        assert Level.NORMAL <= ladder.level <= RULES.highest
        assert abs(ladder.level - before) <= 1
        if ladder.level != before:
            assert moved_at_s is None or now_s - moved_at_s >= RULES.dwell_s
            moved_at_s = now_s


@given(st.lists(st.floats(0, 1.0), max_size=100), st.floats(0.01, 5))
def test_pressure_that_is_never_high_never_leads_up(samples: list[float], interval_s: float) -> None:
    ladder = Ladder()
    for i, pressure in enumerate(samples):
        ladder = step(ladder, pressure, i * interval_s, RULES)
        assert ladder.level == Level.NORMAL


@given(st.lists(st.floats(0, 20), min_size=1, max_size=50), st.floats(0.01, 5))
def test_the_average_stays_between_its_samples(samples: list[float], interval_s: float) -> None:
    ladder = Ladder()
    for i, pressure in enumerate(samples):
        ladder = step(ladder, pressure, i * interval_s, RULES)
        assert min(samples) - 1e-9 <= ladder.pressure <= max(samples) + 1e-9


def test_a_pin_overrules_pressure_either_way() -> None:
    assert effective(under(9.0, 60.0), PIN) == Level.SHORT_CONTEXT
    assert effective(Ladder(), PIN) == Level.SHORT_CONTEXT
    assert effective(Ladder(), None) == Level.NORMAL


@pytest.mark.parametrize("level", list(Level))
def test_an_engine_that_is_down_counts_as_level_four_where_a_fallback_exists(level: Level) -> None:
    assert with_engine_state(level, engine_down=True, has_fallback=True) == max(level, Level.FALLBACK)
    assert with_engine_state(level, engine_down=False, has_fallback=True) == level


def test_without_a_fallback_level_four_is_level_three() -> None:
    assert with_engine_state(Level.FALLBACK, engine_down=True, has_fallback=False) == Level.ESSENTIAL
    assert with_engine_state(Level.NORMAL, engine_down=True, has_fallback=False) == Level.NORMAL
    assert with_engine_state(Level.CLOSED, engine_down=False, has_fallback=False) == Level.CLOSED
