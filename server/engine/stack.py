"""One engine with everything built on it: vLLM's `AsyncLLM` and OpenAI serving objects, replaceable as a whole."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import structlog
from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.entrypoints.serve.lora.protocol import LoadLoRAAdapterRequest
from vllm.lora.request import LoRARequest
from vllm.platforms import current_platform
from vllm.tokenizers import cached_get_tokenizer
from vllm.utils.func_utils import _supports_kw
from vllm.v1.metrics.prometheus import unregister_vllm_metrics

from server.engine.arguments import EngineArguments
from server.engine.figures import EngineFigures
from server.engine.fork_server import ForkServer
from server.engine.operations import Operation, OperationKey
from server.engine.processes import EngineFamily
from server.engine.seams import SeamedEngine
from server.engine.shared_steps import account
from server.engine.start_failures import StartFailure
from server.engine.steps import StepCounter
from server.engine.traits import Traits
from server.engine.vllm_metrics import prometheus_logger
from server.policy.forecast import StepPart
from server.policy.objectives import Unloaded
from server.policy.reservations import Capacity
from server.policy.restarts import Pulse

log = structlog.get_logger(__name__)

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class OtherFrontEnds:
    """The further front-ends of an engine: where it is to find each, by input and output address. `unfinished` counts
    what they have in it, `adapters_changed` is called when they have to learn of other adapters."""

    addresses: tuple[tuple[str, str], ...]
    unfinished: Callable[[], int]
    adapters_changed: Callable[[], None]


@dataclass(frozen=True, slots=True)
class StackRequest:
    """What a stack is built from. `logging_config` is a dictConfig file for vLLM's processes, whose
    error records also land in `engine_error_log`. `fast_streams`: make the frames of plain text streams here.
    `coalesced_tokens`: how many may share such a frame while the event loop is behind the engine.
    `traced`: make spans. `fork_server`: where the engine's processes come from; without one each starts anew. `others`:
    the front-ends that share the engine."""

    vllm_flags: tuple[str, ...]
    logging_config: Path
    engine_error_log: Path
    count_cache_entries: int
    fast_streams: bool = True
    coalesced_tokens: int = 1
    traced: bool = False
    fork_server: ForkServer | None = None
    others: OtherFrontEnds | None = None


@dataclass(frozen=True, slots=True)
class Adapter:
    """A LoRA adapter, and the number that the engine knows it by."""

    name: str
    path: str
    number: int


@dataclass(frozen=True, slots=True)
class Stack:
    """A running engine and its operations. Everything about one engine's life is in here, nothing outlives it.

    `unloaded` is None for models that do not generate, `figures` where the engine is another process's.
    """

    engine: SeamedEngine
    arguments: EngineArguments
    others: OtherFrontEnds | None
    figures: EngineFigures | None
    family: EngineFamily
    step_counter: StepCounter
    models: OpenAIServingModels
    configured_adapters: frozenset[str]
    operations: dict[OperationKey, Operation]
    model_names: tuple[str, ...]
    max_model_len: int
    kv_cache_tokens: int
    uses_tools: bool
    capacity: Capacity
    unloaded: Unloaded | None
    traits: Traits

    @property
    def alive(self) -> bool:
        return not self.engine.errored

    def operation(self, method: str, path: str) -> Operation | None:
        """The endpoint for a method and path template, or None where the model has none."""
        return self.operations.get((method, path))

    def body_schemas(self) -> dict[OperationKey, dict[str, Any]]:
        """JSON schemas of request bodies, with references as OpenAPI writes them."""
        described = {key: operation.body_schema() for key, operation in self.operations.items()}
        return {key: schema for key, schema in described.items() if schema is not None}

    async def report(self) -> None:
        """Let vLLM log its throughput and cache figures of the last interval."""
        await self.engine.do_log_stats()

    def pulse(self) -> Pulse:
        """What can be seen of the engine now, for the hang watch."""
        elsewhere = 0 if self.others is None else self.others.unfinished()
        unfinished = self.engine.get_num_unfinished_requests() + elsewhere
        computing_s = self.family.cpu_s() if current_platform.is_cpu() else None  # a GPU's steps are short
        return Pulse(self.step_counter.steps, unfinished, self.step_counter.asleep, computing_s)

    async def ended(self) -> None:
        """Wait until the engine is dead."""
        await asyncio.wait({self.engine.output_handler})

    def kill(self) -> None:
        """End the engine's processes at once; running requests end with an error, and `ended` returns."""
        self.family.kill()

    async def close(self) -> None:
        """Give back everything the engine holds, dead or alive. Nothing may run on it any more."""
        handler = self.engine.output_handler
        handler.cancel()  # else vLLM takes the shutdown for a failure, and logs it as one
        await asyncio.wait({handler})
        await asyncio.to_thread(shut_down, self.engine, self.family)

    def runtime_adapters(self) -> tuple[Adapter, ...]:
        """The adapters to be loaded again on the next engine: those loaded through the API, if the engine is ours."""
        if self.figures is None:
            return ()
        return tuple(adapter for adapter in self.adapters() if adapter.name not in self.configured_adapters)

    def adapters(self) -> tuple[Adapter, ...]:
        """All adapters."""
        loaded = self.models.lora_requests.values()
        return tuple(Adapter(a.lora_name, a.lora_path, a.lora_int_id) for a in loaded)

    def follow_adapters(self, adapters: Iterable[Adapter]) -> None:
        """Serve these adapters, which the engine has from another process."""
        wanted, known = {adapter.name: adapter for adapter in adapters}, self.models.lora_requests
        for gone in set(known) - set(wanted):
            del known[gone]
        for name, adapter in wanted.items():
            if name not in known or known[name].lora_int_id != adapter.number:
                known[name] = LoRARequest(lora_name=name, lora_int_id=adapter.number, lora_path=adapter.path)

    def hear_step(self, engine_index: int, encoded: bytes | None, part: StepPart) -> None:
        """Take in what a step was for another front-end's requests, with the engine's account if it went there."""
        scheduled = account(encoded)
        self.step_counter.steps += 1
        if self.figures is not None:
            self.figures.take(engine_index, scheduled, part)
        if scheduled is not None:
            prometheus_logger(self.engine.logger_manager).record(scheduled, None, engine_idx=engine_index)

    async def abandon(self, engine_requests: Sequence[str]) -> None:
        """Abort what a front-end that has ended was waiting for."""
        await self.engine.engine_core.abort_requests_async(list(engine_requests))

    async def load_adapters(self, adapters: tuple[Adapter, ...]) -> None:
        """Load adapters as the API does. One that cannot be loaded is logged and left out.

        Raises `StartFailure` if the engine dies meanwhile.
        """
        for adapter in adapters:
            request = LoadLoRAAdapterRequest(lora_name=adapter.name, lora_path=adapter.path)
            answer = await while_alive(self.engine, self.models.load_lora_adapter(request))
            if isinstance(answer, ErrorResponse):
                log.warning("an adapter is lost", adapter=adapter.name, reason=answer.error.message)


async def while_alive(engine: SeamedEngine, work: Coroutine[Any, Any, Result]) -> Result:
    """The result of work with the engine. Raises `StartFailure` if the engine dies first: vLLM's calls would hang."""
    task = asyncio.create_task(work)
    try:
        await asyncio.wait({task, engine.output_handler}, return_when=asyncio.FIRST_COMPLETED)
        if task.done() and (task.exception() is None or not engine.errored):
            return task.result()
        raise StartFailure("The engine ended while it was warming up.")
    finally:
        task.cancel()


def shut_down(engine: SeamedEngine, family: EngineFamily) -> None:
    engine.shutdown(timeout=0)
    family.clean_up()
    unregister_vllm_metrics()  # its gauges would stay as they were
    # These remember tokenizers and their methods, and with them some 40 MB of each engine that there ever was.
    cached_get_tokenizer.cache_clear()
    _supports_kw.cache_clear()
