"""Tells the client what was changed in its request: in the body, and in the last frame of a stream."""

import json
from collections.abc import Mapping
from typing import Any, Final

from server.engine.calls import Frame
from server.policy.edits import Edits

_DATA: Final = "data: "
_FINISHED: Final = '"finish_reason":"'
_USAGE_ONLY: Final = '"choices":[]'
_RESPONSE_ENDS: Final = ("event: response.completed\n", "event: response.incomplete\n")
_MESSAGE_DELTA: Final = "event: message_delta\n"


def told_body(body: bytes, edits: Edits) -> bytes:
    """A whole answer with `context_management.applied_edits`; anything but a JSON object passes unchanged."""
    answer = json.loads(body)
    if not isinstance(answer, dict):
        return body
    return _encoded(_told(answer, edits)).encode()


def told_frame(frame: Frame, edits: Edits) -> Frame:
    """A frame as it is, or with the edits in it if it is one that ends the answer."""
    if not isinstance(frame, str):
        return frame
    head, data = frame[: (start := frame.find(_DATA))], frame[start + len(_DATA) :]
    if head.startswith(_RESPONSE_ENDS):
        event = json.loads(data)
        return f"{head}{_DATA}{_encoded({**event, 'response': _told(event['response'], edits)})}\n\n"
    if head.startswith(_MESSAGE_DELTA) or (not head and (_FINISHED in data or _USAGE_ONLY in data)):
        return f"{head}{_DATA}{_encoded(_told(json.loads(data), edits))}\n\n"
    return frame


def _told(answer: Mapping[str, Any], edits: Edits) -> dict[str, Any]:
    management = answer.get("context_management") or {}
    return {**answer, "context_management": {**management, "applied_edits": edits.applied()}}


def _encoded(value: Mapping[str, Any]) -> str:
    return json.dumps(value, separators=(",", ":"))
