"""The two places where every vLLM endpoint passes, and what we put there.

Seam 1 is where messages become tokens (`SeamedRenderer`), seam 2 where tokens become outputs (`SeamedEngine`).
Both hand the work to a `Seams` object from the serving room, together with vLLM's own function to call next.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeVar

from vllm.engine.protocol import StreamingInput
from vllm.entrypoints.serve.tokenize.protocol import TokenizeChatRequest
from vllm.inputs import EngineInput, PromptType
from vllm.lora.request import LoRARequest
from vllm.outputs import PoolingRequestOutput, RequestOutput
from vllm.parser import Parser
from vllm.pooling_params import PoolingParams
from vllm.renderers.chat_utils import ChatTemplateContentFormatOption, ConversationMessage
from vllm.renderers.inputs.preprocess import extract_prompt_len
from vllm.renderers.online_renderer import OnlineRenderer
from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.kv_hints import KvHintsEnvelope


@dataclass(frozen=True, slots=True)
class Demand:
    """What one engine request asks for, in exact tokens. `max_tokens` is 0 for pooling requests."""

    engine_request_id: str
    prompt_tokens: int
    max_tokens: int
    n: int


Output = TypeVar("Output")
Outputs = Callable[[], AsyncGenerator[Output, None]]
Rendered = tuple[list[ConversationMessage], list[EngineInput]]
Render = Callable[[list[Any]], Awaitable[Rendered]]


class Seams(Protocol):
    """What the serving room does at the two seams."""

    async def render(self, messages: list[Any], render: Render) -> Rendered:
        """Turn messages into tokens by calling `render`, once or more, with the messages to keep."""
        ...

    def generate(self, demand: Demand, outputs: Outputs[Output]) -> AsyncGenerator[Output, None]:
        """Yield what `outputs()` yields, when and if it may run."""
        ...


class SeamedRenderer(OnlineRenderer):
    """vLLM's renderer with seam 1 in it. Made from a live one by `open_renderer_seam`."""

    seams: Seams

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

        if isinstance(request, TokenizeChatRequest):  # counts what was asked, never a fitted version of it
            return await render(messages)
        return await self.seams.render(messages, render)


def open_renderer_seam(renderer: OnlineRenderer, seams: Seams) -> None:
    """Put seam 1 into a renderer in place.

    vLLM builds its renderer inside `init_app_state` and hands that one object to every endpoint, so the object
    itself takes the subclass; a second object would leave the endpoints with the first.
    """
    renderer.__class__ = SeamedRenderer
    renderer.seams = seams


class SeamedEngine(AsyncLLM):
    """vLLM's engine with seam 2 in it. `seams` is set right after construction, before the first request."""

    seams: Seams

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
        demand = Demand(request_id, self._prompt_tokens(prompt), sampling_params.max_tokens or 0, sampling_params.n)
        outputs = partial(
            super().generate,
            prompt,
            sampling_params,
            request_id,
            prompt_text=prompt_text,
            lora_request=lora_request,
            tokenization_kwargs=tokenization_kwargs,
            trace_headers=trace_headers,
            priority=priority,
            data_parallel_rank=data_parallel_rank,
            session_id=session_id,
            kv_hints=kv_hints,
            reasoning_ended=reasoning_ended,
            reasoning_parser_kwargs=reasoning_parser_kwargs,
        )
        return self.seams.generate(demand, outputs)

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
        demand = Demand(request_id, self._prompt_tokens(prompt), max_tokens=0, n=1)
        outputs = partial(
            super().encode,
            prompt,
            pooling_params,
            request_id,
            lora_request=lora_request,
            trace_headers=trace_headers,
            priority=priority,
            tokenization_kwargs=tokenization_kwargs,
            reasoning_ended=reasoning_ended,
        )
        return self.seams.generate(demand, outputs)

    def _prompt_tokens(self, prompt: Any) -> int:
        """The exact prompt length, or 0 where vLLM has not tokenized yet (raw text, streamed input)."""
        if isinstance(prompt, EngineCoreRequest):
            return len(prompt.prompt_token_ids or ())
        return extract_prompt_len(self.model_config, prompt) if isinstance(prompt, dict) else 0
