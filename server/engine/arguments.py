"""vLLM's command line: any `vllm serve` flag is taken, and what the user left open is chosen here.

A flag that Tidegate cannot honour is refused with a sentence; a flag accepted and ignored would be a lie.
"""

import difflib
import os
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, NoReturn

import psutil
import structlog
import torch
from transformers import PretrainedConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
from vllm.parser import ParserManager
from vllm.platforms import current_platform
from vllm.reasoning import ReasoningParserManager
from vllm.tokenizers import TokenizerLike
from vllm.tool_parsers import ToolParserManager
from vllm.transformers_utils.config import get_config
from vllm.utils.argparse_utils import FlexibleArgumentParser

from server.engine.adapters import complete_adapters
from server.engine.chat_templates import read_chat_template
from server.engine.parsers import choose_parsers
from server.engine.start_failures import StartFailure
from server.policy.sizing import cpu_kv_cache_bytes

log = structlog.get_logger(__name__)

_GIB: Final = 1 << 30
_AUTO_TENSOR_PARALLEL: Final = 0
# Forced calls are made by the engine's grammar, on any model; vLLM wants a parser for them all the same, and this
# one needs no tokens of its own.
_FORCED_CALLS_PARSER: Final = "hermes"
_AUTO_MAX_MODEL_LEN: Final = -1

_REFUSED_FLAGS: Final[Mapping[str, str]] = {
    "headless": "Tidegate serves HTTP beside its engine; run `vllm serve --headless` on helper nodes.",
    "grpc": "Tidegate speaks HTTP only.",
    "grpc_port": "Tidegate speaks HTTP only.",
    "tokens_only": "Tidegate has no tokens-only mode.",
    "enable_ssl_refresh": "Restart the server to load new certificates, or end TLS in a proxy.",
    "data_parallel_multi_port_external_lb": "Start one Tidegate per rank instead.",
    "middleware": "Put a proxy before the server instead.",
    "enable_offline_docs": "The pages under /docs load their scripts from the network.",
    "uvicorn_log_level": "Use --log-level.",
    "disable_access_log_for_endpoints": "Probes are left out of the access log already; --no-access-log ends it.",
    "h11_max_incomplete_event_size": "The server's HTTP parser has limits of its own.",
    "h11_max_header_count": "The server's HTTP parser has limits of its own.",
    "sse_keep_alive_interval": "Use --keep-alive-s.",
    "shutdown_timeout": "Use --drain-timeout.",
}


@dataclass(frozen=True, slots=True)
class EngineArguments:
    """vLLM's parsed arguments with every open choice made.

    `uses_tools`: the chat template shows tools to the model and a parser reads its calls. `parser_named`: by the
    operator, so that it is not silently replaced.
    """

    args: Namespace
    uses_tools: bool
    parser_named: bool


class _Parser(FlexibleArgumentParser):
    """vLLM's parser, but an error is an exception with a hint instead of a usage dump."""

    def error(self, message: str) -> NoReturn:
        raise StartFailure(f"{message[:1].upper()}{message[1:]}.{self._hint(message)}")

    def _hint(self, message: str) -> str:
        flags = [flag for action in self._actions for flag in action.option_strings]
        if not message.startswith("unrecognized"):
            return ""
        unknown = [word for word in message.split() if word.startswith("-")]
        near = difflib.get_close_matches(unknown[0], flags, n=1) if unknown else []
        return f" Did you mean {near[0]}?" if near else " `tidegate serve --help` lists Tidegate's flags."


def vllm_help() -> str:
    """The help text of every `vllm serve` flag."""
    return make_arg_parser(FlexibleArgumentParser(prog="tidegate serve", add_help=False)).format_help()


def parse_arguments(flags: Sequence[str]) -> Namespace:
    """vLLM's arguments from its flags, with our defaults. `args.model` is None when no model is named.

    Raises `StartFailure` for unknown or refused flags.
    """
    parser = make_arg_parser(_Parser(prog="tidegate serve", add_help=False, allow_abbrev=False))
    parser.set_defaults(
        model=None,
        max_model_len=_AUTO_MAX_MODEL_LEN,
        tensor_parallel_size=_AUTO_TENSOR_PARALLEL,
        enable_prompt_tokens_details=True,  # clients see how much of a prompt came from the prefix cache
        scheduling_policy="priority",  # the gate keeps the engine's queue short; what is in it keeps our order
        enforce_eager=current_platform.is_cpu(),  # compiling for a CPU takes longer than it gives back on start
    )
    try:
        args = parser.parse_args(_without_auto(flags))
    except (OSError, ValueError) as error:  # its --config file
        raise StartFailure(f"--config: {error}.") from error
    args.model = args.model_tag or args.model
    for name, reason in _REFUSED_FLAGS.items():
        if getattr(args, name, None) != parser.get_default(name):
            raise StartFailure(f"--{name.replace('_', '-')} is not supported. {reason}")
    if (args.api_server_count or 1) > 1:
        raise StartFailure("--api-server-count is not supported as -asc or in vLLM's --config file. Write it out.")
    return args


def _without_auto(flags: Sequence[str]) -> list[str]:
    """Drop `--tensor-parallel-size auto`, which is the default and which vLLM's parser does not know."""
    kept: list[str] = []
    for flag in flags:
        spelled = flag.replace("_", "-")
        if spelled in {"--tensor-parallel-size=auto", "-tp=auto"}:
            continue
        if flag == "auto" and kept and kept[-1].replace("_", "-") in {"--tensor-parallel-size", "-tp"}:
            kept.pop()
            continue
        kept.append(flag)
    return kept


def complete_arguments(args: Namespace) -> EngineArguments:
    """Choose what the user left open: tensor parallelism, KV-cache memory on a CPU, tool and reasoning parsers."""
    config = _model_config(args)
    text_config = config.get_text_config()
    if args.tensor_parallel_size == _AUTO_TENSOR_PARALLEL:
        args.tensor_parallel_size = _auto_tensor_parallel(text_config)
    if current_platform.is_cpu():
        _complete_cpu(args)
    parser_named = args.tool_call_parser is not None
    uses_tools = _complete_parsers(args, config)
    complete_adapters(args)
    try:
        validate_parsed_serve_args(args)
    except (TypeError, ValueError) as error:
        raise StartFailure(str(error)) from error
    return EngineArguments(args, uses_tools, parser_named)


def _model_config(args: Namespace) -> PretrainedConfig:
    _refuse_other_files(args.model)
    try:
        return get_config(args.hf_config_path or args.model, args.trust_remote_code, args.revision)
    except (OSError, ValueError) as error:
        raise StartFailure(
            f"The model {args.model!r} could not be loaded: {_first_sentence(error)} "
            "Give a folder with a config.json, or the name of a model that can be downloaded."
        ) from error


def _refuse_other_files(model: str) -> None:
    """Name what people take for a model: vLLM's own words would be about a configuration that is missing."""
    if model.endswith(".gguf"):
        raise StartFailure(
            f"{model} is a GGUF file, for which vLLM 0.32 has no reader. Serve the model's safetensors, or unpack the "
            "file first: docs/models.md says how."
        )
    if (Path(model) / "adapter_config.json").is_file() and not (Path(model) / "config.json").is_file():
        raise StartFailure(f"{model} is a LoRA adapter. Serve its base model with --lora-modules NAME={model}.")


def _first_sentence(error: Exception) -> str:
    return str(error).strip().splitlines()[0].rstrip(".") + "."


def divisor_at_most(limit: int, heads: int) -> int:
    """The largest number of ranks, at most `limit`, over which `heads` attention heads divide evenly."""
    return next(size for size in range(min(limit, heads), 0, -1) if heads % size == 0)


def _auto_tensor_parallel(text_config: PretrainedConfig) -> int:
    gpus = 0 if current_platform.is_cpu() else torch.accelerator.device_count()
    heads = getattr(text_config, "num_attention_heads", 1)
    size = divisor_at_most(max(1, gpus), heads)
    log.info("tensor parallel size chosen", tensor_parallel_size=size, gpus=gpus, attention_heads=heads)
    return size


def _complete_cpu(args: Namespace) -> None:
    named = args.kv_cache_memory_bytes is not None or "VLLM_CPU_KVCACHE_SPACE" in os.environ
    if not named and args.gpu_memory_utilization == AsyncEngineArgs.gpu_memory_utilization:
        args.kv_cache_memory_bytes = cpu_kv_cache_bytes(psutil.virtual_memory().total)
        log.info("CPU KV cache size chosen", gib=round(args.kv_cache_memory_bytes / _GIB, 1))
    ranks = args.tensor_parallel_size
    if ranks > 1 and "VLLM_CPU_OMP_THREADS_BIND" not in os.environ:
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = cpu_ranks(sorted(os.sched_getaffinity(0)), ranks)


def cpu_ranks(cores: Sequence[int], ranks: int) -> str:
    """vLLM's core list per rank: cores 0 to 3 over 2 ranks are `0,1|2,3`. Ranks share cores when there are too few."""
    each = max(1, len(cores) // ranks)
    groups = [[cores[(rank * each + i) % len(cores)] for i in range(each)] for rank in range(ranks)]
    return "|".join(",".join(map(str, group)) for group in groups)


def _complete_parsers(args: Namespace, config: PretrainedConfig) -> bool:
    """Choose the parsers that the operator did not name. Returns whether the model can use tools by itself."""
    choice = choose_parsers(
        model_type=getattr(config, "model_type", ""),
        architectures=getattr(config, "architectures", None) or (),
        model_name=args.model,
        chat_template=read_chat_template(args.model, args.chat_template, args.revision),
    )
    named_in_config = args.structured_outputs_config.reasoning_parser
    args.reasoning_parser = args.reasoning_parser or named_in_config or choice.reasoning_parser or ""
    _refuse_unknown_parser("--tool-call-parser", args.tool_call_parser, ToolParserManager.list_registered())
    _refuse_unknown_parser("--reasoning-parser", args.reasoning_parser, ReasoningParserManager.list_registered())
    named = args.tool_call_parser or choice.tool_call_parser
    args.tool_call_parser = named or _FORCED_CALLS_PARSER
    args.enable_auto_tool_choice = True
    log.info(
        "parsers chosen",
        tool_call_parser=named,
        reasoning_parser=args.reasoning_parser or None,
        because=choice.reason,
    )
    return named is not None and choice.renders_tools


def _refuse_unknown_parser(flag: str, name: str | None, known: Sequence[str]) -> None:
    if name and name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        raise StartFailure(f"{flag} {name} is not known.{f' Did you mean {near[0]}?' if near else ''}")


def with_usable_parsers(arguments: EngineArguments, tokenizer: TokenizerLike) -> EngineArguments:
    """The arguments without a tool parser that the tokenizer lacks the tokens for.

    A fine-tune may have a family's template and not its vocabulary; plain chat beats a start that fails.
    """
    args = arguments.args
    try:
        ParserManager.get_parser(tool_parser_name=args.tool_call_parser, enable_auto_tools=True, tokenizer=tokenizer)
    except TypeError as error:
        if arguments.parser_named:
            raise StartFailure(f"{error} Choose another with --tool-call-parser.") from error
        log.warning("tools are off: the tokenizer does not fit the parser", parser=args.tool_call_parser)
        args.tool_call_parser = _FORCED_CALLS_PARSER
        return replace(arguments, uses_tools=False)
    return arguments
