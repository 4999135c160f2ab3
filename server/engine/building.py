"""Builds a stack: parses what was asked for, starts the engine, and puts vLLM's serving objects on it."""

import asyncio
import logging
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import structlog
from starlette.datastructures import State
from vllm.config import VllmConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.launchers.api_server.app_state import init_app_state
from vllm.entrypoints.launchers.cli_args import propagate_flash_late_interaction
from vllm.envs import disable_envs_cache, enable_envs_cache
from vllm.logger import configure_logging_from_args
from vllm.platforms import current_platform
from vllm.reasoning import ReasoningParserManager
from vllm.tool_parsers import ToolParserManager
from vllm.usage.usage_lib import UsageContext

from server.engine.adapters import check_before_loading, tell_of_changes
from server.engine.arguments import EngineArguments, complete_arguments, parse_arguments, with_usable_parsers
from server.engine.embedded_model import EMBEDDED_MODEL_NAME, ensure_embedded_model
from server.engine.figures import EngineFigures, capacity_of, measure_unloaded
from server.engine.fork_server import engines_forked
from server.engine.kept_responses import keep_apart
from server.engine.operations import collect_operations
from server.engine.plain_streams import splice_chat, splice_completions
from server.engine.processes import EngineFamily, pids_of
from server.engine.seams import SeamedEngine, Seams, open_renderer_seam
from server.engine.sharing import engine_shared, prepare_sharing, refuse_unshareable
from server.engine.stack import Stack, StackRequest, shut_down, while_alive
from server.engine.start_failures import StartContext, StartFailure, explain
from server.engine.steps import StepCounter, step_counter
from server.engine.traits import Traits
from server.engine.vllm_metrics import StepwisePrometheusLogger
from server.policy.refusals import Refusal

log = structlog.get_logger(__name__)

Stage = Callable[[str], None]
_QUEUED_PER_SEQUENCE: Final = 2
_LEAST_QUEUED: Final = 256  # the answers of one request with a large `n` come all at once
_GENERATOR_LOGGERS: Final = tuple(
    f"vllm.entrypoints.{module}.serving"
    for module in ("openai.chat_completion", "openai.completion", "openai.responses", "anthropic")
)


async def build_stack(request: StackRequest, seams: Seams, stage: Stage) -> Stack:
    """Load the model and build everything on it. Raises `StartFailure`.

    The blocking part runs in a thread, so that the port answers meanwhile.
    """
    arguments, engine, figures = await asyncio.to_thread(_build_engine, request, seams, stage)
    family = await asyncio.to_thread(EngineFamily.of, pids_of(engine.engine_core))
    stage("warming up")
    engine._run_output_handler()  # vLLM starts it with the first request; it is also what notices a death
    try:
        return await while_alive(engine, _warmed_up(arguments, engine, family, figures, request))
    except StartFailure:
        await asyncio.to_thread(shut_down, engine, family)
        raise


async def _warmed_up(
    arguments: EngineArguments,
    engine: SeamedEngine,
    family: EngineFamily,
    figures: EngineFigures,
    request: StackRequest,
) -> Stack:
    stack = await build_on(arguments, engine, family, request)
    unloaded = await measure_unloaded(engine) if stack.traits.generates else None
    if request.others is not None:
        tell_of_changes(stack.models, request.others.adapters_changed)
    _log_window(stack, asked=arguments.args.max_model_len)
    return replace(stack, figures=figures, unloaded=unloaded)


def _build_engine(
    request: StackRequest, seams: Seams, stage: Stage
) -> tuple[EngineArguments, SeamedEngine, EngineFigures]:
    args = parse_arguments(request.vllm_flags)
    if request.others is not None:
        refuse_unshareable(args)
    disable_envs_cache()  # building an engine sets some of them
    figures = EngineFigures(seams.stepped, shared=request.others is not None)
    try:
        configure_logging(args, request.logging_config)
        if args.model is None:
            stage("fetching the embedded model")
            args.model = str(ensure_embedded_model())
            args.served_model_name = args.served_model_name or [EMBEDDED_MODEL_NAME]
        stage("reading the model's configuration")
        import_plugins(args)
        arguments = complete_arguments(args)
        stage("loading the model")
        engine = _start_engine(args, figures, request)
    except Exception as error:
        raise _explained(error, args, request.engine_error_log) from error
    engine.open_seam(seams, traced=request.traced, coalesced_tokens=request.coalesced_tokens)
    return arguments, engine, figures


def configure_logging(args: Namespace, ours: Path) -> None:
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


def import_plugins(args: Namespace) -> None:
    if args.tool_parser_plugin:
        ToolParserManager.import_tool_parser(args.tool_parser_plugin)
    if args.reasoning_parser_plugin:
        ReasoningParserManager.import_reasoning_parser(args.reasoning_parser_plugin)


def _start_engine(args: Namespace, figures: EngineFigures, request: StackRequest) -> SeamedEngine:
    engine_args = AsyncEngineArgs.from_cli_args(args)
    propagate_flash_late_interaction(args, engine_args)
    config = engine_args.create_engine_config(usage_context=UsageContext.OPENAI_API_SERVER)
    scheduling = config.scheduler_config
    if scheduling.max_num_queued_reqs is None:  # a backstop: our own queue keeps the engine's far shorter
        scheduling.max_num_queued_reqs = max(_LEAST_QUEUED, _QUEUED_PER_SEQUENCE * scheduling.max_num_seqs)
    numa_bind = config.parallel_config.numa_bind
    others = () if request.others is None else request.others.addresses
    prepare_sharing(config, 1 + len(others))
    loggers = [StepCounter, figures.logger, StepwisePrometheusLogger]
    with (
        engines_forked(request.fork_server, on_cpu=current_platform.is_cpu(), numa_bind=numa_bind),
        engine_shared(others),
    ):
        return new_engine(config, args, loggers, client_count=1 + len(others))


def new_engine(config: VllmConfig, args: Namespace, stat_loggers: Sequence[Any], **client: Any) -> SeamedEngine:
    """vLLM's `AsyncLLM`, with our seams in it. `client`: which of its front-ends this is, where it has several."""
    engine = SeamedEngine.from_vllm_config(
        vllm_config=config,
        usage_context=UsageContext.OPENAI_API_SERVER,
        stat_loggers=list(stat_loggers),
        enable_log_requests=args.enable_log_requests,
        aggregate_engine_logging=args.aggregate_engine_logging,
        disable_log_stats=args.disable_log_stats,
        **client,
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


async def build_on(
    arguments: EngineArguments, engine: SeamedEngine, family: EngineFamily, request: StackRequest
) -> Stack:
    """Everything that stands on an engine."""
    arguments = with_usable_parsers(arguments, engine.renderer.tokenizer)
    args, state = arguments.args, State()
    await engine.reset_mm_cache()  # vLLM does the same: dummy inputs of its memory profiling stay behind otherwise
    tasks = await engine.get_supported_tasks()
    await init_app_state(engine, state, args, tasks)
    check_before_loading(state.openai_serving_models, args)
    await open_renderer_seam(state.online_renderer, engine.seams, request.count_cache_entries)
    keep_apart(state.openai_serving_responses, engine.seams.owner)
    parser_is_borrowed = not arguments.uses_tools and not arguments.parser_named and not args.reasoning_parser
    _lighten(state, parse_tools_only=parser_is_borrowed, fast_streams=request.fast_streams)
    config = engine.vllm_config
    stack = Stack(
        engine=engine,
        arguments=arguments,
        others=request.others,
        figures=None,
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
        unloaded=None,
        traits=Traits(
            model_type=getattr(config.model_config.hf_config, "model_type", ""),
            generates="generate" in tasks,
            reasons=bool(args.reasoning_parser),
            sees=config.model_config.is_multimodal_model,
        ),
    )
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
