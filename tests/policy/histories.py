"""Short histories with a cost for each message, and their fits."""

from typing import Any

from server.policy.context import Fit, Window, drop_one_more, plan_fit
from server.policy.turns import Layout, lay_out, view

Message = dict[str, Any]
Counted = tuple[Message, int]

# With no head and nothing fixed the budget B is 100 tokens, a cut leaves at most 80, and the engine takes up to 119.
WINDOW = Window(max_model_len=120, reserve_tokens=20)


def system(tokens: int = 10) -> Counted:
    return {"role": "system", "content": "Be kind."}, tokens


def user(tokens: int = 10) -> Counted:
    return {"role": "user", "content": "And then?"}, tokens


def assistant(tokens: int = 10) -> Counted:
    return {"role": "assistant", "content": "Well."}, tokens


def calls(*ids: str | None, tokens: int = 10) -> Counted:
    tool_calls = [{"id": call_id, "type": "function", "function": {"name": "look"}} for call_id in ids]
    return {"role": "assistant", "content": None, "tool_calls": tool_calls}, tokens


def result(call_id: str | None, tokens: int = 10) -> Counted:
    message = {"role": "tool", "content": "42"}
    return (message if call_id is None else {**message, "tool_call_id": call_id}), tokens


def other(role: str, tokens: int = 10) -> Counted:
    return {"role": role, "content": "?"}, tokens


def layout_of(history: list[Counted]) -> Layout:
    return lay_out([view(message) for message, _ in history])


def fit(history: list[Counted], window: Window = WINDOW, retention_ratio: float = 0.8) -> Fit:
    return plan_fit(layout_of(history), [tokens for _, tokens in history], window, retention_ratio)


def one_more(history: list[Counted], planned: Fit, window: Window = WINDOW) -> Fit:
    return drop_one_more(planned, layout_of(history), [tokens for _, tokens in history], window, rendered_tokens=130)
