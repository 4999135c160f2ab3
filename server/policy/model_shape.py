"""What a model's config.json says about the memory it needs: its attention layers, heads, window and weights."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

LayerKind = Literal["full", "window", "state"]

_FULL: Final[LayerKind] = "full"
_WINDOW: Final[LayerKind] = "window"
# The words of `layer_types` in config.json; what is not here keeps a state of fixed size instead of a KV cache.
_LAYER_KINDS: Final[Mapping[str, LayerKind]] = {
    "full_attention": "full",
    "attention": "full",
    "sliding_attention": "window",
    "chunked_attention": "window",
}
_WITHOUT_WINDOW: Final[Mapping[str, LayerKind]] = {"sliding_attention": "full", "chunked_attention": "full"}
# Models whose configuration leaves the pattern to the code: every n-th layer is a full one.
_FULL_LAYER_EVERY: Final[Mapping[str, int]] = {
    "gemma2": 2, "gemma3": 6, "gemma3_text": 6, "cohere2": 4, "gpt_oss": 2,
}  # fmt: skip
_FALSE_WINDOWS: Final = frozenset({"qwen2", "qwen2_moe", "qwen3", "qwen3_moe"})  # off unless `use_sliding_window`
_BITS_PER_BYTE: Final = 8
_DEFAULT_BITS: Final = 16
_QUANTIZED_BITS: Final[Mapping[str, int]] = {
    "awq": 4, "gptq": 4, "fp8": 8, "mxfp4": 4, "bitsandbytes": 4, "fbgemm_fp8": 8, "modelopt": 8, "modelopt_fp4": 4,
}  # fmt: skip
_MLP_MATRICES: Final = 3  # gate, up, down
_STRETCHING: Final = frozenset({"linear", "dynamic", "yarn"})
_POSITION_FIELDS: Final = (
    "max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "model_max_length", "max_sequence_length",
)  # fmt: skip


class UnknownShape(Exception):
    """A config.json that lacks what the calculation needs; the message is a sentence for the operator."""


@dataclass(frozen=True, slots=True)
class ModelShape:
    """The numbers of one model. `latent_dim` is set for MLA: values per token and layer, the same on every rank.

    `window` is in tokens and counts where `layers` has windowed ones. `max_positions` is the longest context the model
    knows, after the stretching that its configuration asks for.
    """

    model_type: str
    layers: tuple[LayerKind, ...]
    attention_heads: int
    kv_heads: int
    head_dim: int
    value_head_dim: int
    latent_dim: int | None
    window: int | None
    max_positions: int
    hidden_size: int
    vocabulary: int

    def count(self, kind: LayerKind) -> int:
        return self.layers.count(kind)


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part about text, in the configurations of models that also see or hear."""
    inner = next((config[name] for name in ("text_config", "llm_config", "thinker_config") if name in config), None)
    return {**config, **text_config(inner)} if isinstance(inner, Mapping) else config


def shape_of(config: Mapping[str, Any]) -> ModelShape:
    """The shape that a config.json describes. Raises `UnknownShape`."""
    text = text_config(config)
    count = _number(text, "num_hidden_layers", "n_layer", "num_layers")
    heads = _number(text, "num_attention_heads", "n_head")
    hidden = _number(text, "hidden_size", "n_embd", "d_model")
    latent = text.get("kv_lora_rank")
    head_dim = _optional(text, "head_dim") or hidden // heads
    return ModelShape(
        model_type=str(text.get("model_type", "")),
        layers=_layers(text, count),
        attention_heads=heads,
        kv_heads=_optional(text, "num_key_value_heads", "multi_query_group_num", "num_kv_heads") or heads,
        head_dim=head_dim,
        value_head_dim=_optional(text, "v_head_dim") or head_dim,
        latent_dim=None if latent is None else int(latent) + int(text.get("qk_rope_head_dim") or 0),
        window=_window(text),
        max_positions=_positions(text),
        hidden_size=hidden,
        vocabulary=_optional(text, "vocab_size") or 0,
    )


def bits_per_weight(config: Mapping[str, Any]) -> int:
    """Bits of the quantized weights, or 16."""
    quantization = config.get("quantization_config") or text_config(config).get("quantization_config")
    if not isinstance(quantization, Mapping):
        return _DEFAULT_BITS
    named = quantization.get("bits") or quantization.get("w_bit") or quantization.get("weight_bits")
    if isinstance(named, int):
        return named
    groups = quantization.get("config_groups")
    if isinstance(groups, Mapping):  # compressed-tensors
        weights = [group.get("weights") or {} for group in groups.values() if isinstance(group, Mapping)]
        bits = [weight["num_bits"] for weight in weights if isinstance(weight.get("num_bits"), int)]
        return max(bits, default=_DEFAULT_BITS)
    return _QUANTIZED_BITS.get(str(quantization.get("quant_method", "")), _DEFAULT_BITS)


def kv_element_bytes(config: Mapping[str, Any], kv_cache_dtype: str) -> float:
    """Bytes of one value in the KV cache, for vLLM's `--kv-cache-dtype` and what the model itself asks for."""
    if kv_cache_dtype.startswith("fp8") or kv_cache_dtype == "int8":
        return 1
    if kv_cache_dtype == "auto":
        quantization = config.get("quantization_config") or {}
        scheme = quantization.get("kv_cache_scheme") if isinstance(quantization, Mapping) else None
        if isinstance(scheme, Mapping) and isinstance(scheme.get("num_bits"), int):
            return float(scheme["num_bits"]) / _BITS_PER_BYTE
    return 2


def weight_bytes(config: Mapping[str, Any]) -> int:
    """An estimate of the weights' size in bytes for a model whose files are not there.

    Quantization leaves the embedding and the head as they are. Good to some percent for the usual decoders.
    """
    text, shape = text_config(config), shape_of(config)
    tied = bool(text.get("tie_word_embeddings", config.get("tie_word_embeddings", False)))
    ends = shape.vocabulary * shape.hidden_size * (1 if tied else 2)
    inside = sum(_attention(text, shape) + _feed_forward(text, shape, layer) for layer in range(len(shape.layers)))
    return (ends * _DEFAULT_BITS + inside * bits_per_weight(config)) // _BITS_PER_BYTE


def _attention(text: Mapping[str, Any], shape: ModelShape) -> int:
    """Weights of one layer's attention."""
    heads, hidden = shape.attention_heads, shape.hidden_size
    if shape.latent_dim is None:
        return hidden * shape.head_dim * 2 * (heads + shape.kv_heads)
    rope, latent = int(text.get("qk_rope_head_dim") or 0), int(text["kv_lora_rank"])
    query_dim = int(text.get("qk_nope_head_dim") or shape.head_dim) + rope
    rank = _optional(text, "q_lora_rank")
    query = hidden * rank + rank * heads * query_dim if rank else hidden * heads * query_dim
    keys = hidden * shape.latent_dim + latent * heads * (query_dim - rope + shape.value_head_dim)
    return query + keys + heads * shape.value_head_dim * hidden


def _feed_forward(text: Mapping[str, Any], shape: ModelShape, layer: int) -> int:
    """Weights of one layer's feed-forward part, with all its experts."""
    dense = _optional(text, "intermediate_size", "ffn_dim", "n_inner") or 4 * shape.hidden_size
    experts = _optional(text, "num_experts", "num_local_experts", "n_routed_experts") or 0
    is_dense = layer < int(text.get("first_k_dense_replace") or 0) or layer in (text.get("mlp_only_layers") or ())
    if not experts or is_dense:
        return _MLP_MATRICES * shape.hidden_size * dense
    each = _optional(text, "moe_intermediate_size") or dense
    shared = _optional(text, "shared_expert_intermediate_size") or each * int(text.get("n_shared_experts") or 0)
    return _MLP_MATRICES * shape.hidden_size * (experts * each + shared) + shape.hidden_size * experts


def _layers(text: Mapping[str, Any], count: int) -> tuple[LayerKind, ...]:
    named = text.get("layer_types") or text.get("layers_block_type")
    if isinstance(named, Sequence) and not isinstance(named, str) and named:
        known = {**_LAYER_KINDS, **({} if _window(text) else _WITHOUT_WINDOW)}
        return tuple(known.get(str(kind), "state") for kind in named[:count])
    if _window(text) is None:
        return (_FULL,) * count
    every = _optional(text, "sliding_window_pattern") or _FULL_LAYER_EVERY.get(str(text.get("model_type", "")))
    if every is None:
        return (_WINDOW,) * count
    return tuple(_FULL if (layer + 1) % every == 0 else _WINDOW for layer in range(count))


def _window(text: Mapping[str, Any]) -> int | None:
    window = text.get("sliding_window") or text.get("attention_chunk_size")
    uses = text.get("use_sliding_window", str(text.get("model_type", "")) not in _FALSE_WINDOWS)
    return int(window) if isinstance(window, int) and uses else None


def _positions(text: Mapping[str, Any]) -> int:
    longest = _optional(text, *_POSITION_FIELDS) or 0
    rope = text.get("rope_scaling") or text.get("rope_parameters") or {}
    if not isinstance(rope, Mapping) or rope.get("rope_type", rope.get("type")) not in _STRETCHING:
        return longest
    original = rope.get("original_max_position_embeddings")
    factor = rope.get("factor")
    return int((original or longest) * factor) if isinstance(factor, int | float) else longest


def _number(text: Mapping[str, Any], *names: str) -> int:
    value = _optional(text, *names)
    if value is None:
        raise UnknownShape(f"config.json has no `{names[0]}`, so the memory that the model needs is not known.")
    return value


def _optional(text: Mapping[str, Any], *names: str) -> int | None:
    values = (text.get(name) for name in names)
    return next((int(value) for value in values if isinstance(value, int) and value > 0), None)
