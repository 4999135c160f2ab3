"""Steps are told to Prometheus together, and no sample differs from what vLLM tells one by one."""

import asyncio
import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import REGISTRY, generate_latest
from vllm.config import ModelConfig, VllmConfig
from vllm.v1.engine import FinishReason
from vllm.v1.metrics.loggers import PrometheusStatLogger
from vllm.v1.metrics.prometheus import unregister_vllm_metrics
from vllm.v1.metrics.stats import FinishedRequestStats, IterationStats, PrefixCacheStats, SchedulerStats

from server.engine import vllm_metrics
from server.engine.vllm_metrics import StepwisePrometheusLogger

pytestmark = pytest.mark.engine


@dataclass(frozen=True)
class Told:
    """A step, as the engine's loop tells of it."""

    scheduled: SchedulerStats | None
    done: IterationStats | None


_FINISHED = FinishedRequestStats(FinishReason.LENGTH, "r", 2.0, 5, 0, 7, 16, 0.1, 0.2, 1.5, 1.25, 0.125)


@st.composite
def _steps(draw: st.DrawFn) -> Told:
    scheduled = SchedulerStats(
        num_running_reqs=draw(st.sampled_from([2, 2, 2, 3])),
        num_waiting_reqs=draw(st.sampled_from([0, 0, 0, 1])),
        kv_cache_usage=draw(st.sampled_from([0.125, 0.25])),
    )
    if draw(st.integers(0, 5)) == 0:
        scheduled.prefix_cache_stats = PrefixCacheStats(requests=1, queries=64, hits=32)
    done = IterationStats()
    done.inter_token_latencies_iter = draw(st.lists(st.sampled_from([0.0078125, 0.03125, 0.5, 128.0]), max_size=3))
    done.num_generation_tokens = len(done.inter_token_latencies_iter)
    if draw(st.integers(0, 5)) == 0:
        done.time_to_first_tokens_iter = [0.25]
        done.prompt_token_stats.total = done.prompt_token_stats.computed = 48
        done.num_generation_tokens += 1
    if draw(st.integers(0, 5)) == 0:
        done.finished_requests, done.n_params_iter, done.max_num_generation_tokens_iter = [_FINISHED], [1], [7]
    done.num_preempted_reqs = draw(st.sampled_from([0, 0, 0, 1]))
    absent = draw(st.sampled_from(["neither", "neither", "neither", "scheduled", "done"]))
    return Told(None if absent == "scheduled" else scheduled, None if absent == "done" else done)


class Loggers:
    """Makes loggers of an engine's configuration."""

    def __init__(self, config: VllmConfig) -> None:
        self.config = config

    def vllms(self) -> PrometheusStatLogger:
        unregister_vllm_metrics()
        return PrometheusStatLogger(self.config, [0])

    def ours(self) -> StepwisePrometheusLogger:
        unregister_vllm_metrics()
        return StepwisePrometheusLogger(self.config, [0])


@pytest.fixture(scope="module")
def loggers(embedded_model: Path) -> Loggers:
    return Loggers(VllmConfig(model_config=ModelConfig(model=str(embedded_model))))


@pytest.fixture(autouse=True)
def _no_metrics_stay() -> Iterator[None]:
    yield
    unregister_vllm_metrics()


def _page() -> list[str]:
    lines = generate_latest(REGISTRY).decode().splitlines()
    return [line for line in lines if line.startswith("vllm:") and "_created" not in line]


def _told_by_vllm(loggers: Loggers, steps: Sequence[Told]) -> list[str]:
    logger = loggers.vllms()
    for step in steps:
        logger.record(step.scheduled, step.done)
    return _page()


async def _told_by_us(loggers: Loggers, steps: Sequence[Told]) -> list[str]:
    logger = loggers.ours()
    for step in steps:
        gaps_s = None if step.done is None else list(step.done.inter_token_latencies_iter)
        logger.record(step.scheduled, step.done)
        assert step.done is None or step.done.inter_token_latencies_iter == gaps_s  # other loggers read them
    await asyncio.sleep(0.05)
    return _page()


@settings(max_examples=60)
@given(steps=st.lists(_steps(), max_size=12))
def test_soon_after_the_last_step_the_samples_are_vllms(loggers: Loggers, steps: list[Told]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vllm_metrics, "_TOLD_WITHIN_S", 0.01)
        ours = asyncio.run(_told_by_us(loggers, copy.deepcopy(steps)))
    assert ours == _told_by_vllm(loggers, steps)


def _going_on(usage: float) -> Told:
    done = IterationStats()
    done.inter_token_latencies_iter, done.num_generation_tokens = [0.03125, 0.03125], 2
    return Told(SchedulerStats(num_running_reqs=2, kv_cache_usage=usage), done)


def test_steps_in_which_streams_go_on_are_told_with_the_next_that_says_more(loggers: Loggers) -> None:
    async def run() -> None:
        logger = loggers.ours()
        steps = [_going_on(0.1), _going_on(0.2), _going_on(0.3)]
        logger.record(steps[0].scheduled, steps[0].done)
        before = _page()
        logger.record(steps[1].scheduled, steps[1].done)
        logger.record(steps[2].scheduled, steps[2].done)
        assert _page() == before
        ended = _going_on(0.2)
        assert ended.done is not None
        ended.done.finished_requests = [_FINISHED]
        logger.record(ended.scheduled, ended.done)
        steps.append(ended)
        assert _page() == _told_by_vllm(loggers, steps)

    asyncio.run(run())
