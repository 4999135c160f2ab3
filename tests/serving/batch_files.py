"""Batch files for tests."""

import json
from collections.abc import Iterable, Mapping
from typing import Any, Final

CHAT: Final = "/v1/chat/completions"


def line(custom_id: str, text: str = "Hello", **body: Any) -> dict[str, Any]:
    """A good line for a chat."""
    asked = {"model": "a-model", "messages": [{"role": "user", "content": text}], **body}
    return {"custom_id": custom_id, "method": "POST", "url": CHAT, "body": asked}


def jsonl(lines: Iterable[Mapping[str, Any]]) -> bytes:
    return b"".join(json.dumps(item).encode() + b"\n" for item in lines)


def records(content: bytes) -> list[dict[str, Any]]:
    """The lines of an output or error file."""
    return [json.loads(item) for item in content.splitlines()]
