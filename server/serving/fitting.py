"""Fits a chat history to the window: the pure rule of `policy/context.py` between counting and rendering.

Most histories fit by their byte length alone and are rendered at once. The others are counted, cut, and what is left
is rendered once; a second render happens only when the estimate was too low.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from server.policy.context import (
    Fit,
    LastTurnTooLong,
    TruncationPolicy,
    Window,
    default_reserve_tokens,
    drop_one_more,
    fits_by_bytes,
    fits_whole,
    keep_newest,
    plan_fit,
    printed_tokens,
)
from server.policy.edits import Edits
from server.policy.refusals import ContextLengthExceeded, NotDegraded
from server.policy.turns import Layout, lay_out, view
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

    messages: list[dict[str, Any]]
    tokens: Sequence[int]  # what each message costs
    fit: Fit
    window: Window
    prompt_tokens: int


class HistoryFitter:
    """Seam 1: from a conversation to the tokens of what is kept of it."""

    def __init__(self, policy: ContextPolicy, overrides: Mapping[str, ContextPolicy], metrics: Metrics) -> None:
        self._policy = policy
        self._overrides = overrides
        self._metrics = metrics
        self._windows: dict[tuple[int, str | None, float], Window] = {}

    def policy_of(self, model: str | None) -> ContextPolicy:
        """The operator's policy for a served model or adapter."""
        return self._overrides.get(model or "", self._policy)

    async def render(self, conversation: Conversation, request: OpenRequest) -> Rendered:
        """Render what fits. Raises `ContextLengthExceeded` and `OrphanToolResult`."""
        policy = request.truncation or self.policy_of(request.model).truncation
        window = self._window(conversation, request)
        if request.dry_run is not None:
            request.dry_run.report, rendered = await self._fit(conversation, window, policy.retention_ratio)
            return rendered
        if not policy.enabled or conversation.counts_only:
            return await conversation.render(conversation.messages)
        fits = self._surely_fits(conversation, window) or self._known_to_fit(conversation, window)
        if fits and (whole := await _whole(conversation, window)):
            return whole
        report, rendered = await self._fit(conversation, window, policy.retention_ratio)
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
        max_model_len, factor = conversation.max_model_len, request.context_factor
        kind = (max_model_len, request.model if request.model in self._overrides else None, factor)
        if kind not in self._windows:
            self._windows[kind] = Window(max_model_len, self._reserve(max_model_len, request), factor=factor)
        return self._windows[kind]

    def _surely_fits(self, conversation: Conversation, window: Window) -> bool:
        """By byte length alone."""
        messages, overheads = conversation.messages, conversation.overheads
        length = conversation.bytes_within(window.max_model_len)
        if length is None:
            return False
        if conversation.plain is None and _holds_results(messages):
            _laid_out(messages)
        return fits_by_bytes(length + overheads.prompt, len(messages), overheads.largest, window)

    def _known_to_fit(self, conversation: Conversation, window: Window) -> bool:
        """By the counts that are there already."""
        started_s = time.perf_counter()
        tokens = conversation.known_tokens() if _may_fit(conversation, window) else None
        if tokens is None or not fits_whole(tokens, window):
            return False
        self._metrics.fitted(time.perf_counter() - started_s, len(conversation.messages), 0)
        return True

    async def _fit(self, conversation: Conversation, window: Window, ratio: float) -> tuple[FitReport, Rendered]:
        started_s = time.perf_counter()
        costs = await conversation.costs()
        window = replace(window, fixed_tokens=costs.fixed)
        messages = conversation.messages
        fit, tokens = await _planned(messages, costs, window, ratio)
        duration_s = time.perf_counter() - started_s
        self._metrics.fitted(duration_s, costs.counted - costs.newly_counted, costs.newly_counted)
        while True:
            try:
                rendered = await conversation.render([messages[i] for i in fit.kept])
                prompt_tokens = conversation.prompt_tokens(rendered)
            except ContextLengthExceeded:
                prompt_tokens = max(fit.kept_tokens, window.max_model_len)
            else:
                if prompt_tokens <= window.max_prompt_tokens:
                    return FitReport(messages, tokens, fit, window, prompt_tokens), rendered
            fit = _smaller(fit, _laid_out(messages), tokens, window, prompt_tokens)


def _may_fit(conversation: Conversation, window: Window) -> bool:
    """Whether there is room for what is printed around so many messages, so that looking further is worth it."""
    return len(conversation.messages) * min(conversation.overheads.by_role.values(), default=0) < window.max_model_len


async def _whole(conversation: Conversation, window: Window) -> Rendered | None:
    """The history as it is, or None where it is too long after all: a template may print its tools more than once."""
    with suppress(ContextLengthExceeded):
        rendered = await conversation.render(conversation.messages)
        if conversation.prompt_tokens(rendered) <= window.max_prompt_tokens:
            return rendered
    return None


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


def _smaller(fit: Fit, layout: Layout, tokens: Sequence[int], window: Window, rendered_tokens: int) -> Fit:
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
    messages: list[dict[str, Any]], costs: Costs, window: Window, retention_ratio: float
) -> tuple[Fit, Sequence[int]]:
    """The fit, and what each message costs. Raises `OrphanToolResult`."""

    def plan() -> tuple[Fit, Sequence[int]]:
        layout = _laid_out(messages)
        fit = plan_fit(layout, costs.messages, window, retention_ratio, costs.settled)
        return fit, printed_tokens(layout, costs.messages, costs.settled)

    never_cost_more = costs.settled is costs.messages
    if never_cost_more and fits_whole(sum(costs.messages), window) and not _holds_results(messages):
        return Fit.whole(costs.messages, window), costs.messages
    return plan() if len(messages) < _PLANNED_ON_LOOP_MESSAGES else await asyncio.to_thread(plan)


def _laid_out(messages: list[dict[str, Any]]) -> Layout:
    return lay_out([view(message) for message in messages])


def _holds_results(messages: list[dict[str, Any]]) -> bool:
    """Whether the history has to be laid out in any case, to find results without their call."""
    return "tool" in [message.get("role") for message in messages]


def described(report: FitReport) -> dict[str, Any]:
    """A report as `/v1/context/fit` answers it. Turn -1 is the leading system messages."""
    fit, window = report.fit, report.window
    kept = set(fit.kept)
    turns: dict[int, list[int]] = {}
    for i, turn in enumerate(_laid_out(report.messages).turn_of):
        turns.setdefault(turn, []).append(i)
    return {
        "object": "context.fit",
        "max_model_len": window.max_model_len,
        "reserve_tokens": window.reserve_tokens,
        "prompt_tokens": report.prompt_tokens,
        "fixed_tokens": window.fixed_tokens,
        "truncated": fit.truncated,
        "kept_messages": list(fit.kept),
        "dropped_messages": list(fit.dropped),
        "dropped_tokens": fit.dropped_tokens,
        "turns": [
            {
                "turn": turn,
                "messages": members,
                "tokens": sum(report.tokens[i] for i in members),
                "kept": all(i in kept for i in members),
            }
            for turn, members in sorted(turns.items())
        ],
    }
