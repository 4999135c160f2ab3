"""How much of a model fits into a machine: the arithmetic of vLLM's KV cache, done before anything is loaded.

vLLM shares one pool of blocks between groups of layers, each of them as many layers as the rarest kind has
(`vllm/v1/core/kv_cache_utils.py`). A full layer needs a block for every `block_tokens` tokens of a request, a windowed
one never more than its window and what is computed at once.
"""

from dataclasses import dataclass
from typing import Final

from server.policy.model_shape import ModelShape

GIB: Final = 1 << 30
# A CPU machine's memory is shared with everything else on it; a quarter leaves room for weights and the system.
_CPU_KV_CACHE_SHARE: Final = 0.25
_CPU_KV_CACHE_MAX_BYTES: Final = 4 * GIB
# CUDA's context, the communication buffers and the recorded graphs, as measured on common cards.
_GPU_OVERHEAD_BYTES: Final = int(1.5 * GIB)
_ACTIVATION_COPIES: Final = 8  # of the hidden state, at the widest point of a layer
_LOGIT_BYTES: Final = 4
_UNEVEN_GROUPS: Final = 1.5  # vLLM pads the smaller kind of layers up to this difference


@dataclass(frozen=True, slots=True)
class Layout:
    """How the cache is cut. `element_bytes` is one value's size, `batched_tokens` what one step may compute.

    `steps_in_flight`: vLLM schedules the next step while one runs on a GPU, and waits for it on a CPU.
    """

    tensor_parallel: int
    block_tokens: int
    element_bytes: float
    batched_tokens: int
    max_sequences: int
    steps_in_flight: int = 1


@dataclass(frozen=True, slots=True)
class Fit:
    """What fits into one amount of KV memory. `kv_tokens` are usable ones: vLLM keeps a block for itself.

    `longest` is the longest context, by the model or by the cache, whichever ends first.
    """

    kv_tokens: int
    longest: int
    blocks: int


def cpu_kv_cache_bytes(memory_bytes: int) -> int:
    """What the KV cache takes of a machine without GPUs, unless the operator says."""
    return min(int(memory_bytes * _CPU_KV_CACHE_SHARE), _CPU_KV_CACHE_MAX_BYTES)


def layer_token_bytes(shape: ModelShape, layout: Layout) -> float:
    """Bytes that one token takes in one layer on one rank.

    Grouped heads are divided over the ranks, but no rank has less than one; MLA's latent vector is on every rank.
    """
    if shape.latent_dim is not None:
        return shape.latent_dim * layout.element_bytes
    heads = max(1, shape.kv_heads // layout.tensor_parallel)
    return heads * (shape.head_dim + shape.value_head_dim) * layout.element_bytes


def token_bytes(shape: ModelShape, layout: Layout) -> int:
    """Bytes that one more token of a long request takes on one rank: windowed layers let go of an old one for it."""
    growing = shape.count("full") or shape.count("window")
    return int(growing * layer_token_bytes(shape, layout))


def fit(shape: ModelShape, layout: Layout, kv_bytes: int, max_len: int | None = None) -> Fit:
    """What fits into `kv_bytes` of each rank, with a window of `max_len` (or the model's own, as far as it fits)."""
    page = layout.block_tokens * layer_token_bytes(shape, layout)
    group = _group_layers(shape)
    blocks = int(max(0, kv_bytes) // (page * group)) if page * group else 0
    longest = _longest(shape, layout, blocks - 1, max_len or shape.max_positions)
    if longest <= 0:
        return Fit(0, 0, blocks)
    # vLLM's own figure: as many requests of the longest kind as there are blocks for, in tokens.
    tokens = int(blocks / request_blocks(shape, layout, longest) * longest)
    return Fit(max(0, tokens - layout.block_tokens), longest, blocks)


def concurrency(shape: ModelShape, layout: Layout, blocks: int, tokens: int) -> int:
    """How many requests of `tokens` each run at a time."""
    return min(max(0, blocks - 1) // request_blocks(shape, layout, tokens), layout.max_sequences)


def request_blocks(shape: ModelShape, layout: Layout, tokens: int) -> int:
    """Blocks of the shared pool that one request of this length holds at most."""
    group = _group_layers(shape)
    full = _up(tokens, layout.block_tokens) * _up(shape.count("full"), group)
    windowed = _up(shape.count("window"), group)
    if not windowed or shape.window is None:
        return max(1, full)
    held = min(shape.window - 1 + layout.steps_in_flight * layout.batched_tokens, tokens)
    return max(1, full + (_up(held, layout.block_tokens) + 1) * windowed)


def gpu_kv_bytes(shape: ModelShape, layout: Layout, memory_bytes: int, share: float, weights_bytes: int) -> int:
    """An estimate of what is left for the KV cache of one GPU, in bytes; below zero where the weights do not fit.

    vLLM measures the rest after loading; here the widest step is taken as some copies of the hidden state and the
    logits of every sequence.
    """
    step = layout.batched_tokens * shape.hidden_size * _ACTIVATION_COPIES * 2
    logits = layout.max_sequences * shape.vocabulary * _LOGIT_BYTES
    return int(memory_bytes * share) - weights_bytes - step - logits - _GPU_OVERHEAD_BYTES


def _longest(shape: ModelShape, layout: Layout, blocks: int, wanted: int) -> int:
    """The longest request, at most `wanted` tokens, that `blocks` hold; longer ones never need fewer."""
    low, high = 0, max(0, wanted)
    while low < high:
        middle = (low + high + 1) // 2
        if request_blocks(shape, layout, middle) <= blocks:
            low = middle
        else:
            high = middle - 1
    return low


def _group_layers(shape: ModelShape) -> int:
    """Layers that share one table of blocks: as many as the rarer kind has, or all where there is one kind."""
    counts = [count for count in (shape.count("full"), shape.count("window")) if count]
    if not counts:
        return 0
    return max(counts) if max(counts) < min(counts) * _UNEVEN_GROUPS else min(counts)


def _up(value: int, step: int) -> int:
    return -(-value // step) if step else 0
