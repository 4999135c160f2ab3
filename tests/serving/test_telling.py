import json

import pytest

from server.policy.edits import Edits
from server.serving.telling import told_body, told_frame

_EDITS = Edits(2, 30)
_TOLD = {"applied_edits": [{"type": "drop_turns", "dropped_messages": 2, "dropped_tokens": 30}]}


def _data(frame: str | bytes) -> dict[str, object]:
    assert isinstance(frame, str)
    assert frame.endswith("\n\n")
    return dict(json.loads(frame[frame.index("data: ") + 6 :]))


def test_a_whole_answer_gets_the_edits() -> None:
    assert json.loads(told_body(b'{"id": "1"}', _EDITS)) == {"id": "1", "context_management": _TOLD}


def test_anthropics_own_context_management_is_kept() -> None:
    told = json.loads(told_body(b'{"context_management": {"original_input_tokens": 9}}', _EDITS))
    assert told["context_management"] == {"original_input_tokens": 9, **_TOLD}


def test_a_body_that_is_no_object_passes_unchanged() -> None:
    assert told_body(b"[1]", _EDITS) == b"[1]"


@pytest.mark.parametrize(
    "frame",
    [
        'data: {"choices":[{"delta":{},"finish_reason":"stop"}]}\n\n',
        'data: {"choices":[],"usage":{"prompt_tokens":1}}\n\n',
        'event: message_delta\ndata: {"type":"message_delta","delta":{"stop_reason":"end_turn"}}\n\n',
    ],
)
def test_the_frame_that_ends_an_answer_gets_the_edits(frame: str) -> None:
    assert _data(told_frame(frame, _EDITS)) == {**_data(frame), "context_management": _TOLD}


def test_the_event_that_ends_a_response_gets_the_edits_inside_the_response() -> None:
    told = told_frame('event: response.completed\ndata: {"response":{"id":"r"},"sequence_number":9}\n\n', _EDITS)
    assert isinstance(told, str)
    assert told.startswith("event: response.completed\n")
    assert _data(told) == {"response": {"id": "r", "context_management": _TOLD}, "sequence_number": 9}


@pytest.mark.parametrize(
    "frame",
    [
        'data: {"choices":[{"delta":{"content":"a"},"finish_reason":null}]}\n\n',
        'data: {"choices":[{"delta":{"content":"\\"finish_reason\\":\\"stop"},"finish_reason":null}]}\n\n',
        "data: [DONE]\n\n",
        'event: response.created\ndata: {"response":{}}\n\n',
        b"binary",
    ],
)
def test_every_other_frame_passes_unchanged(frame: str | bytes) -> None:
    assert told_frame(frame, _EDITS) == frame
