"""Counts an engine's steps: the sign of life that tells a hang from a wait."""

from typing import Any

from vllm.config import VllmConfig
from vllm.v1.metrics.loggers import AggregateStatLoggerBase
from vllm.v1.metrics.stats import IterationStats, MultiModalCacheStats, SchedulerStats


class StepCounter(AggregateStatLoggerBase):
    """A stat logger that vLLM tells of every step of every engine core.

    vLLM reports a step that has no output, such as a part of a long prefill, only to an engine that has a stat logger.
    """

    def __init__(self, vllm_config: VllmConfig, engine_indexes: list[int]) -> None:
        del vllm_config, engine_indexes
        self.steps = 0
        self.asleep = False

    def record(
        self,
        scheduler_stats: SchedulerStats | None,
        iteration_stats: IterationStats | None,
        mm_cache_stats: MultiModalCacheStats | None = None,
        engine_idx: int = 0,
    ) -> None:
        del scheduler_stats, iteration_stats, mm_cache_stats, engine_idx
        self.steps += 1

    def log_engine_initialized(self) -> None:
        """Nothing to say."""

    def record_sleep_state(self, is_awake: int, level: int) -> None:
        """vLLM's own naming: the first argument is 1 when the engine was put to *sleep*."""
        del level
        self.asleep = bool(is_awake)


def step_counter(logger_manager: Any) -> StepCounter:
    """The counter that vLLM made for an engine whose `stat_loggers` name the class."""
    return next(logger for logger in logger_manager.stat_loggers if isinstance(logger, StepCounter))
