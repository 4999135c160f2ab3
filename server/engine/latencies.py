"""vLLM's own Prometheus metrics at a lower price per token."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from typing import Any

from prometheus_client import Histogram
from vllm.v1.metrics.loggers import PrometheusStatLogger
from vllm.v1.metrics.stats import IterationStats, MultiModalCacheStats, SchedulerStats


class StepwisePrometheusLogger(PrometheusStatLogger):
    """vLLM's logger, which observes the inter-token latencies of a step together.

    The streams of a step have nearly the same latency, so that they fall into one or two buckets.
    """

    def record(
        self,
        scheduler_stats: SchedulerStats | None,
        iteration_stats: IterationStats | None,
        mm_cache_stats: MultiModalCacheStats | None = None,
        engine_idx: int = 0,
    ) -> None:
        latencies_s: list[float] = []
        if iteration_stats is not None:
            latencies_s, iteration_stats.inter_token_latencies_iter = iteration_stats.inter_token_latencies_iter, []
        super().record(scheduler_stats, iteration_stats, mm_cache_stats, engine_idx)
        if iteration_stats is not None:
            iteration_stats.inter_token_latencies_iter = latencies_s  # other loggers read them
        observe_all(self.histogram_inter_token_latency[engine_idx], latencies_s)


def prometheus_logger(logger_manager: Any) -> PrometheusStatLogger:
    """The logger of an engine that keeps vLLM's metrics."""
    return next(logger for logger in logger_manager.stat_loggers if isinstance(logger, PrometheusStatLogger))


def observe_all(histogram: Histogram, amounts: Sequence[float]) -> None:
    """What `histogram.observe` does for each amount, with one addition per bucket."""
    if not amounts:
        return
    histogram._sum.inc(sum(amounts))
    bounds = histogram._upper_bounds
    for bucket, count in Counter(bisect_left(bounds, amount) for amount in amounts).items():
        histogram._buckets[bucket].inc(count)
