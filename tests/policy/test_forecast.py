import pytest

from server.policy.forecast import Rates, Step, place_wait_s, retry_after_s
from server.policy.objectives import Objectives, Unloaded

UNLOADED = Unloaded(ttft_s=0.1, tpot_s=0.03, prefill_tokens_per_s=2000)


def prefill(tokens: int, duration_s: float) -> Step:
    return Step(1, 0, 0.1, prefilled_tokens=tokens, prefilling=True, duration_s=duration_s)


def test_the_prefill_rate_is_tokens_over_the_time_of_the_steps_that_worked_on_them() -> None:
    rates = Rates().stepped(Step(1, 0, 0.1, prefilling=True, duration_s=0.3)).stepped(prefill(1000, 0.2))
    assert rates.prefill_tokens_per_s(None) == pytest.approx(2000)
    assert rates.pending_prefill_s == 0


def test_steps_that_only_decode_do_not_count_as_prefill() -> None:
    decode = Step(1, 0, 0.1, itl_s=0.05, generated_tokens=1, duration_s=9.0)
    assert Rates().stepped(decode).stepped(prefill(1000, 0.5)).prefill_tokens_per_s(None) == pytest.approx(2000)


def test_before_any_prompt_the_unloaded_rate_counts() -> None:
    assert Rates().prefill_tokens_per_s(UNLOADED) == 2000
    assert Rates().prefill_tokens_per_s(None) == 0


def test_prompts_in_slow_steps_do_not_make_a_burst_look_endless() -> None:
    rates = Rates()
    for _ in range(100):
        rates = rates.stepped(prefill(100, 1.0))
    assert rates.prefill_tokens_per_s(UNLOADED) == 200


def test_the_decode_rate_follows_the_steps() -> None:
    rates = Rates()
    for _ in range(200):
        rates = rates.stepped(Step(8, 0, 0.1, itl_s=0.05, generated_tokens=8, duration_s=0.05))
    assert rates.decode_tokens_per_s == pytest.approx(160, rel=0.01)


def test_places_turn_over_by_littles_law() -> None:
    assert place_wait_s(needed=4, limit=8, residence_s=6) == 3
    assert place_wait_s(needed=-2, limit=8, residence_s=6) == 0


def test_the_first_to_end_do_not_say_how_long_the_others_stay() -> None:
    """The short ones end first. What answers' lengths say counts until enough have ended."""
    rates = Rates()
    assert rates.residence_with(8.0) == 8.0
    rates = rates.released(1.0)
    assert rates.residence_s == 1.0
    assert 7.0 < rates.residence_with(8.0) < 8.0
    rates = rates.released(3.0)
    assert rates.residence_s == 2.0
    for _ in range(100):
        rates = rates.released(3.0)
    assert rates.residence_with(8.0) == pytest.approx(3.0, abs=0.01)


def test_a_prompt_that_was_given_up_costs_the_next_one_nothing() -> None:
    rates = Rates().stepped(Step(1, 0, 0.1, prefilling=True, duration_s=20.0))
    assert rates.paused().stepped(prefill(1000, 0.5)).prefill_tokens_per_s(None) == 2000
    assert rates.stepped(prefill(1000, 0.5)).prefill_tokens_per_s(None) < 50


def test_prompts_from_the_prefix_cache_say_nothing_about_the_speed_of_others() -> None:
    rates = Rates().stepped(prefill(1000, 0.5))
    for _ in range(50):
        rates = rates.stepped(prefill(5, 0.1))
    assert rates.prefill_tokens_per_s(None) == pytest.approx(2000)
    assert rates.pending_prefill_s == 0


def test_prompts_that_take_no_longer_than_a_step_do_not_make_a_fast_engine_look_slow() -> None:
    """A GPU computes 100 tokens in the time of one; thousands more would have fitted."""
    fast = Unloaded(ttft_s=0.02, tpot_s=0.015, prefill_tokens_per_s=50_000)
    rates = Rates()
    for _ in range(50):
        rates = rates.stepped(prefill(100, 0.02), fast)
    assert rates.prefill_tokens_per_s(fast) == 50_000
    assert rates.stepped(prefill(6000, 0.2), fast).prefill_tokens_per_s(fast) == pytest.approx(30_000)


def test_a_retry_is_spread_over_a_quarter_and_never_at_once() -> None:
    assert retry_after_s(8, 0.0) == 8
    assert retry_after_s(8, 1.0) == 10
    assert retry_after_s(0.01, 0.0) == 1


def test_unset_objectives_are_multiples_of_the_unloaded_figures() -> None:
    slow = Unloaded(ttft_s=8.0, tpot_s=0.8, prefill_tokens_per_s=100)
    assert Objectives().ttft("default", slow) == 40
    assert Objectives().tpot(slow) == 1.6


def test_unset_objectives_leave_a_fast_engine_room() -> None:
    assert Objectives().ttft("critical", UNLOADED) == 10
    assert Objectives().tpot(Unloaded(0.01, 0.001, 1e6)) == 1
    assert Objectives().ttft("batch", UNLOADED) == 600


def test_an_engine_that_could_not_be_measured_is_taken_for_a_slow_one() -> None:
    assert Objectives().ttft("default", None) == 60
    assert Objectives().tpot(None) == 1.0


def test_what_the_operator_sets_counts_and_the_strictest_pace_holds_for_all() -> None:
    objectives = Objectives({"default": 0.5}, {"critical": 0.05, "default": 0.2})
    assert objectives.ttft("default", UNLOADED) == 0.5
    assert objectives.ttft("critical", UNLOADED) == 10
    assert objectives.tpot(UNLOADED) == 0.05


def test_a_pace_that_one_stream_alone_does_not_have_is_not_asked_of_many() -> None:
    objectives = Objectives(tpot_s={"default": 0.02})
    assert objectives.tpot(UNLOADED) == pytest.approx(1.5 * UNLOADED.tpot_s)
    assert objectives.tpot(None) == 0.02
