"""The two places where every vLLM endpoint passes, and what we put there.

Seam 1 is where messages become tokens (`SeamedRenderer`), seam 2 where tokens become outputs (`SeamedEngine`).
Both hand the work to a `Seams` object from the serving room, together with vLLM's own function to call next.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final, Protocol, TypeVar

from cachetools import LRUCache
from vllm.engine.protocol import StreamingInput
from vllm.entrypoints.serve.tokenize.protocol import TokenizeChatRequest
from vllm.inputs import EngineInput, PromptType
from vllm.lora.request import LoRARequest
from vllm.outputs import PoolingRequestOutput, RequestOutput
from vllm.parser import Parser
from vllm.pooling_params import PoolingParams
from vllm.renderers import ChatParams, TokenizeParams
from vllm.renderers.chat_utils import ChatTemplateContentFormatOption
from vllm.renderers.inputs.preprocess import extract_prompt_len
from vllm.renderers.online_renderer import OnlineRenderer
from vllm.sampling_params import SamplingParams
from vllm.utils.mistral import is_mistral_tokenizer
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.kv_hints import KvHintsEnvelope

from server.engine.conversations import (
    Conversation,
    Rendered,
    TextPrompts,
    materialized,
    plain_prompts,
    without_token_slicing,
)
from server.engine.counting import MessageCounter, Overheads, length_or_none, measure_overheads
from server.engine.near_work import are_short, do_short_work_near, is_short, short_work
from server.engine.progress import Progress, followed
from server.engine.shortcut import deliver_plain_tokens
from server.engine.thinking import Spot, spots_left_out
from server.policy.forecast import Step

_TOOL_SETS_REMEMBERED: Final = 256
_TEMPLATE_SETTINGS_REMEMBERED: Final = 64
_TRACED_BY_US: Final = "the provider of this process"  # vLLM only asks whether there is one


@dataclass(frozen=True, slots=True)
class Demand:
    """What one engine request asks for, in exact tokens, and what it has consumed of it.

    `max_tokens` is that of each of the `n` choices, and 0 for pooling requests.
    """

    engine_request_id: str
    prompt_tokens: int
    max_tokens: int
    n: int
    max_model_len: int
    progress: Progress

    @property
    def fills_window(self) -> bool:
        """Whether `max_tokens` is all that the prompt leaves."""
        return self.prompt_tokens + self.max_tokens >= self.max_model_len


Output = TypeVar("Output")
Outputs = Callable[[], AsyncGenerator[Output, None]]


class Seams(Protocol):
    """What the serving room does at the two seams."""

    async def render(self, conversation: Conversation) -> Rendered:
        """Turn a history into tokens by rendering it, or what is to be kept of it."""
        ...

    async def render_text(self, prompts: TextPrompts) -> list[EngineInput]:
        """Turn plain prompts into tokens."""
        ...

    def stepped(self, step: Step) -> None:
        """Hear of one engine step, with its figures."""
        ...

    def engine_priority(self, asked: int) -> int:
        """The priority for the engine's own queue, where lower is earlier; `asked` is what vLLM read."""
        ...

    def owner(self) -> str:
        """Whose work it is that runs here. What one owner has stored is not there for another."""
        ...

    def trace_headers(self) -> dict[str, str]:
        """What puts the engine's span into the trace of the request that runs here."""
        ...

    def generate(self, demand: Demand, outputs: Outputs[Output]) -> AsyncGenerator[Output, None]:
        """Yield what `outputs()` yields, when and if it may run."""
        ...


class SeamedRenderer(OnlineRenderer):
    """vLLM's renderer with seam 1 in it. Made from a live one by `open_renderer_seam`."""

    seams: Seams
    counter: MessageCounter
    overheads: Overheads
    tool_tokens: LRUCache[str, int]
    left_out: LRUCache[int, frozenset[Spot]]

    async def preprocess_chat(
        self,
        request: Any,
        messages: list[Any],
        default_template: str | None,
        default_template_content_format: ChatTemplateContentFormatOption,
        default_template_kwargs: dict[str, Any] | None,
        tool_dicts: list[dict[str, Any]] | None = None,
        parser: type[Parser] | None = None,
        *,
        skip_mm_cache: bool = False,
    ) -> Rendered:
        parent = super().preprocess_chat

        async def render(kept: list[Any]) -> Rendered:
            own_template = getattr(request, "chat_template", None) is not None
            with short_work(not tool_dicts and not own_template and is_short(kept)):
                return await parent(
                    request,
                    kept,
                    default_template=default_template,
                    default_template_content_format=default_template_content_format,
                    default_template_kwargs=default_template_kwargs,
                    tool_dicts=tool_dicts,
                    parser=parser,
                    skip_mm_cache=skip_mm_cache,
                )

        def chat_params(with_tools: bool) -> ChatParams:
            params = request.build_chat_params(default_template, default_template_content_format)
            kwargs = {
                **(default_template_kwargs or {}),
                "tools": tool_dicts if with_tools else None,
                "tokenize": is_mistral_tokenizer(self.renderer.tokenizer),
            }
            return params.with_defaults(kwargs)

        async def bare_length(probe: list[dict[str, Any]], with_tools: bool) -> int:
            return await self.bare_length(probe, chat_params(with_tools))

        conversation = Conversation(
            messages=materialized(messages),
            tools=tool_dicts or (),
            max_model_len=self.model_config.max_model_len,
            counter=self.counter,
            overheads=self.overheads,
            tool_tokens=self.tool_tokens,
            bare_length=bare_length,
            left_out=lambda: self.thinking_left_out(chat_params(with_tools=False)),
            render_messages=without_token_slicing(request, render),
            counts_only=isinstance(request, TokenizeChatRequest),
        )
        return await self.seams.render(conversation)

    async def preprocess_completion(
        self,
        request: Any,
        prompt_input: str | list[str] | list[int] | list[list[int]] | None,
        prompt_embeds: bytes | list[bytes] | None,
        *,
        skip_mm_cache: bool = False,
    ) -> list[EngineInput]:
        parent, prompts = super().preprocess_completion, plain_prompts(prompt_input)

        async def render_newest(limit: int | None) -> list[EngineInput]:
            if limit is not None:
                request.truncate_prompt_tokens, request.truncation_side = limit, "left"
            with short_work(prompt_embeds is None and are_short(prompts)):
                return await parent(request, prompt_input, prompt_embeds, skip_mm_cache=skip_mm_cache)

        window = self.model_config.max_model_len
        return await self.seams.render_text(TextPrompts(prompts, window, self.counter, render_newest))

    async def bare_length(self, messages: list[dict[str, Any]], params: ChatParams) -> int:
        """The tokens of a conversation as the template prints it, without any limit or side effect."""
        no_limit = TokenizeParams(max_total_tokens=None, add_special_tokens=False)
        _, (engine_input,) = await self.renderer.render_chat_async([messages], params, no_limit)
        return len(engine_input["prompt_token_ids"])

    async def thinking_left_out(self, params: ChatParams) -> frozenset[Spot]:
        """Where the template leaves thinking out of earlier answers, tried out once for each of its settings."""
        settings = {**params.chat_template_kwargs, "add_generation_prompt": True, "continue_final_message": False}
        key = hash((params.chat_template, json.dumps(settings, sort_keys=True, default=str)))
        if key not in self.left_out:
            probed = replace(params, chat_template_kwargs=settings)

            async def length(probe: list[dict[str, Any]]) -> int | None:
                return await length_or_none(lambda messages: self.bare_length(messages, probed), probe)

            self.left_out[key] = await spots_left_out(length)
        return self.left_out[key]


async def open_renderer_seam(renderer: OnlineRenderer, seams: Seams, count_cache_entries: int) -> None:
    """Put seam 1 into a renderer in place, and measure the chat template it renders with.

    vLLM builds its renderer inside `init_app_state` and hands that one object to every endpoint, so the object
    itself takes the subclass; a second object would leave the endpoints with the first.
    """
    renderer.__class__ = SeamedRenderer
    assert isinstance(renderer, SeamedRenderer)
    renderer.seams = seams
    renderer.counter = MessageCounter(renderer.renderer.tokenizer, count_cache_entries)
    do_short_work_near(renderer.renderer, renderer.counter)
    renderer.tool_tokens = LRUCache(_TOOL_SETS_REMEMBERED)
    renderer.left_out = LRUCache(_TEMPLATE_SETTINGS_REMEMBERED)
    params = ChatParams(
        chat_template=renderer.chat_template,
        chat_template_content_format=renderer.chat_template_content_format,
        chat_template_kwargs={
            **renderer.default_chat_template_kwargs,
            "add_generation_prompt": True,
            "tokenize": is_mistral_tokenizer(renderer.renderer.tokenizer),
        },
    )
    renderer.overheads = await measure_overheads(lambda probe: renderer.bare_length(probe, params), renderer.counter)


class SeamedEngine(AsyncLLM):
    """vLLM's engine with seam 2 in it. `open_seam` is called right after construction, before the first request."""

    seams: Seams

    def open_seam(self, seams: Seams, *, traced: bool, coalesced_tokens: int = 1) -> None:
        """`traced`: vLLM makes spans, for the provider of this process. `coalesced_tokens`: of a plain stream, so many
        may share a frame while the event loop is behind the engine.

        vLLM's own switch, the endpoint among its flags, would make a provider for each engine and for each process.
        """
        self.seams = seams
        deliver_plain_tokens(self.output_processor, self._is_behind, coalesced_tokens)
        if traced:
            self.output_processor.tracing_enabled = True
            self.observability_config.otlp_traces_endpoint = _TRACED_BY_US

    def _is_behind(self) -> bool:
        """Whether the engine's next step has arrived already."""
        steps: asyncio.Queue[Any] | None = getattr(self.engine_core, "outputs_queue", None)
        return steps is not None and not steps.empty()

    def generate(  # a plain call that returns the generator saves a hop per token
        self,
        prompt: EngineCoreRequest | PromptType | EngineInput | AsyncGenerator[StreamingInput, None],
        sampling_params: SamplingParams,
        request_id: str,
        *,
        prompt_text: str | None = None,
        lora_request: LoRARequest | None = None,
        tokenization_kwargs: dict[str, Any] | None = None,
        trace_headers: Mapping[str, str] | None = None,
        priority: int = 0,
        data_parallel_rank: int | None = None,
        session_id: str | None = None,
        kv_hints: KvHintsEnvelope | None = None,
        reasoning_ended: bool | None = None,
        reasoning_parser_kwargs: dict[str, Any] | None = None,
    ) -> AsyncGenerator[RequestOutput, None]:
        demand = self._demand(request_id, prompt, sampling_params.max_tokens or 0, sampling_params.n)
        outputs = partial(
            super().generate,
            prompt,
            sampling_params,
            request_id,
            prompt_text=prompt_text,
            lora_request=lora_request,
            tokenization_kwargs=tokenization_kwargs,
            trace_headers=self.seams.trace_headers() or trace_headers,
            priority=self.seams.engine_priority(priority),
            data_parallel_rank=data_parallel_rank,
            session_id=session_id,
            kv_hints=kv_hints,
            reasoning_ended=reasoning_ended,
            reasoning_parser_kwargs=reasoning_parser_kwargs,
        )
        return self.seams.generate(demand, followed(demand.progress, outputs))

    def encode(
        self,
        prompt: PromptType | EngineInput,
        pooling_params: PoolingParams,
        request_id: str,
        lora_request: LoRARequest | None = None,
        trace_headers: Mapping[str, str] | None = None,
        priority: int = 0,
        tokenization_kwargs: dict[str, Any] | None = None,
        reasoning_ended: bool | None = None,
    ) -> AsyncGenerator[PoolingRequestOutput, None]:
        demand = self._demand(request_id, prompt, max_tokens=0, n=1)
        outputs = partial(
            super().encode,
            prompt,
            pooling_params,
            request_id,
            lora_request=lora_request,
            trace_headers=self.seams.trace_headers() or trace_headers,
            priority=self.seams.engine_priority(priority),
            tokenization_kwargs=tokenization_kwargs,
            reasoning_ended=reasoning_ended,
        )
        return self.seams.generate(demand, followed(demand.progress, outputs))

    def _demand(self, request_id: str, prompt: Any, max_tokens: int, n: int) -> Demand:
        window = self.model_config.max_model_len
        return Demand(request_id, self._prompt_tokens(prompt), max_tokens, n, window, Progress())

    def _prompt_tokens(self, prompt: Any) -> int:
        """The exact prompt length, or 0 where vLLM has not tokenized yet (raw text, streamed input)."""
        if isinstance(prompt, EngineCoreRequest):
            return len(prompt.prompt_token_ids or ())
        return extract_prompt_len(self.model_config, prompt) if isinstance(prompt, dict) else 0
