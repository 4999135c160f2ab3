"""vLLM's statistics of a step as our figures."""

import time

import pytest
from vllm.v1.metrics.stats import IterationStats, SchedulerStats

from server.engine.figures import EngineFigures
from server.policy.forecast import Step

pytestmark = pytest.mark.engine


class Clock:
    now_s = 50.0

    def __call__(self) -> float:
        return self.now_s


def scheduled(running: int = 1, waiting: int = 0, usage: float = 0.25) -> SchedulerStats:
    return SchedulerStats(num_running_reqs=running, num_waiting_reqs=waiting, kv_cache_usage=usage)


def iteration(gaps_s: list[float], firsts_s: list[float], tokens: int, preempted: int = 0) -> IterationStats:
    stats = IterationStats()
    stats.inter_token_latencies_iter, stats.time_to_first_tokens_iter = gaps_s, firsts_s
    stats.num_generation_tokens, stats.num_preempted_reqs = tokens, preempted
    return stats


def test_a_step_is_reported_with_its_times_and_tokens() -> None:
    steps: list[Step] = []
    clock = Clock()
    figures = EngineFigures(steps.append, clock)
    done = iteration([], [0.2], 1)
    done.prompt_token_stats.computed, done.prompt_token_stats.cached_tokens = 100, 28
    figures.record(0, scheduled(running=1), done)
    clock.now_s += 0.0625
    figures.record(0, scheduled(running=2, waiting=3, usage=0.5), iteration([0.04, 0.06], [], 2, preempted=1))
    assert steps == [
        Step(1, 0, 0.25, prefilled_tokens=100, cached_tokens=28, generated_tokens=1, prefilling=True, duration_s=0.2),
        Step(2, 3, 0.5, preemptions=1, itl_s=0.05, generated_tokens=2, duration_s=0.0625),
    ]


def test_a_step_of_a_long_prompt_counts_as_prefill_before_it_gives_a_token() -> None:
    steps: list[Step] = []
    figures = EngineFigures(steps.append)
    figures.record(0, scheduled(running=3), iteration([0.1, 0.1], [], 2))
    figures.record(0, scheduled(running=1), None)
    assert [step.prefilling for step in steps] == [True, True]


def test_a_pause_is_not_the_duration_of_the_step_after_it() -> None:
    steps: list[Step] = []
    clock = Clock()
    figures = EngineFigures(steps.append, clock)
    figures.record(0, scheduled(running=0), None)
    clock.now_s += 3600
    figures.record(0, scheduled(running=1), iteration([], [0.3], 1))
    assert steps[-1].duration_s == 0.3


def test_the_engines_of_a_data_parallel_group_are_added_up() -> None:
    steps: list[Step] = []
    figures = EngineFigures(steps.append)
    figures.record(0, scheduled(running=2, waiting=1, usage=0.2), None)
    figures.record(1, scheduled(running=3, waiting=0, usage=0.4), None)
    assert (steps[-1].running, steps[-1].waiting) == (5, 1)
    assert steps[-1].kv_usage_ratio == pytest.approx(0.3)


def test_reporting_costs_a_step_less_than_a_tenth_of_a_millisecond() -> None:
    figures = EngineFigures(lambda _: None)
    done = iteration([0.05] * 64, [], 64)
    started_s = time.perf_counter()
    for _ in range(1000):
        figures.record(0, scheduled(running=64), done)
    assert time.perf_counter() - started_s < 0.1
