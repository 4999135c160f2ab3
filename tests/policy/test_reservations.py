import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.policy.reservations import Ask, Capacity, Growth, exceeds_cache, reservation

CAPACITY = Capacity(kv_tokens=1000, block_tokens=16, max_running=8)


def test_a_reservation_is_whole_blocks_of_the_prompt_and_the_growth_that_is_expected() -> None:
    assert reservation(Ask(100, 100), Growth(ratio=0.7), CAPACITY) == 176  # 170 tokens are 11 blocks
    assert reservation(Ask(100, 100, sequences=3), Growth(ratio=0.7), CAPACITY) == 528


def test_a_pooling_request_reserves_its_prompt() -> None:
    assert reservation(Ask(33, 0), Growth(), CAPACITY) == 48


@given(st.integers(0, 5000), st.integers(0, 5000), st.integers(1, 8), st.floats(0.1, 0.7))
def test_a_reservation_covers_what_it_counts_on_and_wastes_less_than_a_block(
    prompt: int, most: int, sequences: int, ratio: float
) -> None:
    growth = Growth(ratio)
    each = reservation(Ask(prompt, most, sequences), growth, CAPACITY) / sequences
    assert prompt + growth.tokens(most) <= each + 1e-6
    assert each < prompt + growth.tokens(most) + CAPACITY.block_tokens


def test_an_answer_without_a_cap_is_not_expected_to_fill_the_window() -> None:
    assert Growth(0.7).tokens(1000) == pytest.approx(700)
    assert Growth(0.7).tokens(100_000) == 1024
    assert Growth(0.7).tokens(300_000, sequences=3) == 3 * 1024


def test_long_answers_are_expected_where_they_were_seen() -> None:
    assert Growth(0.1, used=0.5).tokens(100_000) == 50_000


def test_growth_falls_over_600_steps_without_a_preemption_and_starts_over_with_one() -> None:
    growth = Growth()
    for _ in range(300):
        growth = growth.stepped(preemptions=0)
    assert growth.ratio == pytest.approx(0.4)
    for _ in range(1000):
        growth = growth.stepped(preemptions=0)
    assert growth.ratio == pytest.approx(0.1)
    assert growth.stepped(preemptions=1).ratio == 0.7


def test_what_answers_really_use_counts_where_it_is_more() -> None:
    growth = Growth(ratio=0.1)
    for _ in range(200):
        growth = growth.finished(90, 100, mean_max_tokens=100)
    assert growth.expected == pytest.approx(0.9)
    assert growth.finished(0, 0, mean_max_tokens=100) == growth


def test_a_short_cap_that_is_used_up_says_little_about_long_ones() -> None:
    growth = Growth(ratio=0.1, used=0.1).finished(16, 16, mean_max_tokens=1600)
    assert growth.expected < 0.11


def test_several_answers_must_fit_beside_each_other() -> None:
    assert exceeds_cache(Ask(10, 100, sequences=10), CAPACITY)
    assert not exceeds_cache(Ask(10, 99, sequences=10), CAPACITY)
    assert not exceeds_cache(Ask(10, 5000), CAPACITY)  # one alone is the window's business


def test_batch_work_leaves_room_that_default_work_may_use() -> None:
    limits = [CAPACITY.kv_limit(name) for name in ("critical", "default", "batch")]
    assert limits == [950, 855, 570]
