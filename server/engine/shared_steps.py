"""The steps of an engine that several front-ends share.

The engine sends its account of a step, with what the scheduler counts, to one of them, and to each what it made for it.
The first process hears of all of it, so its gate and its figures are those of the whole engine.
"""

from collections.abc import Callable
from typing import Any, Final

import msgspec
from vllm.config import VllmConfig
from vllm.v1.metrics.loggers import StatLoggerBase
from vllm.v1.metrics.stats import IterationStats, MultiModalCacheStats, SchedulerStats

from server.engine.figures import part_of
from server.engine.vllm_metrics import StepwisePrometheusLogger
from server.policy.forecast import NO_PART, StepPart

_ENCODER: Final = msgspec.msgpack.Encoder()
_DECODER: Final[msgspec.msgpack.Decoder[Any]] = msgspec.msgpack.Decoder(SchedulerStats)

# The index of the engine, its account of the step if it came here, and what the step was for the requests of here.
TellStep = Callable[[int, bytes | None, StepPart], None]


class StepTeller(StatLoggerBase):
    """Passes on what one engine reports to this front-end."""

    def __init__(self, tell: TellStep, engine_index: int) -> None:
        self._tell = tell
        self._engine_index = engine_index

    def record(
        self,
        scheduler_stats: SchedulerStats | None,
        iteration_stats: IterationStats | None,
        mm_cache_stats: MultiModalCacheStats | None = None,
        engine_idx: int = 0,
    ) -> None:
        del mm_cache_stats, engine_idx
        part = part_of(iteration_stats)
        if scheduler_stats is not None or part != NO_PART:
            account = None if scheduler_stats is None else _ENCODER.encode(scheduler_stats)
            self._tell(self._engine_index, account, part)

    def log_engine_initialized(self) -> None:
        """Nothing to say."""


def step_tellers(tell: TellStep) -> Callable[[VllmConfig, int], StatLoggerBase]:
    """A factory for `stat_loggers`."""

    def teller(vllm_config: VllmConfig, engine_index: int = 0) -> StatLoggerBase:
        del vllm_config
        return StepTeller(tell, engine_index)

    return teller


class PartialPrometheusLogger(StepwisePrometheusLogger):
    """vLLM's metrics of this front-end's requests; those of the scheduler are the first process's."""

    def record(
        self,
        scheduler_stats: SchedulerStats | None,
        iteration_stats: IterationStats | None,
        mm_cache_stats: MultiModalCacheStats | None = None,
        engine_idx: int = 0,
    ) -> None:
        del scheduler_stats
        super().record(None, iteration_stats, mm_cache_stats, engine_idx)


def account(encoded: bytes | None) -> SchedulerStats | None:
    """What the scheduler counted in a step."""
    return None if encoded is None else _DECODER.decode(encoded)
