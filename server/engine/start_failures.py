"""A start that fails ends with one sentence that says what to change."""

import re
from dataclasses import dataclass
from typing import Final


class StartFailure(Exception):
    """The server cannot start; the message is the sentence the operator reads."""


_LEAST_GIB: Final = 0.01  # vLLM rounds to two digits
_KV_TOO_SMALL: Final = re.compile(
    r"max seq len \((?P<asked>\d+)\), \((?P<needed>[\d.]+) GiB KV cache is needed.*?"
    r"available KV cache memory \((?P<available>[\d.]+) GiB\)(?:.*?maximum model length is (?P<fits>\d+))?",
    re.DOTALL,
)
_CAUSE: Final = re.compile(r"^(?:\w+\.)*(?:\w*Error|\w*Exception): (?P<message>.+)$", re.MULTILINE)
# A parent's word that a child failed; the child's own word is the cause.
_SECOND_HAND: Final = ("WorkerProc initialization failed", "Engine core initialization failed")
_OUT_OF_MEMORY: Final = ("out of memory", "Cannot allocate memory", "MemoryError", "can't allocate memory")
_WRONG_MODEL: Final = ("is not a local folder", "does not appear to have a file named", "Invalid repository ID")


@dataclass(frozen=True, slots=True)
class StartContext:
    """What the explanation needs to know about the start that failed."""

    model: str
    on_cpu: bool
    kv_cache_dtype: str


def explain(error: BaseException, engine_log: str, context: StartContext) -> StartFailure:
    """The sentence for an error raised while the engine was built.

    The engine runs in a child process, and the parent only learns that it ended; `engine_log` is what the child
    logged at error level.
    """
    if isinstance(error, StartFailure):
        return error
    words = f"{engine_log}\n{error}"
    if match := _KV_TOO_SMALL.search(words):
        return StartFailure(_kv_sentence(match, context))
    if "No available memory for the cache blocks" in words:
        return StartFailure(
            "The weights leave no memory for the KV cache. Raise --gpu-memory-utilization, spread the model over "
            "more GPUs with --tensor-parallel-size, or serve a smaller or quantized model."
        )
    if any(phrase in words for phrase in _OUT_OF_MEMORY):
        where = "memory" if context.on_cpu else "GPU memory"
        return StartFailure(
            f"{context.model} does not fit into {where}. Lower --gpu-memory-utilization if other programs use it, "
            "add GPUs with --tensor-parallel-size, or serve a smaller or quantized model."
        )
    if any(phrase in words for phrase in _WRONG_MODEL):
        return StartFailure(
            f"The model {context.model!r} was not found. Give a folder with a config.json, or the name of a model "
            "that can be downloaded."
        )
    causes = [cause for cause in _CAUSE.findall(engine_log) if not cause.startswith(_SECOND_HAND)]
    cause = causes[-1] if causes else str(error).strip().split("\n")[0] or type(error).__name__
    return StartFailure(f"The engine could not start: {cause}")


def _kv_sentence(match: re.Match[str], context: StartContext) -> str:
    """What fits, and what each of the three remedies would give."""
    asked, needed, available = int(match["asked"]), float(match["needed"]), float(match["available"])
    fits = int(match["fits"] or asked * available / max(needed, _LEAST_GIB))
    memory = (
        f"VLLM_CPU_KVCACHE_SPACE={int(needed) + 1} gives all {asked} tokens"
        if context.on_cpu
        else f"a higher --gpu-memory-utilization or --tensor-parallel-size ({needed:.2f} GiB of KV cache needed)"
        f" gives all {asked}"
    )
    dtype = (
        f"; --kv-cache-dtype fp8 would hold about {2 * fits} tokens in the same memory"
        if context.kv_cache_dtype == "auto"
        else ""
    )
    return (
        f"max seq len ({asked}) is larger than the maximum number of tokens that can be stored in KV cache ({fits}): "
        f"it needs {needed:.2f} GiB and {available:.2f} GiB are there. Remedies: --max-model-len {fits} fits now "
        f"(or leave the flag out, and the largest that fits is taken); {memory}{dtype}."
    )
