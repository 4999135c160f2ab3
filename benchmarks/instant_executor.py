"""An engine process whose model takes no time, which any number of front-ends can share.

`--distributed-executor-backend benchmarks.instant_executor.InstantExecutor` puts it below vLLM's own engine process, as
it is: its scheduler, its sockets and its messages are real. Every step gives each scheduled request one token.
"""

import os
import time
from concurrent.futures import Future
from typing import Any, Final

import torch
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.executor.abstract import Executor
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT, ModelRunnerOutput

STEPS_PER_S_ENV: Final = "INSTANT_ENGINE_STEPS_PER_S"
BACKEND: Final = f"{__name__}.InstantExecutor"
_KV_CACHE_BYTES: Final = 1 << 30
_TOKEN_IDS: Final = range(1000, 9000)  # ordinary words in every vocabulary


class InstantExecutor(Executor):  # type: ignore[misc]  # vLLM is not typed for us
    """What an engine asks of its workers."""

    def _init_executor(self) -> None:
        cached = FullAttentionSpec(
            block_size=self.cache_config.block_size, num_kv_heads=1, head_size=8, dtype=torch.float16
        )
        self._answers: dict[str, Any] = {
            "get_supported_tasks": ("generate",),
            "get_kv_cache_spec": {"model.layers.0.self_attn.attn": cached},
            "get_supported_kv_cache_layouts": ["LBNHC"],
            "determine_available_memory": _KV_CACHE_BYTES,
        }
        self._step_s = 1 / float(os.environ.get(STEPS_PER_S_ENV, "25"))
        self._next_step_s = 0.0
        self._prompt_tokens: dict[str, int] = {}
        self._made = 0

    def collective_rpc(self, method: Any, *args: Any, **kwargs: Any) -> Any:
        """The workers' answers; there is one."""
        del args, kwargs
        answer = self._answers.get(method)
        return [] if method == "compile_or_warm_up_model" else [answer]

    def execute_model(self, scheduler_output: SchedulerOutput, non_block: bool = False) -> Any:
        """The tokens of a step, when it is time for it."""
        output = self._tokens(scheduler_output)
        if scheduler_output.num_scheduled_tokens:
            now_s = time.monotonic()
            self._next_step_s = max(self._next_step_s + self._step_s, now_s)
            time.sleep(self._next_step_s - now_s)
        if not non_block:
            return output
        done: Future[ModelRunnerOutput] = Future()
        done.set_result(output)
        return done

    def _tokens(self, scheduled: SchedulerOutput) -> ModelRunnerOutput:
        for gone in scheduled.finished_req_ids:
            self._prompt_tokens.pop(gone, None)
        if not scheduled.num_scheduled_tokens:
            return EMPTY_MODEL_RUNNER_OUTPUT
        cached = scheduled.scheduled_cached_reqs
        computed = dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        for new in scheduled.scheduled_new_reqs:
            self._prompt_tokens[new.req_id] = len(new.prompt_token_ids or ())
            computed[new.req_id] = new.num_computed_tokens
        request_ids = list(scheduled.num_scheduled_tokens)
        return ModelRunnerOutput(
            req_ids=request_ids,
            req_id_to_index={request_id: index for index, request_id in enumerate(request_ids)},
            sampled_token_ids=[
                [self._token()]
                if computed[request_id] + scheduled.num_scheduled_tokens[request_id] >= self._prompt_tokens[request_id]
                else []  # a part of a long prompt
                for request_id in request_ids
            ],
        )

    def _token(self) -> int:
        self._made += 1
        return _TOKEN_IDS[self._made * 37 % len(_TOKEN_IDS)]

    def check_health(self) -> None:
        """There is nothing that could fail."""
