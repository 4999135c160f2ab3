"""An operator's canned reply in the shape of a chat completion."""

import json
import time
from collections.abc import Iterator, Mapping
from typing import Any, Final

from server.engine.calls import Frame, Reply, StreamReply
from server.policy.refusals import Refusal
from server.serving.requests import OpenRequest

_CHAT: Final = "/v1/chat/completions"
_USAGE: Final = {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}


def canned_reply(route: str, body: Mapping[str, Any], text: str, request: OpenRequest) -> Reply | StreamReply | None:
    """`text` as a chat answer, streamed where the request asks for that; None for routes other than chat."""
    if route != _CHAT:
        return None
    common = {"id": f"chatcmpl-{request.request_id}", "created": int(time.time()), "model": str(body.get("model", ""))}
    if body.get("stream") is not True:
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
        answer = {**common, "object": "chat.completion", "choices": [choice], "usage": _USAGE}
        return Reply(json.dumps(answer).encode(), "application/json")
    request.producing = True
    head = {**common, "object": "chat.completion.chunk"}
    deltas: list[tuple[dict[str, str], str | None]] = [({"role": "assistant", "content": text}, None), ({}, "stop")]
    choices = [{"index": 0, "delta": delta, "finish_reason": reason} for delta, reason in deltas]
    frames = [f"data: {json.dumps({**head, 'choices': [choice]})}\n\n" for choice in choices]
    return StreamReply(_ReadyFrames(iter([*frames, "data: [DONE]\n\n"])), "text/event-stream", _never_refuses)


class _ReadyFrames:
    """Frames that are there already."""

    def __init__(self, frames: Iterator[Frame]) -> None:
        self._frames = frames

    def __aiter__(self) -> "_ReadyFrames":
        return self

    async def __anext__(self) -> Frame:
        frame = next(self._frames, None)
        if frame is None:
            raise StopAsyncIteration
        return frame

    async def aclose(self) -> None:
        """Nothing is held."""


def _never_refuses(frame: Frame) -> Refusal | None:
    del frame
    return None
