"""What is known of an engine that has nothing else to do."""

from server.policy.forecast import Step
from server.policy.objectives import Alone, Unloaded
from tests.policy.door import Door

MEASURED = Unloaded(ttft_s=0.2, tpot_s=0.08, prefill_tokens_per_s=1000)


def test_a_start_in_a_slow_moment_is_corrected_by_a_stream_that_runs_alone() -> None:
    alone, unloaded = Alone(), MEASURED
    for _ in range(100):
        unloaded = alone.stepped(unloaded, 0.04, alone=True) or unloaded
    assert 0.04 <= unloaded.tpot_s < 0.042
    assert unloaded.ttft_s == MEASURED.ttft_s
    assert alone.stepped(unloaded, 0.2, alone=True) == unloaded  # a slow moment later says nothing


def test_a_few_steps_say_nothing() -> None:
    alone = Alone()
    for _ in range(10):
        for _ in range(15):
            assert alone.stepped(MEASURED, 0.01, alone=True) == MEASURED
        assert alone.stepped(MEASURED, 0.01, alone=False) == MEASURED


def test_an_engine_that_could_not_be_measured_stays_unknown() -> None:
    alone = Alone()
    assert all(alone.stepped(None, 0.01, alone=True) is None for _ in range(100))


def test_the_gate_learns_it_from_a_single_stream_and_from_no_other() -> None:
    door = Door()
    door.ticket()
    door.let_in()
    for _ in range(100):
        door.admission.stepped(Step(1, 0, 0.1, itl_s=0.01))
    assert door.admission.unloaded is not None
    learnt_s = door.admission.unloaded.tpot_s
    assert learnt_s < 0.011
    door.ticket()
    door.let_in()
    for _ in range(100):
        door.admission.stepped(Step(2, 0, 0.1, itl_s=0.001))
    assert door.admission.unloaded.tpot_s == learnt_s
