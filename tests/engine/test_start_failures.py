import textwrap

import pytest

from server.engine.start_failures import StartContext, StartFailure, explain

GPU = StartContext(model="org/model", on_cpu=False, kv_cache_dtype="auto")
CPU = StartContext(model="org/model", on_cpu=True, kv_cache_dtype="auto")
GIB = 1 << 30

# What the parent process raises, whatever happened in the child.
PARENT = RuntimeError("Engine core initialization failed. See root cause above. Failed core proc(s): {'EngineCore': 1}")

KV_TOO_SMALL = (
    "ValueError: To serve at least one request with the model's max seq len (131072), (16.00 GiB KV cache is needed, "
    "which is larger than the available KV cache memory (8.13 GiB). Based on the available memory, the estimated "
    "maximum model length is 66592. Try increasing `gpu_memory_utilization` (which also controls CPU memory on the "
    "CPU backend) or decreasing `max_model_len` when initializing the engine. See "
    "https://docs.vllm.ai/en/latest/configuration/conserving_memory/ for more details."
)
NO_ROOM_AT_ALL = (
    "ValueError: No available memory for the cache blocks. Try increasing `gpu_memory_utilization` when initializing "
    "the engine (this flag also controls CPU memory reservation on the CPU backend, despite its name). See "
    "https://docs.vllm.ai/en/latest/configuration/conserving_memory/ for more details."
)
CUDA_OUT_OF_MEMORY = (
    "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 1.96 GiB. GPU 0 has a total capacity of 23.64 GiB "
    "of which 1.20 GiB is free. Including non-PyTorch memory, this process has 22.43 GiB memory in use."
)
CPU_OUT_OF_MEMORY = (
    "RuntimeError: [enforce fail at alloc_cpu.cpp:118] err == 0. DefaultCPUAllocator: can't allocate memory: you tried "
    "to allocate 117440512000 bytes. Error code 12 (Cannot allocate memory)"
)


def logged(*last_lines: str) -> str:
    """The engine's error log: the same traceback from the worker and from the core, one after the other."""
    calls = textwrap.dedent("""\
        Traceback (most recent call last):
          File "vllm/v1/engine/core.py", line 1501, in run_engine_core
            engine_core = EngineCoreProc(*args, engine_index=dp_rank, **kwargs)
          File "vllm/v1/engine/core.py", line 132, in __init__
            raise ValueError(message)
        """)
    return "".join(f"EngineCore failed to start.\n{calls}{line}\n" for line in last_lines)


def told(engine_log: str, context: StartContext = GPU, error: BaseException = PARENT) -> str:
    sentence = str(explain(error, engine_log, context))
    assert "\n" not in sentence
    return sentence


def test_a_window_that_does_not_fit_is_told_with_three_remedies_in_numbers() -> None:
    assert told(logged(KV_TOO_SMALL)) == (
        "max seq len (131072) is larger than the maximum number of tokens that can be stored in KV cache (66592): "
        "it needs 16.00 GiB and 8.13 GiB are there. Remedies: --max-model-len 66592 fits now (or leave the flag out, "
        "and the largest that fits is taken); a higher --gpu-memory-utilization or --tensor-parallel-size (16.00 GiB "
        "of KV cache needed) gives all 131072; --kv-cache-dtype fp8 would hold about 133184 tokens in the same memory."
    )


def test_on_a_cpu_the_memory_remedy_is_its_own_variable() -> None:
    sentence = told(logged(KV_TOO_SMALL), CPU)
    assert "VLLM_CPU_KVCACHE_SPACE=17 gives all 131072 tokens" in sentence
    assert "--gpu-memory-utilization" not in sentence


def test_a_kv_cache_that_is_quantized_already_is_no_remedy() -> None:
    sentence = told(logged(KV_TOO_SMALL), StartContext("org/model", on_cpu=False, kv_cache_dtype="fp8"))
    assert "fp8" not in sentence
    assert sentence.endswith("gives all 131072.")


def test_without_vllms_estimate_the_share_that_fits_is_taken() -> None:
    before, _, after = KV_TOO_SMALL.partition(
        "Based on the available memory, the estimated maximum model length is 66592. "
    )
    assert "--max-model-len 66600 fits now" in told(logged(before + after))


def test_the_message_is_also_found_in_the_parents_own_error() -> None:
    assert "--max-model-len 66592 fits now" in told("", error=ValueError(KV_TOO_SMALL))


@pytest.mark.engine
def test_the_message_is_the_one_that_the_installed_vllm_raises() -> None:
    from vllm.v1.core.kv_cache_utils import _check_enough_kv_cache_memory

    with pytest.raises(ValueError, match="GiB") as too_small:
        _check_enough_kv_cache_memory(8 * GIB, lambda: 16 * GIB, 131072, lambda _: 65536)
    assert "--max-model-len 65536 fits now" in told(logged(f"ValueError: {too_small.value}"))
    with pytest.raises(ValueError, match="memory") as nothing_left:
        _check_enough_kv_cache_memory(0, lambda: 16 * GIB, 131072, lambda _: 65536)
    assert told(logged(f"ValueError: {nothing_left.value}")) == told(logged(NO_ROOM_AT_ALL))


def test_weights_that_leave_no_room_for_a_cache_are_told_apart_from_weights_that_do_not_fit() -> None:
    assert told(logged(NO_ROOM_AT_ALL)).startswith("The weights leave no memory for the KV cache.")
    assert told(logged(CUDA_OUT_OF_MEMORY)).startswith("org/model does not fit into GPU memory.")


@pytest.mark.parametrize("line", [CPU_OUT_OF_MEMORY, "MemoryError", "OSError: [Errno 12] Cannot allocate memory"])
def test_on_a_cpu_it_is_the_machines_memory(line: str) -> None:
    sentence = told(logged(line), CPU)
    assert sentence.startswith("org/model does not fit into memory.")


def test_the_parents_own_lack_of_memory_counts_as_well() -> None:
    assert "does not fit into memory" in told("", CPU, MemoryError("out of memory"))


@pytest.mark.parametrize(
    "error",
    [
        OSError("org/model is not a local folder and is not a valid model identifier listed on 'https://hub.example'"),
        OSError("org/model does not appear to have a file named config.json. Checkout the hub for available files."),
        ValueError("Invalid repository ID or local directory specified: 'org/model'."),
    ],
)
def test_a_model_that_is_not_there_is_told_with_what_to_give(error: Exception) -> None:
    assert told("", error=error) == (
        "The model 'org/model' was not found. Give a folder with a config.json, or the name of a model that can be "
        "downloaded."
    )


def test_an_unknown_failure_keeps_the_last_error_that_the_engine_logged() -> None:
    log = logged("KeyError: 'the first'", "pydantic_core._pydantic_core.ValidationError: the cause: with a colon")
    assert told(log) == "The engine could not start: the cause: with a colon"


def test_an_engine_that_logged_no_error_leaves_the_parents_words() -> None:
    assert told("", error=ValueError("First line.\nSecond line.")) == "The engine could not start: First line."
    assert told("Something was logged.\n") == f"The engine could not start: {PARENT}"


def test_an_error_without_words_is_told_by_its_name() -> None:
    assert told("", error=NotImplementedError()) == "The engine could not start: NotImplementedError"


def test_a_sentence_that_is_there_already_is_kept() -> None:
    failure = StartFailure("Choose another model.")
    assert explain(failure, logged(KV_TOO_SMALL), GPU) is failure
