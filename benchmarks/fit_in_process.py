"""What fitting a history costs, without a server around it: our own steps against a render of what is left.

A server's requests take tens of milliseconds and vary by some of them, so they cannot show a hundredth of a render.
The render is vLLM's: messages parsed, template, encoding.
"""

import asyncio
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from cachetools import LRUCache
from prometheus_client import CollectorRegistry
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.inputs.engine import tokens_input
from vllm.renderers.registry import renderer_from_config

from benchmarks import conversations
from server.engine.conversations import Conversation, Rendered
from server.engine.counting import MessageCounter, Overheads
from server.policy.context import TruncationPolicy
from server.serving.fitting import ContextPolicy, HistoryFitter
from server.serving.requests import OpenRequest
from server.telemetry.metrics import Metrics

_WINDOW: Final = 8192
_COUNTS: Final = 200_000
_AROUND_TOKENS: Final = 5
_AROUND: Final = dict.fromkeys(("system", "developer", "user", "assistant"), _AROUND_TOKENS)
_CASES: Final = (
    ("fit by bytes", "chat-en", 4, 0.01),
    ("fit by bytes", "counselling-en", 10, 0.01),
    ("fit when counted", "chat-en", 22, 0.01),
    ("fit when counted", "counselling-en", 60, 0.01),
    ("cut, all seen before", "counselling-en", 1_045, 0.3),
)
_REPEATS: Final = 40
_ENOUGH_EXCHANGES: Final = 1_100
_PASSED: Final = 120  # rendered after a history that was not fitted, so that both find the caches in the same state

Messages = Sequence[dict[str, Any]]


class _Bench:
    """A fitter, and vLLM's renderer for a model, without an engine."""

    def __init__(self, model: Path) -> None:
        config = AsyncEngineArgs(model=str(model), max_model_len=_WINDOW).create_engine_config()
        self._model_config = config.model_config
        self._renderer = renderer_from_config(config)
        self._counter = MessageCounter(self._renderer.get_tokenizer(), _COUNTS)
        self._fitter, self._passer = (
            HistoryFitter(ContextPolicy(TruncationPolicy(enabled=enabled), None), {}, Metrics(CollectorRegistry()))
            for enabled in (True, False)
        )

    async def case(self, name: str, messages: Messages, bar: float) -> str:
        """Fit, pass through and render in turns. A fit's time is what it takes longer than passing through."""
        kept: list[Any] = []

        async def left(messages: list[Any]) -> Rendered:
            kept[:] = messages
            return [], [tokens_input([])]

        fits_ms, renders_ms = [], []
        for repeat in range(_REPEATS + 1):
            timed_ms = list[float]()
            for fitter in (self._passer, self._fitter):
                conversation, request = _conversation(messages, self._counter, left), OpenRequest("", "")
                started_s = time.perf_counter()
                await fitter.render(conversation, request)
                fitted_s = time.perf_counter()
                await self._render(kept if fitter is self._fitter else kept[:_PASSED])
                timed_ms += (fitted_s - started_s) * 1000, (time.perf_counter() - fitted_s) * 1000
            if repeat:  # the first one counts
                fits_ms.append(timed_ms[2] - timed_ms[0])
                renders_ms.append(timed_ms[3])
        fit_ms, render_ms = statistics.median(fits_ms), statistics.median(renders_ms)
        share = fit_ms / render_ms
        return (
            f"{name}, in this process: {fit_ms:.3f} ms for {len(messages):,} messages, {share:.2%} of the "
            f"{render_ms:.1f} ms that rendering {len(kept):,} of them takes; bar < {bar:.0%} "
            f"{'met' if share < bar else 'not met'}."
        )

    async def _render(self, messages: list[Any]) -> None:
        request = ChatCompletionRequest(messages=messages, max_completion_tokens=1)
        chat = request.build_chat_params(None, "auto").with_defaults({"tools": None, "tokenize": False})
        await self._renderer.render_chat_async([messages], chat, request.build_tok_params(self._model_config))


def measured(model: Path) -> list[str]:
    """A sentence for each kind of history, with its bar."""

    async def every() -> list[str]:
        bench = _Bench(model)
        said = {kind: conversations.generate(kind, 0, _ENOUGH_EXCHANGES) for _, kind, _, _ in _CASES}
        return [
            await bench.case(f"{kind}, {name}", said[kind].messages(turns), bar) for name, kind, turns, bar in _CASES
        ]

    return asyncio.run(every())


def _conversation(messages: Messages, counter: MessageCounter, render: Any) -> Conversation:
    """As it comes from a request: its texts are new objects, whose hash nobody knows."""

    async def unused(*_: Any) -> Any:
        raise AssertionError("plain texts need no render to be counted")

    return Conversation(
        messages=[{**message, "content": message["content"].encode().decode()} for message in messages],
        tools=(),
        max_model_len=_WINDOW,
        counter=counter,
        overheads=Overheads(_AROUND, _AROUND_TOKENS),
        tool_tokens=LRUCache(1),
        bare_length=unused,
        left_out=unused,
        render_messages=render,
        counts_only=False,
    )
