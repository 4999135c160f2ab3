"""What of a model fits into a machine, at each number of ranks, and which flags serve it best."""

import os
import shlex
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from server.commands.machine import Machine
from server.policy.model_shape import ModelShape, kv_element_bytes, shape_of, weight_bytes
from server.policy.sizing import (
    GIB,
    Fit,
    Layout,
    concurrency,
    cpu_kv_cache_bytes,
    fit,
    gpu_kv_bytes,
    token_bytes,
)

LENGTHS: Final = (2048, 8192, 32768, 131072)
_CPU_SPACE: Final = "VLLM_CPU_KVCACHE_SPACE"
_GPU_SHARE: Final = 0.92  # vLLM's own default
_CPU_BLOCK: Final = 128
_CPU_LATENT_BLOCK: Final = 16
_GPU_BLOCK: Final = 16
_LARGE_GPU_BYTES: Final = 70 * GIB
_HUGE_GPU_BYTES: Final = 160 * GIB
_SUFFIXES: Final[Mapping[str, int]] = {"k": 10**3, "m": 10**6, "g": 10**9, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
_AUTO: Final = ("auto", "-1", "0")
_FLOAT32_HALVED: Final = 2  # vLLM serves float32 weights in 16 bits


@dataclass(frozen=True, slots=True)
class Plan:
    """One way to serve the model. Bytes are for each rank; `by_length` is requests at a time by their length."""

    tensor_parallel: int
    weights_bytes: int
    kv_bytes: int
    kv_token_bytes: int
    fit: Fit
    by_length: Mapping[int, int]

    @property
    def works(self) -> bool:
        return self.fit.longest > 0


def parse_flags(flags: Sequence[str]) -> tuple[str | None, Namespace]:
    """The model and those of vLLM's flags that decide about memory; the others are vLLM's to check.

    Raises `ValueError` for a number that is none.
    """
    first = flags[0] if flags and not flags[0].startswith("-") else None
    parser = ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--model")
    parser.add_argument("--revision")
    parser.add_argument("--tensor-parallel-size", "-tp", type=_number)
    parser.add_argument("--max-model-len", type=_number)
    parser.add_argument("--max-num-seqs", type=_number)
    parser.add_argument("--max-num-batched-tokens", type=_number)
    parser.add_argument("--block-size", type=_number)
    parser.add_argument("--kv-cache-memory-bytes", type=_number)
    parser.add_argument("--gpu-memory-utilization", type=float)
    parser.add_argument("--kv-cache-dtype", default="auto")
    parser.add_argument("--dtype", default="auto")
    known, _ = parser.parse_known_args([_dashed(flag) for flag in (flags[1:] if first else flags)])
    return first or known.model, known


def _dashed(flag: str) -> str:
    name, equals, value = flag.partition("=")
    return f"{name.replace('_', '-')}{equals}{value}" if name.startswith("--") else flag


def _number(text: str) -> int | None:
    """vLLM's numbers: `32k` is 32,000 and `32K` is 32,768. None for `auto`."""
    if text in _AUTO:
        return None
    factor = _SUFFIXES.get(text[-1:])
    return int(float(text[:-1]) * factor) if factor else int(text)


@dataclass(frozen=True, slots=True)
class ModelReport:
    """A model on a machine. `weights_known`: from its files, and not estimated from config.json."""

    name: str
    shape: ModelShape
    weights_bytes: int
    weights_known: bool
    plans: tuple[Plan, ...]
    asked_len: int | None
    asked_ranks: int | None

    @property
    def best(self) -> Plan | None:
        """The fewest ranks that serve the whole window, else those that serve the longest."""
        working = [plan for plan in self.plans if plan.works]
        wanted = self.asked_len or self.shape.max_positions
        whole = [plan for plan in working if plan.fit.longest >= wanted]
        return next(iter(whole), None) or max(working, key=lambda plan: plan.fit.longest, default=None)

    def command(self, vllm_args: Sequence[str], *, on_cpu: bool) -> str | None:
        """The command that serves it as the best plan has it, with what it was asked with."""
        if self.best is None:
            return None
        words = ["tidegate", "serve", *vllm_args]
        if not on_cpu and not self.asked_ranks:
            words += ["--tensor-parallel-size", str(self.best.tensor_parallel)]
        if self.asked_len is None and self.best.fit.longest < self.shape.max_positions:
            words += ["--max-model-len", str(self.best.fit.longest)]
        return shlex.join(words)


def report_on(name: str, folder: Path, args: Namespace, machine: Machine) -> ModelReport:
    """Raises `UnreadableModel` and `UnknownShape`."""
    from server.engine.model_files import CONFIG, read_json

    config = read_json(folder / CONFIG)
    shape = shape_of(config)
    weights, known = _weights(folder, config, args.dtype)
    plans = [
        _plan(_layout(ranks, config, shape, args, machine), shape, weights, args, machine)
        for ranks in _rank_counts(shape, args, machine)
    ]
    return ModelReport(name, shape, weights, known, tuple(plans), args.max_model_len, args.tensor_parallel_size)


def _weights(folder: Path, config: Mapping[str, Any], dtype: str) -> tuple[int, bool]:
    from server.engine.model_files import model_tensors, pickled_bytes

    tensors = model_tensors(folder)
    if tensors:
        narrowed = 1 if dtype == "float32" else _FLOAT32_HALVED
        return sum(t.size_bytes // (narrowed if t.dtype == "F32" else 1) for t in tensors.values()), True
    pickled = pickled_bytes(folder)
    return (pickled, True) if pickled else (weight_bytes(config), False)


def _rank_counts(shape: ModelShape, args: Namespace, machine: Machine) -> list[int]:
    """The numbers of ranks worth a look: the one that was asked for, else those that divide the heads."""
    if args.tensor_parallel_size is not None:
        return [args.tensor_parallel_size]
    most = 1 if machine.serves_on_cpu or not machine.gpus else len(machine.gpus)
    return [size for size in range(1, most + 1) if shape.attention_heads % size == 0]


def _plan(layout: Layout, shape: ModelShape, weights: int, args: Namespace, machine: Machine) -> Plan:
    each = weights // layout.tensor_parallel
    kv_bytes = _kv_bytes(layout, shape, each, args, machine)
    fits = fit(shape, layout, kv_bytes, args.max_model_len)
    lengths = [length for length in (*LENGTHS, fits.longest) if 0 < length <= fits.longest]
    by_length = {length: concurrency(shape, layout, fits.blocks, length) for length in sorted(set(lengths))}
    return Plan(layout.tensor_parallel, each, kv_bytes, token_bytes(shape, layout), fits, by_length)


def _layout(ranks: int, config: Mapping[str, Any], shape: ModelShape, args: Namespace, machine: Machine) -> Layout:
    block, batched, sequences = _defaults(ranks, shape, machine)
    element = 4 if args.dtype == "float32" and args.kv_cache_dtype == "auto" else 0
    return Layout(
        tensor_parallel=ranks,
        block_tokens=block if shape.latent_dim and machine.serves_on_cpu else args.block_size or block,
        element_bytes=element or kv_element_bytes(config, args.kv_cache_dtype),
        batched_tokens=args.max_num_batched_tokens or batched,
        max_sequences=args.max_num_seqs or sequences,
        steps_in_flight=1 if machine.serves_on_cpu else 2,
    )


def _defaults(ranks: int, shape: ModelShape, machine: Machine) -> tuple[int, int, int]:
    """vLLM's own choices: block size, tokens in a step, sequences at a time (`vllm/engine/arg_utils.py`)."""
    if machine.serves_on_cpu or not machine.gpus:
        return _CPU_LATENT_BLOCK if shape.latent_dim else _CPU_BLOCK, 2048 * ranks, 128 * ranks
    smallest = min(machine.gpus, key=lambda gpu: gpu.memory_bytes)
    if smallest.memory_bytes >= _HUGE_GPU_BYTES:
        return _GPU_BLOCK, 16384, 1024
    if smallest.memory_bytes >= _LARGE_GPU_BYTES and "a100" not in smallest.name.lower():
        return _GPU_BLOCK, 8192, 1024
    return _GPU_BLOCK, 2048, 256


def _kv_bytes(layout: Layout, shape: ModelShape, weights: int, args: Namespace, machine: Machine) -> int:
    """What one rank has for its KV cache."""
    if machine.serves_on_cpu or not machine.gpus:
        if space := os.environ.get(_CPU_SPACE):
            return int(space) * GIB
        if args.kv_cache_memory_bytes is not None:
            return int(args.kv_cache_memory_bytes)
        if args.gpu_memory_utilization is not None:
            return int(machine.memory_bytes * args.gpu_memory_utilization) - weights
        return cpu_kv_cache_bytes(machine.memory_bytes)
    if args.kv_cache_memory_bytes is not None:
        return int(args.kv_cache_memory_bytes)
    memory = min(gpu.memory_bytes or machine.memory_bytes for gpu in machine.gpus)  # 0: it shares the machine's
    return gpu_kv_bytes(shape, layout, memory, args.gpu_memory_utilization or _GPU_SHARE, weights)
