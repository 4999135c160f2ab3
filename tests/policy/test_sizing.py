from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.policy.model_shape import shape_of
from server.policy.sizing import (
    GIB,
    Layout,
    concurrency,
    cpu_kv_cache_bytes,
    fit,
    gpu_kv_bytes,
    request_blocks,
    token_bytes,
)
from tests.policy.known_models import (
    DEEPSEEK_V3,
    GEMMA_2_9B,
    GPT_OSS_20B,
    LLAMA_3_1_8B,
    MISTRAL_7B,
    QWEN_2_5_7B,
    QWEN_3_NEXT,
)

PLAIN = Layout(tensor_parallel=1, block_tokens=16, element_bytes=2, batched_tokens=2048, max_sequences=256)
LLAMA = shape_of(LLAMA_3_1_8B)


@pytest.mark.parametrize(
    ("config", "ranks", "expected"),
    [
        (LLAMA_3_1_8B, 1, 128 * 1024),
        (LLAMA_3_1_8B, 4, 32 * 1024),
        (LLAMA_3_1_8B, 16, 16 * 1024),  # 8 KV heads: two ranks hold the same one
        (QWEN_2_5_7B, 1, 56 * 1024),
        (DEEPSEEK_V3, 1, 61 * 576 * 2),
        (DEEPSEEK_V3, 8, 61 * 576 * 2),  # every rank holds the whole latent vector
        (GPT_OSS_20B, 1, 12 * 2 * 8 * 64 * 2),  # full layers only: a windowed one lets go of an old token
        (QWEN_3_NEXT, 1, 12 * 2 * 2 * 256 * 2),
    ],
)
def test_a_token_takes_what_is_known_of_the_model(config: dict[str, Any], ranks: int, expected: int) -> None:
    assert token_bytes(shape_of(config), replace(PLAIN, tensor_parallel=ranks)) == expected


def test_a_smaller_value_holds_twice_as_much() -> None:
    full = fit(LLAMA, PLAIN, 8 * GIB).kv_tokens
    assert fit(LLAMA, replace(PLAIN, element_bytes=1), 8 * GIB).kv_tokens == pytest.approx(2 * full, rel=0.01)


def test_the_cache_holds_its_bytes_less_the_block_that_vllm_keeps() -> None:
    found = fit(LLAMA, PLAIN, 16 * GIB)
    assert found.blocks == 16 * GIB // (16 * 128 * 1024)
    assert found.kv_tokens == pytest.approx((found.blocks - 1) * 16, abs=32)
    assert found.longest == (found.blocks - 1) * 16  # of 131,072 that it knows


def test_a_window_that_fits_whole_is_the_models_own() -> None:
    assert fit(LLAMA, PLAIN, 32 * GIB).longest == 131072
    assert fit(LLAMA, PLAIN, 32 * GIB, max_len=4096).longest == 4096


def test_nothing_fits_into_nothing() -> None:
    for size in (-GIB, 0, 1024):
        assert fit(LLAMA, PLAIN, size).kv_tokens == fit(LLAMA, PLAIN, size).longest == 0


def test_windowed_layers_hold_their_window_and_the_step_under_way() -> None:
    gemma = shape_of(GEMMA_2_9B)
    window = (4096 - 1 + 2048 + 15) // 16 + 1
    assert request_blocks(gemma, PLAIN, 8192) == 8192 // 16 + window
    assert request_blocks(gemma, PLAIN, 1024) == 1024 // 16 + 1024 // 16 + 1


def test_a_model_of_windows_only_takes_any_length_in_the_same_room() -> None:
    mistral = shape_of(MISTRAL_7B)
    assert request_blocks(mistral, PLAIN, 32768) == request_blocks(mistral, PLAIN, 16384)


def test_as_many_requests_run_as_there_are_blocks_for_and_no_more_than_the_engine_takes() -> None:
    blocks = fit(LLAMA, PLAIN, 16 * GIB).blocks
    assert concurrency(LLAMA, PLAIN, blocks, 8192) == (blocks - 1) * 16 // 8192
    assert concurrency(LLAMA, replace(PLAIN, max_sequences=4), blocks, 128) == 4


def test_a_cpu_gives_a_quarter_of_its_memory_and_never_more_than_four_gib() -> None:
    assert cpu_kv_cache_bytes(8 * GIB) == 2 * GIB
    assert cpu_kv_cache_bytes(64 * GIB) == 4 * GIB


def test_an_8b_model_leaves_some_gib_of_a_24_gib_card() -> None:
    left = gpu_kv_bytes(LLAMA, PLAIN, 24 * GIB, 0.92, 15 * GIB)
    assert 4 * GIB < left < 6 * GIB
    assert gpu_kv_bytes(LLAMA, PLAIN, 16 * GIB, 0.92, 15 * GIB) < 0


@given(st.integers(0, 1 << 38), st.integers(1, 300_000), st.sampled_from([LLAMA_3_1_8B, GEMMA_2_9B, GPT_OSS_20B]))
def test_what_is_said_to_fit_does_fit(kv_bytes: int, max_len: int, config: dict[str, Any]) -> None:
    shape = shape_of(config)
    found = fit(shape, PLAIN, kv_bytes, max_len)
    assert found.longest <= max_len
    if found.longest:
        assert request_blocks(shape, PLAIN, found.longest) < found.blocks
        assert concurrency(shape, PLAIN, found.blocks, found.longest) >= 1
