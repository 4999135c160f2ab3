"""What the engine really does, step by step, and what it does when it has nothing else to do."""

import asyncio
import time
from collections.abc import Callable
from contextlib import aclosing, suppress
from typing import Any, Final

from vllm.config import VllmConfig
from vllm.inputs.engine import tokens_input
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineGenerateError
from vllm.v1.metrics.loggers import StatLoggerBase
from vllm.v1.metrics.stats import IterationStats, SchedulerStats

from server.policy.forecast import NO_PART, Step, StepPart
from server.policy.objectives import Unloaded
from server.policy.reservations import Capacity

# Long enough for its prefill to be more than the overhead of a step, short enough to be over at once.
_PROBE_PROMPT_TOKENS: Final = 256
_PROBE_TOKENS: Final = 8
_WARM_UP_TOKENS: Final = 2
_PROBE_TIMEOUT_S: Final = 2.0
_LONG_PROBE_S: Final = 0.5
_FIRST_PROBE_TOKEN: Final = 100


class EngineFigures:
    """Makes vLLM report every step to `listener`. One object serves all engines of a data-parallel group.

    `shared`: the engine has other front-ends as well. It gives its account of a step to one of them, and what the step
    was for the requests of each to each; the parts are added up until an account comes.
    """

    def __init__(
        self, listener: Callable[[Step], None], clock: Callable[[], float] = time.perf_counter, *, shared: bool = False
    ) -> None:
        self._listener = listener
        self._clock = clock
        self._shared = shared
        self._part = NO_PART
        self._latest: dict[int, tuple[int, int, float]] = {}
        self._last_s: float | None = None

    def logger(self, vllm_config: VllmConfig, engine_index: int = 0) -> StatLoggerBase:
        """A factory for `stat_loggers`."""
        del vllm_config
        return _StepLogger(self, engine_index)

    def record(self, engine_index: int, scheduled: SchedulerStats | None, done: IterationStats | None) -> None:
        """Take one step's statistics: a few additions, since every running stream waits meanwhile."""
        if scheduled is not None or self._shared:
            self.take(engine_index, scheduled, part_of(done))

    def take(self, engine_index: int, scheduled: SchedulerStats | None, part: StepPart) -> None:
        """Take an account of a step and a part of it, or a part alone, which belongs to the next account."""
        if self._part is not NO_PART:
            part = self._part + part
        self._part = NO_PART if scheduled is not None else part
        if scheduled is not None:
            self._tell(engine_index, scheduled, part)

    def _tell(self, engine_index: int, scheduled: SchedulerStats, part: StepPart) -> None:
        now_s = self._clock()
        waiting = scheduled.num_waiting_reqs + scheduled.num_skipped_waiting_reqs
        self._latest[engine_index] = latest = (scheduled.num_running_reqs, waiting, scheduled.kv_cache_usage)
        running, waiting, usage = latest if len(self._latest) == 1 else self._of_all_engines()
        step = Step(
            running=running,
            waiting=waiting,
            kv_usage_ratio=usage,
            preemptions=part.preempted,
            itl_s=part.gaps_s / part.gaps if part.gaps else None,
            prefilled_tokens=part.computed,
            cached_tokens=part.cached,
            generated_tokens=part.generated,
            prefilling=scheduled.num_running_reqs + part.finished > part.gaps,
            duration_s=self._duration_s(now_s, part.first_s),
        )
        self._last_s = now_s if running or waiting else None
        self._listener(step)

    def _of_all_engines(self) -> tuple[int, int, float]:
        """The sequences that run and that wait, and the mean use of the caches."""
        running, waiting, usage = zip(*self._latest.values(), strict=True)
        return sum(running), sum(waiting), sum(usage) / len(usage)

    def _duration_s(self, now_s: float, first_token_s: float | None) -> float:
        """Since the previous step; after a pause, since the request that ended it arrived."""
        if self._last_s is not None:
            return now_s - self._last_s
        return first_token_s or 0.0


def part_of(done: IterationStats | None) -> StepPart:
    """What a step was for the requests of this process."""
    if done is None:
        return NO_PART
    gaps_s, prompts = done.inter_token_latencies_iter, done.prompt_token_stats
    return StepPart(
        gaps=len(gaps_s),
        gaps_s=sum(gaps_s),
        first_s=max(done.time_to_first_tokens_iter, default=None),
        finished=len(done.finished_requests),
        preempted=done.num_preempted_reqs,
        computed=prompts.computed,
        cached=prompts.cached_tokens,
        generated=done.num_generation_tokens,
    )


class _StepLogger(StatLoggerBase):
    """One engine's reporter, in the shape that vLLM calls."""

    def __init__(self, figures: EngineFigures, engine_index: int) -> None:
        self._figures = figures
        self._engine_index = engine_index

    def record(
        self,
        scheduler_stats: SchedulerStats | None,
        iteration_stats: IterationStats | None,
        mm_cache_stats: Any = None,
        engine_idx: int = 0,
    ) -> None:
        del mm_cache_stats, engine_idx
        self._figures.record(self._engine_index, scheduler_stats, iteration_stats)

    def log_engine_initialized(self) -> None:
        """Nothing to say: `ready` follows."""


def capacity_of(config: VllmConfig) -> Capacity:
    """What an engine that has started can hold. One block is the null block, and no request ever gets it."""
    cache, replicas = config.cache_config, config.parallel_config.data_parallel_size
    usable = max(0, (cache.kv_cache_size_tokens or 0) - cache.block_size)
    return Capacity(usable * replicas, cache.block_size, config.scheduler_config.max_num_seqs * replicas)


async def measure_unloaded(engine: AsyncLLM) -> Unloaded | None:
    """Generate a few tokens, and time them; None where that takes more than two seconds or is not possible.

    A first request, which is always slow, goes before. The requests do not pass our seam. An engine that is through
    with the prompt in hardly more than a step's own time gets a longer one: what it has to spare shows only there.
    """
    if engine.model_config.is_encoder_decoder:
        return None
    prompt_tokens = min(_PROBE_PROMPT_TOKENS, engine.model_config.max_model_len // 2)
    with suppress(TimeoutError, EngineGenerateError, ValueError):
        async with asyncio.timeout(_PROBE_TIMEOUT_S):
            await _timed(engine, 1, _WARM_UP_TOKENS)
            times_s = await _timed(engine, prompt_tokens, _PROBE_TOKENS)
        ttft_s, rest_s = times_s[0], times_s[-1] - times_s[0]
        rate = await _rate_of_a_long_prompt(engine, prompt_tokens, prompt_tokens / ttft_s)
        return Unloaded(ttft_s, rest_s / max(1, len(times_s) - 1), rate)
    return None


async def _rate_of_a_long_prompt(engine: AsyncLLM, measured_tokens: int, rate: float) -> float:
    """Prompt tokens per second, by a prompt that fills a step; `rate` where one would take too long."""
    config = engine.vllm_config
    most = min(config.model_config.max_model_len // 2, config.scheduler_config.max_num_batched_tokens)
    prompt_tokens = min(most, int(rate * _LONG_PROBE_S))
    if prompt_tokens < 2 * measured_tokens:
        return rate
    with suppress(TimeoutError, EngineGenerateError, ValueError):
        async with asyncio.timeout(_PROBE_TIMEOUT_S):
            (ttft_s,) = await _timed(engine, prompt_tokens, 1)
            return max(rate, prompt_tokens / ttft_s)
    return rate


async def _timed(engine: AsyncLLM, prompt_tokens: int, tokens: int) -> list[float]:
    """Seconds from the start to each output."""
    vocabulary = engine.model_config.get_vocab_size()
    ids = [(_FIRST_PROBE_TOKEN + prompt_tokens + i) % vocabulary for i in range(prompt_tokens)]
    sampling = SamplingParams(max_tokens=tokens, ignore_eos=True, temperature=0.0, output_kind=RequestOutputKind.DELTA)
    started_s = time.perf_counter()
    outputs = AsyncLLM.generate(engine, tokens_input(ids), sampling, f"probe-{prompt_tokens}")
    async with aclosing(outputs) as generated:
        return [time.perf_counter() - started_s async for _ in generated]
