"""The doctor's arithmetic against vLLM's own, for models that do not fit on a test machine."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.core.kv_cache_utils import get_kv_cache_capacity, get_kv_cache_config_from_groups, get_kv_cache_groups
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheSpec, MLAAttentionSpec, SlidingWindowSpec

from server.policy.model_shape import LayerKind, ModelShape, shape_of
from server.policy.sizing import GIB, Layout, fit
from tests.policy.known_models import (
    DEEPSEEK_V3,
    GEMMA_2_9B,
    GPT_OSS_20B,
    LLAMA_3_1_8B,
    MISTRAL_7B,
    QWEN_2_5_7B,
)

pytestmark = pytest.mark.engine

GEMMA_3: dict[str, Any] = {**GEMMA_2_9B, "model_type": "gemma3_text", "num_hidden_layers": 34, "sliding_window": 1024}
BLOCK = 16
MEMORY = 24 * GIB


@pytest.fixture(scope="module")
def config(tiny_tools_model: Path) -> Iterator[VllmConfig]:
    """A configuration of vLLM's; only its limits count here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        made = EngineArgs(model=str(tiny_tools_model), enforce_eager=True).create_engine_config()
        made.cache_config.kv_cache_layout = "LBHNC"
        yield made


def spec_of(kind: LayerKind, shape: ModelShape, ranks: int) -> KVCacheSpec:
    """What vLLM's model would say of one of its layers."""
    if shape.latent_dim is not None:
        return MLAAttentionSpec(
            block_size=BLOCK, num_kv_heads=1, head_size=shape.latent_dim, dtype=torch.bfloat16
        )  # fmt: skip
    heads = max(1, shape.kv_heads // ranks)
    if kind == "full":
        return FullAttentionSpec(
            block_size=BLOCK, num_kv_heads=heads, head_size=shape.head_dim, dtype=torch.bfloat16
        )  # fmt: skip
    assert shape.window is not None
    return SlidingWindowSpec(
        block_size=BLOCK, num_kv_heads=heads, head_size=shape.head_dim, dtype=torch.bfloat16,
        sliding_window=shape.window,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("model", "max_model_len", "ranks"),
    [
        (LLAMA_3_1_8B, 8192, 1),
        (LLAMA_3_1_8B, 131072, 2),
        (QWEN_2_5_7B, 32768, 1),
        (QWEN_2_5_7B, 32000, 4),
        (GEMMA_2_9B, 8192, 1),
        (GEMMA_3, 8192, 1),
        (GPT_OSS_20B, 131072, 2),
        (MISTRAL_7B, 32768, 1),
        (DEEPSEEK_V3, 163840, 8),
    ],
    ids=["llama", "llama-2", "qwen", "qwen-4", "gemma2", "gemma3", "gpt-oss-2", "mistral", "deepseek-8"],
)
def test_the_doctor_reckons_as_vllm_does(
    config: VllmConfig, model: dict[str, Any], max_model_len: int, ranks: int
) -> None:
    shape = shape_of(model)
    config.model_config.max_model_len = max_model_len
    specs = {f"layer.{i}": spec_of(kind, shape, ranks) for i, kind in enumerate(shape.layers)}
    planned = get_kv_cache_config_from_groups(config, get_kv_cache_groups(config, specs), MEMORY)
    tokens, _ = get_kv_cache_capacity(config, planned)
    scheduler = config.scheduler_config
    layout = Layout(ranks, BLOCK, 2, scheduler.max_num_batched_tokens, 256, config.max_concurrent_batches)
    found = fit(shape, layout, MEMORY, max_model_len)
    assert (found.blocks, found.longest) == (planned.num_blocks, max_model_len)
    assert found.kv_tokens == tokens - BLOCK  # the gate takes off the block that vLLM keeps for itself
