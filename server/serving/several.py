"""Several prompts in one call: one that cannot be answered does not spoil the others.

vLLM refuses a call as a whole when it refuses one of its prompts. Nothing has run by then, so each prompt is sent by
itself, and the answers are put together as vLLM would have. A refused prompt has its error where its answer would be.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

from server.engine.calls import Call, Reply, StreamReply
from server.policy.refusals import InvalidRequest, Refusal
from server.serving.requests import OpenRequest

Operation = Callable[[Call], Awaitable[Reply | StreamReply]]
# A refusal as its HTTP status and body.
Described = Callable[[Refusal], tuple[int, dict[str, Any]]]

_COMPLETIONS: Final = "/v1/completions"
_CHATS: Final = "/v1/chat/completions/batch"
# Where a call keeps its prompts, and what stands in the choice of one that was refused.
_PROMPTS: Final[Mapping[str, str]] = {_COMPLETIONS: "prompt", _CHATS: "messages"}
_NO_ANSWER: Final[Mapping[str, Mapping[str, Any]]] = {
    _COMPLETIONS: {"text": "", "logprobs": None},
    _CHATS: {"message": {"role": "assistant", "content": None}, "logprobs": None},
}
_MOST_PROMPTS: Final = 4096


class OneByOne:
    """Runs the prompts of a refused call one by one."""

    def __init__(self, described: Described) -> None:
        self._described = described

    async def answer(self, operation: Operation, call: Call, refusal: InvalidRequest, request: OpenRequest) -> Reply:
        """The answers together. Raises `refusal` where there is nothing to part, or no prompt that can be answered."""
        parts = _parts(call)
        if parts is None:
            raise refusal
        outcomes = await _all(operation, parts, request)
        if all(isinstance(outcome, InvalidRequest) for outcome in outcomes):
            raise refusal
        request.refusal = None
        return Reply(json.dumps(self._merged(call, outcomes)).encode(), "application/json")

    def _merged(self, call: Call, outcomes: Sequence[dict[str, Any] | InvalidRequest]) -> dict[str, Any]:
        n = (call.body or {}).get("n")
        width = n if isinstance(n, int) and n > 0 else 1
        answers = [outcome for outcome in outcomes if isinstance(outcome, dict)]
        choices: list[dict[str, Any]] = []
        for position, outcome in enumerate(outcomes):
            first = position * width
            if isinstance(outcome, dict):
                choices += ({**choice, "index": first + choice["index"]} for choice in outcome["choices"])
            else:
                error = self._described(outcome)[1]["error"]
                choices += (self._refused(call.route, first + i, error) for i in range(width))
        usage = _summed([answer["usage"] for answer in answers if isinstance(answer.get("usage"), dict)])
        return {**answers[0], "choices": choices, "usage": usage}

    def _refused(self, route: str, index: int, error: dict[str, Any]) -> dict[str, Any]:
        return {"index": index, **_NO_ANSWER[route], "finish_reason": "error", "error": error}


def _parts(call: Call) -> list[Call] | None:
    """A call for each prompt, or None for a call that has one prompt only, or that is streamed."""
    field, body = _PROMPTS.get(call.route), call.body or {}
    if field is None or body.get("stream"):
        return None
    prompts = body.get(field)
    if not isinstance(prompts, list) or not 1 < len(prompts) <= _MOST_PROMPTS or isinstance(prompts[0], int):
        return None
    return [replace(call, body={**body, field: [prompt]}) for prompt in prompts]


async def _all(
    operation: Operation, parts: Sequence[Call], request: OpenRequest
) -> list[dict[str, Any] | InvalidRequest]:
    """What became of each part. Raises any other refusal: it is not about one prompt, and the client may try again."""

    async def one(part: Call) -> dict[str, Any] | InvalidRequest:
        try:
            reply = await operation(part)
        except InvalidRequest as refusal:
            return refusal
        assert isinstance(reply, Reply)
        answer: dict[str, Any] = json.loads(reply.body)
        return answer

    refusal: Refusal | None = None
    tasks: list[asyncio.Task[dict[str, Any] | InvalidRequest]] = []
    try:
        async with asyncio.TaskGroup() as group:
            tasks += (group.create_task(one(part)) for part in parts)
    except* Refusal as refused:
        refusal = _first(refused)
    if refusal is not None:
        request.refusal = refusal
        raise refusal
    return [task.result() for task in tasks]


def _first(group: BaseExceptionGroup[Refusal]) -> Refusal:
    error = group.exceptions[0]
    return _first(error) if isinstance(error, BaseExceptionGroup) else error


def _summed(usages: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Usage objects added up, number by number; what they hold nothing of stays nothing."""
    total: dict[str, Any] = {}
    for usage in usages:
        for name, value in usage.items():
            if isinstance(value, dict):
                total[name] = _summed([total.get(name) or {}, value])
            elif isinstance(value, int) and not isinstance(value, bool):
                total[name] = (total.get(name) or 0) + value
            else:
                total.setdefault(name, value)
    return total
