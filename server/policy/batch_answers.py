"""The lines of a batch's output and error files, as OpenAI writes them, and what they say they used."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from server.policy.batches import BatchError, Usage

Unrun = Literal["batch_expired", "batch_cancelled"]

_UNRUN: Final[Mapping[Unrun, str]] = {
    "batch_expired": "This request could not be executed before the completion window expired.",
    "batch_cancelled": "This request was not executed, because the batch was cancelled.",
}


@dataclass(frozen=True, slots=True)
class Named:
    """Which line an answer belongs to, and the id that its log lines carry."""

    custom_id: str
    request_id: str

    @property
    def answer_id(self) -> str:
        return f"batch_req_{self.request_id.removeprefix('batch_')}"


def answered(line: Named, body: Mapping[str, Any], latency_s: float) -> bytes:
    """An answer. `latency_s` is how long the engine took, without the wait for it."""
    response = {
        "status_code": 200,
        "request_id": line.request_id,
        "latency_ms": round(latency_s * 1000, 1),
        "body": body,
    }
    return _encoded({"id": line.answer_id, "custom_id": line.custom_id, "response": response, "error": None})


def refused(line: Named, status: int, body: Mapping[str, Any]) -> bytes:
    """A request that was answered with an error status."""
    response = {"status_code": status, "request_id": line.request_id, "body": body}
    return _encoded({"id": line.answer_id, "custom_id": line.custom_id, "response": response, "error": None})


def not_run(line: Named, why: Unrun) -> bytes:
    """A request that the batch ended without."""
    error = {"code": why, "message": _UNRUN[why]}
    return _encoded({"id": line.answer_id, "custom_id": line.custom_id, "response": None, "error": error})


def bad_line(batch_id: str, error: BatchError) -> bytes:
    """A line that kept the batch from running."""
    said = {"code": error.code, "message": error.message, "param": error.param, "line": error.line}
    name = f"batch_req_{batch_id.removeprefix('batch_')}-{error.line or 0}"
    return _encoded({"id": name, "custom_id": None, "response": None, "error": said})


def usage_in(record: Mapping[str, Any]) -> Usage:
    """What an answer says it used, by the names of chat completions or of responses; nothing where it does not say."""
    body = (record.get("response") or {}).get("body")
    usage = body.get("usage") if isinstance(body, dict) else None
    if not isinstance(usage, dict):
        return Usage()
    return Usage(
        input_tokens=_count(usage, "prompt_tokens", "input_tokens"),
        cached_tokens=_detail(usage, ("prompt_tokens_details", "input_tokens_details"), "cached_tokens"),
        output_tokens=_count(usage, "completion_tokens", "output_tokens"),
        reasoning_tokens=_detail(usage, ("completion_tokens_details", "output_tokens_details"), "reasoning_tokens"),
    )


def _count(counts: Mapping[str, Any], *names: str) -> int:
    return next((value for name in names if isinstance(value := counts.get(name), int)), 0)


def _detail(usage: Mapping[str, Any], places: tuple[str, ...], name: str) -> int:
    return sum(_count(details, name) for place in places if isinstance(details := usage.get(place), dict))


def _encoded(record: Mapping[str, Any]) -> bytes:
    """One line; half a surrogate pair out of a client's JSON has no UTF-8 and stays the escape it came as."""
    text = json.dumps(record, ensure_ascii=False, separators=(",", ":"))
    return text.encode("utf-8", "backslashreplace") + b"\n"
