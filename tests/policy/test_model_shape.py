from typing import Any

import pytest

from server.policy.model_shape import UnknownShape, bits_per_weight, kv_element_bytes, shape_of, weight_bytes
from tests.policy.known_models import (
    DEEPSEEK_V3,
    GEMMA_2_9B,
    GPT_OSS_20B,
    LLAMA_3_1_8B,
    MISTRAL_7B,
    MIXTRAL_8X7B,
    QWEN_2_5_7B,
    QWEN_3_NEXT,
)

BILLION = 1_000_000_000


@pytest.mark.parametrize(
    ("config", "billions"),
    [(LLAMA_3_1_8B, 8.03), (QWEN_2_5_7B, 7.62), (MISTRAL_7B, 7.24), (GEMMA_2_9B, 9.24), (MIXTRAL_8X7B, 46.7)],
)
def test_the_weights_of_known_models_are_estimated_from_their_configuration(
    config: dict[str, Any], billions: float
) -> None:
    assert weight_bytes(config) == pytest.approx(2 * billions * BILLION, rel=0.02)


def test_a_model_with_experts_and_latent_attention_is_estimated_too() -> None:
    assert weight_bytes(DEEPSEEK_V3) == pytest.approx(671 * BILLION, rel=0.02)  # 8 bits a weight


def test_a_gqa_model_keeps_fewer_heads_than_it_asks_with() -> None:
    shape = shape_of(LLAMA_3_1_8B)
    assert (shape.attention_heads, shape.kv_heads, shape.head_dim, shape.layers) == (32, 8, 128, ("full",) * 32)
    assert shape.max_positions == 131072


def test_latent_attention_keeps_one_vector() -> None:
    assert shape_of(DEEPSEEK_V3).latent_dim == 576
    assert shape_of(DEEPSEEK_V3).max_positions == 163840


@pytest.mark.parametrize(
    ("config", "full", "windowed", "window"),
    [
        (GEMMA_2_9B, 21, 21, 4096),
        (GPT_OSS_20B, 12, 12, 128),
        (MISTRAL_7B, 0, 32, 4096),
        (QWEN_2_5_7B, 28, 0, None),
        ({**QWEN_2_5_7B, "use_sliding_window": True}, 0, 28, 131072),
    ],
)
def test_windowed_layers_are_told_from_full_ones(
    config: dict[str, Any], full: int, windowed: int, window: int | None
) -> None:
    shape = shape_of(config)
    assert (shape.count("full"), shape.count("window"), shape.window) == (full, windowed, window)


def test_layers_that_keep_a_state_are_no_part_of_the_cache() -> None:
    shape = shape_of(QWEN_3_NEXT)
    assert (shape.count("full"), shape.count("state")) == (12, 36)


def test_a_model_that_sees_is_read_by_its_text_part() -> None:
    shape = shape_of({"model_type": "mistral3", "text_config": LLAMA_3_1_8B, "vision_config": {"hidden_size": 9}})
    assert (shape.model_type, shape.hidden_size) == ("llama", 4096)


@pytest.mark.parametrize(
    ("rope", "positions"),
    [
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}, 131072),
        ({"type": "linear", "factor": 2}, 65536),
        ({"rope_type": "llama3", "factor": 8.0}, 32768),
        (None, 32768),
    ],
)
def test_a_stretched_window_counts_as_what_it_becomes(rope: dict[str, Any] | None, positions: int) -> None:
    assert shape_of({**QWEN_2_5_7B, "max_position_embeddings": 32768, "rope_scaling": rope}).max_positions == positions


@pytest.mark.parametrize(
    ("quantization", "bits"),
    [
        ({"quant_method": "awq", "bits": 4}, 4),
        ({"quant_method": "gptq", "bits": 8}, 8),
        ({"quant_method": "fp8"}, 8),
        ({"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": {"num_bits": 4}}}}, 4),
        ({"quant_method": "something new"}, 16),
        (None, 16),
    ],
)
def test_quantized_weights_are_counted_by_their_bits(quantization: dict[str, Any] | None, bits: int) -> None:
    assert bits_per_weight({**LLAMA_3_1_8B, "quantization_config": quantization}) == bits


def test_the_cache_takes_the_type_it_is_told_or_what_the_model_was_made_for() -> None:
    made_for_fp8 = {**LLAMA_3_1_8B, "quantization_config": {"kv_cache_scheme": {"num_bits": 8}}}
    assert kv_element_bytes(LLAMA_3_1_8B, "auto") == 2
    assert kv_element_bytes(LLAMA_3_1_8B, "fp8_e5m2") == 1
    assert kv_element_bytes(made_for_fp8, "auto") == 1
    assert kv_element_bytes(made_for_fp8, "bfloat16") == 2


def test_a_configuration_without_layers_says_what_is_missing() -> None:
    with pytest.raises(UnknownShape, match="num_hidden_layers"):
        shape_of({"model_type": "unheard-of"})
