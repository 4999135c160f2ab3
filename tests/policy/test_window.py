import pytest

from server.policy.context import Window, default_reserve_tokens, fits_by_bytes, keep_newest
from tests.policy.histories import assistant, calls, fit, result, system, user


@pytest.mark.parametrize(("max_model_len", "reserve_tokens"), [(131_072, 1024), (4096, 1024), (2048, 512), (3, 0)])
def test_the_reserve_is_1024_tokens_or_a_quarter_of_a_small_window(max_model_len: int, reserve_tokens: int) -> None:
    assert default_reserve_tokens(max_model_len) == reserve_tokens


def test_the_short_context_level_halves_what_the_turns_may_take() -> None:
    history = [system(), user(20), assistant(20), user(20), assistant(10), user(10)]
    half = Window(max_model_len=120, reserve_tokens=20, factor=0.5)
    assert not fit(history).truncated
    assert fit(history, half).dropped == (1, 2)
    assert half.turn_budget(head_tokens=10) == (45, 109)


def test_the_short_context_level_refuses_nothing_that_the_window_holds() -> None:
    half = Window(max_model_len=120, reserve_tokens=20, factor=0.5)
    assert fit([user(), assistant(), user(10), calls("a"), result("a", 90)], half).kept == (2, 3, 4)


def test_a_reserve_below_the_shortest_reply_still_leaves_room_for_that_reply() -> None:
    assert fit([user(), assistant(), user(80)], Window(100, reserve_tokens=0)).kept_tokens == 80


def test_a_factor_besides_the_two_is_a_mistake() -> None:
    with pytest.raises(ValueError, match=r"factor is 0\.7"):
        Window(max_model_len=120, reserve_tokens=20, factor=0.7)


def test_a_history_whose_bytes_fit_needs_no_counting() -> None:
    window = Window(max_model_len=1000, reserve_tokens=200, fixed_tokens=100)
    assert fits_by_bytes(600, message_count=10, message_overhead_tokens=10, window=window)
    assert not fits_by_bytes(601, message_count=10, message_overhead_tokens=10, window=window)
    half = Window(max_model_len=1000, reserve_tokens=200, fixed_tokens=100, factor=0.5)
    assert fits_by_bytes(200, message_count=10, message_overhead_tokens=10, window=half)
    assert not fits_by_bytes(201, message_count=10, message_overhead_tokens=10, window=half)


def test_a_plain_prompt_keeps_its_newest_tokens() -> None:
    assert keep_newest(token_count=130, budget=100) == 30
    assert keep_newest(token_count=100, budget=100) == 0
