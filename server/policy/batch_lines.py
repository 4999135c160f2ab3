"""One line of a batch file: what it must say, and by which lines it is best followed."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from server.policy.batches import BatchError

Body = dict[str, Any]

# Where a body keeps what its prompt begins with, in the order in which a chat template prints it.
_PROMPT_FIELDS: Final = ("instructions", "messages", "prompt", "input")
_ORDER_CHARACTERS: Final = 512
_TOOLS_CHARACTERS: Final = 64
_LONGEST_CUSTOM_ID: Final = 512
_BOM: Final = b"\xef\xbb\xbf"
# Answers are kept whole, in one line each.
_STREAMED_FIELDS: Final = ("stream", "background")


@dataclass(frozen=True, slots=True)
class Line:
    """A good line. Lines whose `order` is alike begin alike, and find each other's prompts in the prefix cache."""

    custom_id: str
    model: str | None
    order: str


@dataclass(frozen=True, slots=True)
class Expected:
    """What every line of a batch has in common."""

    endpoint: str
    model: str | None = None


def read_line(raw: bytes, number: int, endpoint: str) -> Line | BatchError:
    """The line, or what is wrong with it, in OpenAI's words where they are known."""
    request = parsed(raw, number)
    if isinstance(request, BatchError):
        return request
    custom_id, body = request.get("custom_id"), request.get("body")
    if (problem := _problem(request, endpoint)) is not None:
        code, message, param = problem
        return BatchError(code, message, number, param)
    assert isinstance(custom_id, str)
    assert isinstance(body, dict)
    model = body.get("model")
    return Line(custom_id, model if isinstance(model, str) else None, order_of(body))


def parsed(raw: bytes, number: int) -> dict[str, Any] | BatchError:
    """The JSON object on a line."""
    try:
        value = json.loads(raw.removeprefix(_BOM))
    except UnicodeDecodeError as error:
        return BatchError("invalid_json_line", f"This line is not valid UTF-8 (byte {error.start}).", number)
    except json.JSONDecodeError as error:
        message = f"This line is not parseable as valid JSON: {error.msg} at character {error.pos}."
        return BatchError("invalid_json_line", message, number)
    except (ValueError, RecursionError):  # more digits than Python reads, or nested too deeply
        return BatchError("invalid_json_line", "This line is not parseable as valid JSON.", number)
    if not isinstance(value, dict):
        return BatchError("invalid_json_line", "This line is not a JSON object.", number)
    return value


def _problem(request: Mapping[str, Any], endpoint: str) -> tuple[str, str, str] | None:
    """Code, message and field of the first thing that is wrong."""
    for name, kind in (("custom_id", str), ("method", str), ("url", str), ("body", dict)):
        if name not in request:
            return "missing_required_parameter", f"Missing required parameter: '{name}'.", name
        if not isinstance(request[name], kind):
            wanted = "an object" if kind is dict else "a string"
            return "invalid_type", f"Invalid type for '{name}': expected {wanted}.", name
    if not 0 < len(request["custom_id"]) <= _LONGEST_CUSTOM_ID:
        return "invalid_value", f"'custom_id' must have 1 to {_LONGEST_CUSTOM_ID} characters.", "custom_id"
    if request["method"] != "POST":
        return "invalid_method", "The method of every request must be POST.", "method"
    if request["url"] != endpoint:
        return "invalid_url", f"The URL of this request is not the endpoint of the batch ({endpoint}).", "url"
    for name in _STREAMED_FIELDS:
        if request["body"].get(name):
            return "unsupported_parameter", f"A request in a batch cannot set '{name}'.", f"body.{name}"
    return None


def duplicate(number: int) -> BatchError:
    """A `custom_id` that a line before has."""
    message = (
        "The custom_id for this request is a duplicate of another request. The custom_id parameter must be unique for "
        "each request in a batch."
    )
    return BatchError("duplicate_custom_id", message, number, "custom_id")


def other_model(number: int, model: str | None, expected: str | None) -> BatchError:
    """A line for another model than the lines before it."""
    message = f"This request is for the model {_named(model)}, and the ones before it for {_named(expected)}. "
    return BatchError("mismatched_model", message + "A batch is for one model.", number, "body.model")


def _named(model: str | None) -> str:
    return "that is served by default" if model is None else f"'{model}'"


def order_of(body: Mapping[str, Any]) -> str:
    """The beginning of the prompt, as far as it can be told without rendering it."""
    text = leading_text(body.get("tools"), _TOOLS_CHARACTERS)
    for name in _PROMPT_FIELDS:
        if len(text) >= _ORDER_CHARACTERS:
            break
        text += leading_text(body.get(name), _ORDER_CHARACTERS - len(text))
    return text


def leading_text(value: Any, room: int) -> str:
    """The first `room` characters of the text in a JSON value, in its own order."""
    if isinstance(value, str):
        return value[:room]
    if not isinstance(value, (list, dict)):
        return ""
    parts: list[str] = []
    for item in value.values() if isinstance(value, dict) else value:
        if room <= 0:
            break
        parts.append(leading_text(item, room))
        room -= len(parts[-1])
    return "".join(parts)
