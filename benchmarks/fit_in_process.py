"""What fitting a history costs, without a server around it: our own steps against a render of what is left.

A server's requests take tens of milliseconds and vary by some of them, so they cannot show a hundredth of a render.
The render is the tokenizer's own, template and encoding; vLLM's adds to it.
"""

import asyncio
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from cachetools import LRUCache
from prometheus_client import CollectorRegistry
from transformers import AutoTokenizer
from vllm.inputs.engine import tokens_input

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
_KIND: Final = "counselling-en"
_CASES: Final = (("fit by bytes", 10, 0.01), ("fit when counted", 60, 0.01), ("cut, all seen before", 1_045, 0.3))
_REPEATS: Final = 40
_ENOUGH_EXCHANGES: Final = 1_100

Messages = Sequence[dict[str, Any]]


def measured(model: Path) -> list[str]:
    """A sentence for each kind of history, with its bar."""
    return asyncio.run(_all(AutoTokenizer.from_pretrained(model)))


async def _all(tokenizer: Any) -> list[str]:
    said = conversations.generate(_KIND, 0, _ENOUGH_EXCHANGES)
    counter = MessageCounter(tokenizer, _COUNTS)
    policy = ContextPolicy(TruncationPolicy(), None)
    fitter = HistoryFitter(policy, {}, Metrics(CollectorRegistry()))
    return [
        await _case(name, said.messages(turns), bar, tokenizer=tokenizer, counter=counter, fitter=fitter)
        for name, turns, bar in _CASES
    ]


async def _case(
    name: str, messages: Messages, bar: float, *, tokenizer: Any, counter: MessageCounter, fitter: HistoryFitter
) -> str:
    kept: Messages = []

    async def render(left: list[Any]) -> Rendered:
        nonlocal kept
        kept = left
        return [], [tokens_input([])]

    fits_ms, renders_ms = [], []
    for repeat in range(_REPEATS + 1):
        conversation = _conversation(messages, counter, render)
        started_s = time.perf_counter()
        await fitter.render(conversation, OpenRequest("", ""))
        fitted_s = time.perf_counter()
        tokenizer.apply_chat_template(kept, add_generation_prompt=True, tokenize=True)
        if repeat:  # the first one counts
            fits_ms.append((fitted_s - started_s) * 1000)
            renders_ms.append((time.perf_counter() - fitted_s) * 1000)
    fit_ms, render_ms = statistics.median(fits_ms), statistics.median(renders_ms)
    share = fit_ms / render_ms
    return (
        f"{name}, in this process: {fit_ms:.3f} ms for {len(messages):,} messages, {share:.2%} of the {render_ms:.1f} "
        f"ms that rendering {len(kept):,} of them takes; bar < {bar:.0%} {'met' if share < bar else 'not met'}."
    )


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
