"""One engine's steps, told in parts by several front-ends."""

from typing import Any

import pytest
from vllm.v1.metrics.stats import IterationStats, SchedulerStats

from server.engine.figures import EngineFigures, part_of
from server.engine.shared_steps import StepTeller, account
from server.policy.forecast import NO_PART, Step, StepPart

pytestmark = pytest.mark.engine


def done(gaps_s: list[float], generated: int, computed: int = 0) -> IterationStats:
    stats = IterationStats()
    stats.inter_token_latencies_iter, stats.num_generation_tokens = gaps_s, generated
    stats.prompt_token_stats.computed = computed
    return stats


def test_the_parts_of_a_step_are_one_step_when_the_engines_account_is_there() -> None:
    steps: list[Step] = []
    figures = EngineFigures(steps.append, shared=True)
    figures.record(0, None, done([0.1, 0.3], 2, computed=50))
    assert steps == []
    figures.take(0, SchedulerStats(num_running_reqs=3, kv_cache_usage=0.25), StepPart(gaps=1, gaps_s=0.2, generated=1))
    (step,) = steps
    assert (step.running, step.kv_usage_ratio, step.generated_tokens) == (3, 0.25, 3)
    assert step.itl_s == pytest.approx(0.2)
    assert step.prefilled_tokens == 50
    assert not step.prefilling
    figures.take(0, SchedulerStats(num_running_reqs=3), NO_PART)
    assert (steps[1].generated_tokens, steps[1].itl_s) == (0, None)


def test_an_engine_with_one_front_end_has_no_parts() -> None:
    steps: list[Step] = []
    figures = EngineFigures(steps.append)
    figures.record(0, None, done([0.1], 1))
    figures.record(0, SchedulerStats(num_running_reqs=1), None)
    assert [step.generated_tokens for step in steps] == [0]


def test_a_front_end_tells_what_a_step_was_for_it_and_the_account_that_came_to_it() -> None:
    told: list[tuple[int, Any, StepPart]] = []
    teller = StepTeller(lambda *step: told.append(step), 3)
    teller.record(None, None)
    assert told == []
    mine, stats = done([0.1], 1), SchedulerStats(num_running_reqs=1)
    teller.record(None, mine)
    teller.record(stats, None)
    assert told[0] == (3, None, part_of(mine))
    assert account(told[1][1]) == stats
    assert told[1][2] == NO_PART
