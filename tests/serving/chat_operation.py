"""A chat operation that answers like vLLM's, through seam 2, as the test says."""

import asyncio
import json
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Any

from server.engine.calls import Call, Reply
from server.policy.refusals import Refusal
from server.serving.generation import Generation
from server.serving.requests import current_request
from tests.serving.fake_stack import demand, new_gate, new_generation


@dataclass(slots=True)
class ChatOperation:
    """Answers with the words it was asked, in capitals.

    `refusals` are raised first, one for each call; `failing` maps what was asked to a refusal for good. While `gate` is
    clear nobody is answered; while the operation is `shut` nobody comes as far as the engine. `classes` are the traffic
    classes that the calls came with.
    """

    generation: Generation = field(default_factory=lambda: new_generation(new_gate(max_running=32)))
    refusals: list[Refusal] = field(default_factory=list)
    failing: dict[str, Refusal] = field(default_factory=dict)
    gate: asyncio.Event = field(default_factory=asyncio.Event)
    asked: list[str] = field(default_factory=list)
    classes: set[str] = field(default_factory=set)
    headers: dict[bytes, bytes] = field(default_factory=dict)
    in_engine: int = 0
    most_in_engine: int = 0
    delay_s: float = 0.0
    shut: bool = False

    def __post_init__(self) -> None:
        self.gate.set()

    async def __call__(self, call: Call) -> Reply:
        assert call.body is not None
        text = str(call.body["messages"][-1]["content"])
        self.asked.append(text)
        self.headers = {name: value for name, value in call.headers if name in (b"x-degradation", b"x-request-timeout")}
        request = current_request()
        assert request is not None
        self.classes.add(request.tenant.traffic_class)
        if self.shut:
            await asyncio.Event().wait()
        if self.refusals:
            raise self.refusals.pop(0)
        if text in self.failing:
            raise self.failing[text]
        async for _ in self.generation.generate(demand(), self._engine):
            pass
        return Reply(json.dumps(_answer(text)).encode(), "application/json")

    async def _engine(self) -> AsyncGenerator[str, None]:
        self.in_engine += 1
        self.most_in_engine = max(self.most_in_engine, self.in_engine)
        try:
            await asyncio.sleep(self.delay_s)
            await self.gate.wait()
            yield "done"
        finally:
            self.in_engine -= 1


def _answer(text: str) -> dict[str, Any]:
    return {
        "object": "chat.completion",
        "model": "a-model",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": text.upper()}, "finish_reason": "stop"}],
        "usage": {
            "prompt_tokens": 7,
            "completion_tokens": 3,
            "total_tokens": 10,
            "prompt_tokens_details": {"cached_tokens": 2},
        },
    }
