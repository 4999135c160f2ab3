"""One engine with everything built on it: vLLM's `AsyncLLM` and OpenAI serving objects, replaceable as a whole."""

import asyncio
import logging
from argparse import Namespace
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeVar

import structlog
from starlette.datastructures import State
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.launchers.api_server.app_state import init_app_state
from vllm.entrypoints.launchers.cli_args import propagate_flash_late_interaction
from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.entrypoints.serve.lora.protocol import LoadLoRAAdapterRequest
from vllm.envs import disable_envs_cache, enable_envs_cache
from vllm.logger import configure_logging_from_args
from vllm.platforms import current_platform
from vllm.reasoning import ReasoningParserManager
from vllm.tokenizers import cached_get_tokenizer
from vllm.tool_parsers import ToolParserManager
from vllm.usage.usage_lib import UsageContext
from vllm.utils.func_utils import _supports_kw
from vllm.v1.metrics.prometheus import unregister_vllm_metrics

from server.engine.adapters import check_before_loading
from server.engine.arguments import EngineArguments, complete_arguments, parse_arguments, with_usable_parsers
from server.engine.embedded_model import EMBEDDED_MODEL_NAME, ensure_embedded_model
from server.engine.figures import EngineFigures, capacity_of, measure_unloaded
from server.engine.fork_server import ForkServer, engines_forked
from server.engine.latencies import StepwisePrometheusLogger
from server.engine.operations import Operation, OperationKey, collect_operations
from server.engine.plain_streams import splice_chat, splice_completions
from server.engine.processes import EngineFamily, pids_of
from server.engine.seams import SeamedEngine, Seams, open_renderer_seam
from server.engine.start_failures import StartContext, StartFailure, explain
from server.engine.steps import StepCounter, step_counter
from server.engine.traits import Traits
from server.policy.objectives import Unloaded
from server.policy.refusals import Refusal
from server.policy.reservations import Capacity
from server.policy.restarts import Pulse

log = structlog.get_logger(__name__)

Stage = Callable[[str], None]
Result = TypeVar("Result")
_QUEUED_PER_SEQUENCE: Final = 2
_LEAST_QUEUED: Final = 256  # the answers of one request with a large `n` come all at once
_GENERATOR_LOGGERS: Final = tuple(
    f"vllm.entrypoints.{module}.serving"
    for module in ("openai.chat_completion", "openai.completion", "openai.responses", "anthropic")
)


@dataclass(frozen=True, slots=True)
class StackRequest:
    """What a stack is built from. `logging_config` is a dictConfig file for vLLM's processes, whose
    error records also land in `engine_error_log`. `fast_streams`: make the frames of plain text streams here.
    `traced`: make spans. `fork_server`: where the engine's processes come from; without one each starts anew."""

    vllm_flags: tuple[str, ...]
    logging_config: Path
    engine_error_log: Path
    count_cache_entries: int
    fast_streams: bool = True
    traced: bool = False
    fork_server: ForkServer | None = None


@dataclass(frozen=True, slots=True)
class Adapter:
    """A LoRA adapter that was loaded while the engine ran."""

    name: str
    path: str


@dataclass(frozen=True, slots=True)
class Stack:
    """A running engine and its operations. Everything about one engine's life is in here, nothing outlives it.

    `unloaded` is None for models that do not generate.
    """

    engine: SeamedEngine
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
        unfinished = self.engine.get_num_unfinished_requests()
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
        await asyncio.to_thread(_shut_down, self.engine, self.family)

    def runtime_adapters(self) -> tuple[Adapter, ...]:
        """The adapters that were loaded through the API; the others come with the configuration."""
        loaded = self.models.lora_requests.values()
        return tuple(Adapter(a.lora_name, a.lora_path) for a in loaded if a.lora_name not in self.configured_adapters)

    async def load_adapters(self, adapters: tuple[Adapter, ...]) -> None:
        """Load adapters as the API does. One that cannot be loaded is logged and left out.

        Raises `StartFailure` if the engine dies meanwhile.
        """
        for adapter in adapters:
            request = LoadLoRAAdapterRequest(lora_name=adapter.name, lora_path=adapter.path)
            answer = await _while_alive(self.engine, self.models.load_lora_adapter(request))
            if isinstance(answer, ErrorResponse):
                log.warning("an adapter is lost", adapter=adapter.name, reason=answer.error.message)


async def build_stack(request: StackRequest, seams: Seams, stage: Stage) -> Stack:
    """Load the model and build everything on it. Raises `StartFailure`.

    The blocking part runs in a thread, so that the port answers meanwhile.
    """
    arguments, engine, family = await asyncio.to_thread(_build_engine, request, seams, stage)
    stage("warming up")
    engine._run_output_handler()  # vLLM starts it with the first request; it is also what notices a death
    building = _build_on(arguments, engine, family, request)
    try:
        return await _while_alive(engine, building)
    except StartFailure:
        await asyncio.to_thread(_shut_down, engine, family)
        raise


async def _while_alive(engine: SeamedEngine, work: Coroutine[Any, Any, Result]) -> Result:
    """The result of work with the engine. Raises `StartFailure` if the engine dies first: vLLM's calls would hang."""
    task = asyncio.create_task(work)
    try:
        await asyncio.wait({task, engine.output_handler}, return_when=asyncio.FIRST_COMPLETED)
        if task.done() and (task.exception() is None or not engine.errored):
            return task.result()
        raise StartFailure("The engine ended while it was warming up.")
    finally:
        task.cancel()


def _shut_down(engine: SeamedEngine, family: EngineFamily) -> None:
    engine.shutdown(timeout=0)
    family.clean_up()
    unregister_vllm_metrics()  # its gauges would stay as they were
    # These remember tokenizers and their methods, and with them some 40 MB of each engine that there ever was.
    cached_get_tokenizer.cache_clear()
    _supports_kw.cache_clear()


def _build_engine(
    request: StackRequest, seams: Seams, stage: Stage
) -> tuple[EngineArguments, SeamedEngine, EngineFamily]:
    args = parse_arguments(request.vllm_flags)
    disable_envs_cache()  # building an engine sets some of them
    try:
        _configure_logging(args, request.logging_config)
        if args.model is None:
            stage("fetching the embedded model")
            args.model = str(ensure_embedded_model())
            args.served_model_name = args.served_model_name or [EMBEDDED_MODEL_NAME]
        stage("reading the model's configuration")
        _import_plugins(args)
        arguments = complete_arguments(args)
        stage("loading the model")
        engine = _start_engine(args, seams, request.fork_server)
    except Exception as error:
        raise _explained(error, args, request.engine_error_log) from error
    engine.open_seam(seams, traced=request.traced)
    return arguments, engine, EngineFamily.of(pids_of(engine.engine_core))


def _configure_logging(args: Namespace, ours: Path) -> None:
    """Give vLLM's processes our log format, unless the operator chose a logging configuration of their own."""
    chosen = getattr(args, "logging_config", None)
    if not getattr(args, "log_config_file", None) and not (chosen and chosen.pylogging_config_file):
        args.log_config_file = str(ours)
    configure_logging_from_args(args)
    for name in _GENERATOR_LOGGERS:
        logging.getLogger(name).addFilter(_is_no_refusal)


def _is_no_refusal(record: logging.LogRecord) -> bool:
    """vLLM's generators log whatever is raised below them with a traceback; our refusals have a line of their own."""
    return record.exc_info is None or not isinstance(record.exc_info[1], Refusal)


def _import_plugins(args: Namespace) -> None:
    if args.tool_parser_plugin:
        ToolParserManager.import_tool_parser(args.tool_parser_plugin)
    if args.reasoning_parser_plugin:
        ReasoningParserManager.import_reasoning_parser(args.reasoning_parser_plugin)


def _start_engine(args: Namespace, seams: Seams, fork_server: ForkServer | None) -> SeamedEngine:
    engine_args = AsyncEngineArgs.from_cli_args(args)
    propagate_flash_late_interaction(args, engine_args)
    config = engine_args.create_engine_config(usage_context=UsageContext.OPENAI_API_SERVER)
    scheduling = config.scheduler_config
    if scheduling.max_num_queued_reqs is None:  # a backstop: our own queue keeps the engine's far shorter
        scheduling.max_num_queued_reqs = max(_LEAST_QUEUED, _QUEUED_PER_SEQUENCE * scheduling.max_num_seqs)
    numa_bind = config.parallel_config.numa_bind
    with engines_forked(fork_server, on_cpu=current_platform.is_cpu(), numa_bind=numa_bind):
        engine = SeamedEngine.from_vllm_config(
            vllm_config=config,
            usage_context=UsageContext.OPENAI_API_SERVER,
            stat_loggers=[StepCounter, EngineFigures(seams.stepped).logger, StepwisePrometheusLogger],
            enable_log_requests=engine_args.enable_log_requests,
            aggregate_engine_logging=engine_args.aggregate_engine_logging,
            disable_log_stats=engine_args.disable_log_stats,
        )
    assert isinstance(engine, SeamedEngine)
    return engine


def _explained(error: Exception, args: Namespace, engine_error_log: Path) -> StartFailure:
    log.debug("engine start failed", exc_info=error)
    words = engine_error_log.read_text(encoding="utf-8") if engine_error_log.exists() else ""
    context = StartContext(
        model=(args.served_model_name or [args.model])[0],
        on_cpu=current_platform.is_cpu(),
        kv_cache_dtype=args.kv_cache_dtype,
    )
    return explain(error, words, context)


async def _build_on(
    arguments: EngineArguments, engine: SeamedEngine, family: EngineFamily, request: StackRequest
) -> Stack:
    arguments = with_usable_parsers(arguments, engine.renderer.tokenizer)
    args, state = arguments.args, State()
    await engine.reset_mm_cache()  # vLLM does the same: dummy inputs of its memory profiling stay behind otherwise
    tasks = await engine.get_supported_tasks()
    await init_app_state(engine, state, args, tasks)
    check_before_loading(state.openai_serving_models, args)
    await open_renderer_seam(state.online_renderer, engine.seams, request.count_cache_entries)
    parser_is_borrowed = not arguments.uses_tools and not arguments.parser_named and not args.reasoning_parser
    _lighten(state, parse_tools_only=parser_is_borrowed, fast_streams=request.fast_streams)
    config = engine.vllm_config
    stack = Stack(
        engine=engine,
        family=family,
        step_counter=step_counter(engine.logger_manager),
        models=state.openai_serving_models,
        configured_adapters=frozenset(state.openai_serving_models.lora_requests),
        operations=collect_operations(args, state, tasks, config.model_config),
        model_names=tuple(args.served_model_name or [args.model]),
        max_model_len=config.model_config.max_model_len,
        kv_cache_tokens=config.cache_config.kv_cache_size_tokens or 0,
        uses_tools=arguments.uses_tools,
        capacity=capacity_of(config),
        unloaded=await measure_unloaded(engine) if "generate" in tasks else None,
        traits=Traits(
            model_type=getattr(config.model_config.hf_config, "model_type", ""),
            generates="generate" in tasks,
            reasons=bool(args.reasoning_parser),
            sees=config.model_config.is_multimodal_model,
        ),
    )
    _log_window(stack, asked=args.max_model_len)
    enable_envs_cache()  # vLLM reads its environment at every token; its own cache is for the engine's processes only
    return stack


def _lighten(state: State, *, parse_tools_only: bool, fast_streams: bool) -> None:
    """Take from vLLM's endpoints what a request does not need.

    `parse_tools_only`: the parser is there for forced calls alone, and on every other stream it would cost several
    microseconds a token.
    """
    for chat in (state.openai_serving_chat, state.anthropic_serving_messages):
        if chat is None:
            continue
        if parse_tools_only:
            _parse_only_with_tools(chat)
        if fast_streams:
            splice_chat(chat, partial(_parses, chat, parse_tools_only))
    if fast_streams and state.openai_serving_completion is not None:
        splice_completions(state.openai_serving_completion)


def _parses(chat: Any, parse_tools_only: bool, request: Any) -> bool:
    return chat.parser_cls is not None and (bool(request.tools) or not parse_tools_only)


def _parse_only_with_tools(chat: Any) -> None:
    make_parser = chat._make_parser

    def make_if_needed(request: Any, tokenizer: Any, chat_template_kwargs: Any) -> Any:
        return make_parser(request, tokenizer, chat_template_kwargs) if request.tools else None

    chat._make_parser = make_if_needed


def _log_window(stack: Stack, asked: int) -> None:
    if asked > 0:
        log.info("window", max_model_len=stack.max_model_len, kv_cache_tokens=stack.kv_cache_tokens)
        return
    log.info(
        "window chosen: the largest that the model and the KV cache allow; more memory "
        "(--gpu-memory-utilization, VLLM_CPU_KVCACHE_SPACE) or --kv-cache-dtype fp8 raises the KV cache",
        max_model_len=stack.max_model_len,
        kv_cache_tokens=stack.kv_cache_tokens,
    )
