"""Starts an engine that several front-ends share."""

from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from vllm.config import VllmConfig
from vllm.v1.engine import core_client

from server.engine.start_failures import StartFailure


def refuse_unshareable(args: Namespace) -> None:
    """Raise `StartFailure` for what vLLM binds to the one process that has started the engine."""
    for name, unshared in (("data_parallel_size", 1), ("mm_tensor_ipc", "direct_rpc"), ("enable_elastic_ep", False)):
        if getattr(args, name, unshared) != unshared:
            flag = name.replace("_", "-")
            raise StartFailure(f"--{flag} does not go with --api-server-count above 1. Start several replicas instead.")


def prepare_sharing(config: VllmConfig, front_ends: int) -> None:
    """Let vLLM know of the others where that matters: a cache of images must not be kept half in each of them.

    On a CPU vLLM would also divide the cores by the number, so that text models are told nothing.
    """
    if config.model_config.is_multimodal_model:
        config.parallel_config._api_process_count = front_ends


@contextmanager
def engine_shared(addresses: Sequence[tuple[str, str]]) -> Iterator[None]:
    """Inside it, an engine that is started connects to these front-ends as well, by input and output address."""
    usual = core_client.launch_core_engines

    def launch(vllm_config: Any, executor_class: Any, log_stats: bool, own: Any) -> Any:
        own.inputs.extend(inputs for inputs, _ in addresses)
        own.outputs.extend(outputs for _, outputs in addresses)
        return usual(vllm_config, executor_class, log_stats, own)

    core_client.launch_core_engines = launch
    try:
        yield
    finally:
        core_client.launch_core_engines = usual
