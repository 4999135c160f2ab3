"""The engine without a model, below vLLM's own scheduler."""

from pathlib import Path

import pytest
from vllm import SamplingParams
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.usage.usage_lib import UsageContext
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.engine.core import EngineCore

from benchmarks.instant_executor import BACKEND, STEPS_PER_S_ENV, InstantExecutor
from server.engine.arguments import complete_arguments, parse_arguments

pytestmark = pytest.mark.engine


def request(name: str, prompt_tokens: int, max_tokens: int) -> EngineCoreRequest:
    return EngineCoreRequest(
        request_id=name,
        prompt_token_ids=list(range(prompt_tokens)),
        mm_features=None,
        sampling_params=SamplingParams(max_tokens=max_tokens, ignore_eos=True),
        pooling_params=None,
        arrival_time=0.0,
        lora_request=None,
        cache_salt=None,
        data_parallel_rank=None,
    )


def test_every_request_gets_a_token_a_step_once_its_prompt_is_through(
    tiny_tools_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(STEPS_PER_S_ENV, "100000")
    flags = [
        str(tiny_tools_model), "--max-model-len", "1024", "--max-num-batched-tokens", "64", "--no-async-scheduling",
        "--distributed-executor-backend", BACKEND,
    ]  # fmt: skip
    args = complete_arguments(parse_arguments(flags)).args
    config = AsyncEngineArgs.from_cli_args(args).create_engine_config(UsageContext.OPENAI_API_SERVER)
    core = EngineCore(config, InstantExecutor, log_stats=False)
    tokens: dict[str, list[int]] = {"short": [], "long": []}
    for name, prompt_tokens in (("short", 8), ("long", 150)):
        core.add_request(*core.preprocess_add_request(request(name, prompt_tokens, max_tokens=5)))
    steps = 0
    while core.scheduler.has_requests() and steps < 50:
        outputs, _ = core.step_fn()
        steps += 1
        for output in outputs[0].outputs if outputs else ():
            tokens[output.request_id] += output.new_token_ids
    core.shutdown()
    assert {name: len(made) for name, made in tokens.items()} == {"short": 5, "long": 5}
    assert 5 < steps < 12
