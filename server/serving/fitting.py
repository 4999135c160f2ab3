"""Fits a chat history to the window: the pure rule of `policy/context.py` between counting and rendering.

Most histories fit by their byte length alone and are rendered at once. The others are counted, cut, and what is left
is rendered once; a second render happens only when the estimate was too low.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from server.policy.context import (
    Fit,
    LastTurnTooLong,
    Layout,
    TruncationPolicy,
    Window,
    default_reserve_tokens,
    drop_one_more,
    fits_by_bytes,
    keep_newest,
    lay_out,
    plan_fit,
    view,
)
from server.policy.edits import Edits
from server.policy.refusals import ContextLengthExceeded, NotDegraded
from server.serving.requests import OpenRequest
from server.telemetry.metrics import Metrics

if TYPE_CHECKING:
    from server.engine.conversations import Conversation, Costs, Rendered, TextPrompts

# A history of this many messages takes about a millisecond to lay out and plan, and other streams wait meanwhile.
_PLANNED_ON_LOOP_MESSAGES = 200
_LEAST_SHARE_DROPPED = 0.1
_SHORT_WINDOW_RETRY_AFTER_S = 20.0  # the ladder steps down after 15 s of low pressure at the earliest


@dataclass(frozen=True, slots=True)
class ContextPolicy:
    """The operator's choices. `reserve_tokens` None: the default for the model's window."""

    truncation: TruncationPolicy
    reserve_tokens: int | None


@dataclass(frozen=True, slots=True)
class FitReport:
    """What a fit decided and from which figures, for the dry run."""

    layout: Layout
    costs: Costs
    fit: Fit
    window: Window
    prompt_tokens: int


class HistoryFitter:
    """Seam 1: from a conversation to the tokens of what is kept of it."""

    def __init__(self, policy: ContextPolicy, overrides: Mapping[str, ContextPolicy], metrics: Metrics) -> None:
        self._policy = policy
        self._overrides = overrides
        self._metrics = metrics

    def policy_of(self, model: str | None) -> ContextPolicy:
        """The operator's policy for a served model or adapter."""
        return self._overrides.get(model or "", self._policy)

    async def render(self, conversation: Conversation, request: OpenRequest) -> Rendered:
        """Render what fits. Raises `ContextLengthExceeded` and `OrphanToolResult`."""
        policy = request.truncation or self.policy_of(request.model).truncation
        window = self._window(conversation, request)
        if request.dry_run is not None:
            request.dry_run.report, rendered = await self._fit(conversation, window, replace(policy, enabled=True))
            return rendered
        if not policy.enabled or conversation.counts_only:
            return await conversation.render(conversation.messages)
        if self._surely_fits(conversation, window):
            with suppress(ContextLengthExceeded):  # a template may print its tools more than once
                return await conversation.render(conversation.messages)
        report, rendered = await self._fit(conversation, window, policy)
        if report.fit.truncated:
            _note_short_window(window, request)
            request.edited(Edits(len(report.fit.dropped), report.fit.dropped_tokens))
            self._metrics.truncated(len(report.fit.dropped), report.fit.dropped_tokens)
        return rendered

    async def render_text(self, prompts: TextPrompts, request: OpenRequest) -> list[Any]:
        """Plain prompts are cut only where the client asks for it: their newest tokens are kept."""
        if request.truncation is None or not request.truncation.enabled:
            return await prompts.render_newest(None)
        keep = prompts.max_model_len - self._reserve(prompts.max_model_len, request)
        dropped = sum(keep_newest(length, keep) for length in await prompts.lengths())
        if not dropped:
            return await prompts.render_newest(None)
        request.edited(Edits(dropped_tokens=dropped))
        self._metrics.truncated(0, dropped)
        return await prompts.render_newest(keep)

    def _reserve(self, max_model_len: int, request: OpenRequest) -> int:
        chosen = self.policy_of(request.model).reserve_tokens
        return default_reserve_tokens(max_model_len) if chosen is None else min(chosen, max_model_len - 1)

    def _window(self, conversation: Conversation, request: OpenRequest) -> Window:
        reserve = self._reserve(conversation.max_model_len, request)
        return Window(conversation.max_model_len, reserve, factor=request.context_factor)

    def _surely_fits(self, conversation: Conversation, window: Window) -> bool:
        """By byte length alone; histories with tool results are laid out all the same, to find orphans among them."""
        messages = conversation.messages
        if any(message.get("role") == "tool" for message in messages):
            lay_out([view(message) for message in messages])
        length = conversation.most_bytes()
        overheads = conversation.overheads
        return length is not None and fits_by_bytes(length + overheads.prompt, len(messages), overheads.largest, window)

    async def _fit(
        self, conversation: Conversation, window: Window, policy: TruncationPolicy
    ) -> tuple[FitReport, Rendered]:
        started_s = time.perf_counter()
        costs = await conversation.costs()
        window = replace(window, fixed_tokens=costs.fixed)
        layout, fit = await _planned(conversation.messages, costs.messages, window, policy.retention_ratio)
        cached = len(costs.messages) - costs.newly_counted
        self._metrics.fitted(time.perf_counter() - started_s, cached, costs.newly_counted)
        while True:
            try:
                rendered = await conversation.render([conversation.messages[i] for i in fit.kept])
                prompt_tokens = conversation.prompt_tokens(rendered)
            except ContextLengthExceeded:
                prompt_tokens = max(fit.kept_tokens, window.max_model_len)
            else:
                if prompt_tokens <= window.max_prompt_tokens:
                    return FitReport(layout, costs, fit, window, prompt_tokens), rendered
            fit = _smaller(fit, layout, costs.messages, window, prompt_tokens)


def _note_short_window(window: Window, request: OpenRequest) -> None:
    """A history was cut while the ladder allows it less room. Raises `NotDegraded` where that is not wanted."""
    if window.factor == 1:
        return
    if request.wish == "none":
        raise NotDegraded(
            "The server is short of capacity and would have to shorten this conversation. Please try again later.",
            retry_after_s=_SHORT_WINDOW_RETRY_AFTER_S,
        )
    request.degraded(f"context={window.factor:g}")


def _smaller(fit: Fit, layout: Layout, tokens: list[int], window: Window, rendered_tokens: int) -> Fit:
    """The next fit to render when the estimate was too low: a good part less, so that renders stay few."""
    enough = fit.dropped_tokens + _LEAST_SHARE_DROPPED * (fit.kept_tokens - window.fixed_tokens)
    smaller = drop_one_more(fit, layout, tokens, window, rendered_tokens)
    while smaller.dropped_tokens < enough:
        try:
            smaller = drop_one_more(smaller, layout, tokens, window, rendered_tokens)
        except LastTurnTooLong:
            break
    return smaller


async def _planned(
    messages: list[dict[str, Any]], tokens: list[int], window: Window, retention_ratio: float
) -> tuple[Layout, Fit]:
    def plan() -> tuple[Layout, Fit]:
        layout = lay_out([view(message) for message in messages])
        return layout, plan_fit(layout, tokens, window, retention_ratio)

    return plan() if len(messages) < _PLANNED_ON_LOOP_MESSAGES else await asyncio.to_thread(plan)


def described(report: FitReport) -> dict[str, Any]:
    """A report as `/v1/context/fit` answers it. Turn -1 is the leading system messages."""
    fit, layout, window = report.fit, report.layout, report.window
    kept = set(fit.kept)
    turns: dict[int, list[int]] = {}
    for i, turn in enumerate(layout.turn_of):
        turns.setdefault(turn, []).append(i)
    return {
        "object": "context.fit",
        "max_model_len": window.max_model_len,
        "reserve_tokens": window.reserve_tokens,
        "prompt_tokens": report.prompt_tokens,
        "fixed_tokens": report.costs.fixed,
        "truncated": fit.truncated,
        "kept_messages": list(fit.kept),
        "dropped_messages": list(fit.dropped),
        "dropped_tokens": fit.dropped_tokens,
        "turns": [
            {
                "turn": turn,
                "messages": members,
                "tokens": sum(report.costs.messages[i] for i in members),
                "kept": all(i in kept for i in members),
            }
            for turn, members in sorted(turns.items())
        ],
    }
