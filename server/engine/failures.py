"""Maps vLLM's errors to refusals: its error responses, its error frames and its exceptions."""

import json
import re
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any, Final

from pydantic import ValidationError
from vllm.entrypoints.serve import create_error_response
from vllm.entrypoints.serve.exception_handling.utils import sanitize_message
from vllm.exceptions import VLLMValidationError
from vllm.v1.engine.exceptions import EngineDeadError

from server.engine.calls import Frame
from server.policy.refusals import (
    ContextLengthExceeded,
    GenerationFailed,
    InvalidRequest,
    ModelNotFound,
    NotFound,
    Overloaded,
    Refusal,
    UnprocessableContent,
    Unsupported,
)

_CONTEXT_LENGTH_PHRASES: Final = ("maximum context length", "maximum model length")
_OPENAI_ERROR_FRAME: Final = 'data: {"error"'
_ANTHROPIC_ERROR_FRAME: Final = "event: error\n"
_MAX_REPORTED_ERRORS: Final = 3
# vLLM repeats the field and its value at the end of a sentence; the error has a field for the first.
_ECHO: Final = re.compile(r" \(parameter=[^)]*\)$")
# "n must be at least 1, got -1.": the field at fault opens the sentence.
_NAMED_FIELD: Final = re.compile(r"`?([a-z][a-z_]*)`? (?:must|cannot|should)\b")

_CLASS_BY_STATUS: Final[Mapping[int, type[Refusal]]] = {
    HTTPStatus.BAD_REQUEST: InvalidRequest,
    HTTPStatus.NOT_FOUND: NotFound,
    HTTPStatus.UNPROCESSABLE_ENTITY: UnprocessableContent,
    HTTPStatus.NOT_IMPLEMENTED: Unsupported,
    HTTPStatus.SERVICE_UNAVAILABLE: Overloaded,
}


def from_error_body(body: Mapping[str, Any], status: int) -> Refusal:
    """The refusal in vLLM's error body (OpenAI's or Anthropic's shape)."""
    error = body.get("error", body)
    message, param = _ECHO.sub("", str(error.get("message", ""))), error.get("param")
    if param is None and (named := _NAMED_FIELD.match(message)) is not None:
        param = named[1]
    if status == HTTPStatus.BAD_REQUEST and any(phrase in message for phrase in _CONTEXT_LENGTH_PHRASES):
        return ContextLengthExceeded(message, param=param)
    if status == HTTPStatus.NOT_FOUND and message.startswith("The model"):
        return ModelNotFound(message, param="model")
    return _CLASS_BY_STATUS.get(status, GenerationFailed)(message, param=param)


def from_frame(frame: Frame) -> Refusal | None:
    """The refusal in a streamed frame, if it is an error frame. vLLM writes error frames as text."""
    if not isinstance(frame, str):
        return None
    if frame.startswith(_OPENAI_ERROR_FRAME):
        error = json.loads(frame.removeprefix("data: "))["error"]
        return from_error_body({"error": error}, int(error["code"]))
    if frame.startswith(_ANTHROPIC_ERROR_FRAME):
        error = json.loads(frame.removeprefix(_ANTHROPIC_ERROR_FRAME).removeprefix("data: "))
        return from_error_body(error, HTTPStatus.INTERNAL_SERVER_ERROR)
    return None


def from_exception(error: Exception) -> Refusal:
    """The refusal for whatever a vLLM handler raised; a refusal of our own passes unchanged."""
    if isinstance(error, Refusal):
        return error
    if isinstance(error, EngineDeadError):
        return GenerationFailed("The model stopped while it worked on this request. Please send it again.")
    response = create_error_response(error).error
    return from_error_body({"message": response.message, "param": response.param}, response.code)


def from_validation(error: ValidationError) -> InvalidRequest:
    """One sentence for a body that does not validate, naming the field at fault."""
    problems = error.errors(include_url=False, include_input=False)
    reported = [f"{_field(problem['loc'])}: {_reason(problem)}" for problem in problems[:_MAX_REPORTED_ERRORS]]
    more = f" (and {len(problems) - _MAX_REPORTED_ERRORS} more)" if len(problems) > _MAX_REPORTED_ERRORS else ""
    message = sanitize_message(f"Invalid request. {'; '.join(dict.fromkeys(reported))}{more}")
    return InvalidRequest(message, param=_param(problems[0]))


def _param(problem: Mapping[str, Any]) -> str | None:
    cause = problem.get("ctx", {}).get("error")
    if isinstance(cause, VLLMValidationError) and cause.parameter:
        return cause.parameter
    return _field(problem["loc"]) or None


def _reason(problem: Mapping[str, Any]) -> str:
    cause = problem.get("ctx", {}).get("error")
    return str(cause.args[0]) if isinstance(cause, VLLMValidationError) else str(problem["msg"])


def _field(loc: tuple[int | str, ...]) -> str:
    """`("messages", 0, "ChatCompletionUserMessageParam", "content")` → `messages[0].content`.

    pydantic puts the union branches it tried into the path; they are names of types, not of fields.
    """
    path = ""
    for part in loc:
        if isinstance(part, int):
            path += f"[{part}]"
        elif part.isidentifier() and part[:1].islower() and part not in {"str", "int", "float", "bool", "dict"}:
            path += f".{part}" if path else part
    return path
