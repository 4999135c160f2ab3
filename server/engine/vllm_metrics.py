"""vLLM's own Prometheus metrics at a lower price per step and token.

vLLM sets some twenty metrics after every step. In a step in which streams only go on, a few of them change, and nobody
looks at them many times a second: such steps are added up, and told together.
"""

from __future__ import annotations

import asyncio
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from prometheus_client import Histogram
from vllm.config import VllmConfig
from vllm.v1.metrics.loggers import PrometheusStatLogger
from vllm.v1.metrics.stats import IterationStats, MultiModalCacheStats, SchedulerStats

_TOLD_WITHIN_S: Final = 0.5


class HeldObservations:
    """Observations of a histogram that are added to it together. Values that are alike fall into a few buckets."""

    def __init__(self, histogram: Histogram) -> None:
        self._histogram = histogram
        self._bounds: Sequence[float] = histogram._upper_bounds
        self._sum = 0.0
        self._counts: dict[int, int] = {}

    def hold(self, amounts: Sequence[float]) -> None:
        """What `observe` does for each of them, but for the histogram itself."""
        bounds, counts = self._bounds, self._counts
        for amount in amounts:
            bucket = bisect_left(bounds, amount)
            counts[bucket] = counts.get(bucket, 0) + 1
        self._sum += sum(amounts)

    def tell(self) -> None:
        """Add to the histogram what is held."""
        if not self._counts:
            return
        self._histogram._sum.inc(self._sum)
        for bucket, count in self._counts.items():
            self._histogram._buckets[bucket].inc(count)
        self._sum, self._counts = 0.0, {}


@dataclass(slots=True)
class _Held:
    """Of one engine: what is not told yet, and what its scheduler said last."""

    gaps_s: HeldObservations
    step_tokens: HeldObservations
    tokens: int = 0
    scheduled: SchedulerStats | None = None


class StepwisePrometheusLogger(PrometheusStatLogger):
    """vLLM's logger, which tells of steps in which streams only went on within half a second, and together."""

    def __init__(self, vllm_config: VllmConfig, engine_indexes: list[int] | None = None) -> None:
        super().__init__(vllm_config, engine_indexes)
        self._held = {
            index: _Held(
                HeldObservations(self.histogram_inter_token_latency[index]),
                HeldObservations(self.histogram_iteration_tokens[index]),
            )
            for index in self.engine_indexes
        }
        self._timer: asyncio.TimerHandle | None = None

    def record(
        self,
        scheduler_stats: SchedulerStats | None,
        iteration_stats: IterationStats | None,
        mm_cache_stats: MultiModalCacheStats | None = None,
        engine_idx: int = 0,
    ) -> None:
        held, done = self._held[engine_idx], iteration_stats
        if done is not None:
            held.gaps_s.hold(done.inter_token_latencies_iter)
            asked = mm_cache_stats is not None and mm_cache_stats.requests
            if _goes_on(done) and not asked and self._is_as_before(held, scheduler_stats):
                held.tokens += done.num_generation_tokens
                held.step_tokens.hold((done.num_generation_tokens,))
                held.scheduled = scheduler_stats
                self._tell_soon()
                return
        self._tell_held()
        held.scheduled = scheduler_stats
        gaps_s: list[float] = []
        if done is not None:
            gaps_s, done.inter_token_latencies_iter = done.inter_token_latencies_iter, []
        super().record(scheduler_stats, done, mm_cache_stats, engine_idx)
        if done is not None:
            done.inter_token_latencies_iter = gaps_s  # other loggers read them

    def _is_as_before(self, held: _Held, now: SchedulerStats | None) -> bool:
        """Whether the scheduler has nothing to tell but how full the KV cache is."""
        before = held.scheduled
        if now is None or before is None:
            return now is before
        return (
            now.num_running_reqs == before.num_running_reqs
            and now.num_waiting_reqs == before.num_waiting_reqs
            and now.num_skipped_waiting_reqs == before.num_skipped_waiting_reqs
            and now.num_kv_fetch_reqs_by_stage == before.num_kv_fetch_reqs_by_stage
            and not now.prefix_cache_stats.requests
            and now.connector_prefix_cache_stats is None
            and now.spec_decoding_stats is None
            and now.kv_connector_stats is None
            and now.ec_connector_stats is None
            and now.perf_stats is None
            and not now.kv_cache_eviction_events
            and self.gauge_lora_info is None
        )

    def _tell_soon(self) -> None:
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(_TOLD_WITHIN_S, self._tell_held)

    def _tell_held(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        for index, held in self._held.items():
            held.gaps_s.tell()
            held.step_tokens.tell()
            self.counter_generation_tokens[index].inc(held.tokens)
            held.tokens = 0
            if held.scheduled is not None:
                self.gauge_kv_cache_usage[index].set(held.scheduled.kv_cache_usage)


def _goes_on(done: IterationStats) -> bool:
    """Whether a step gave tokens to sequences that had some before and have not ended, and did nothing else."""
    return not (
        done.finished_requests
        or done.time_to_first_tokens_iter
        or done.prompt_token_stats.total
        or done.num_preempted_reqs
        or done.n_params_iter
        or done.max_num_generation_tokens_iter
    )


def prometheus_logger(logger_manager: Any) -> PrometheusStatLogger:
    """The logger of an engine that keeps vLLM's metrics."""
    return next(logger for logger in logger_manager.stat_loggers if isinstance(logger, PrometheusStatLogger))
