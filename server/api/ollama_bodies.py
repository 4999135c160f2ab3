"""Ollama's request bodies in OpenAI's words. What cannot be honoured is refused, or named in a header of the answer."""

import base64
import binascii
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StrictBool, ValidationError

from server.policy.refusals import InvalidRequest
from server.serving.service import CHAT_ROUTE

COMPLETIONS_ROUTE: Final = "/v1/completions"
EMBEDDINGS_ROUTE: Final = "/v1/embeddings"

Shape = Literal["chat", "generate", "raw", "embed", "embedding"]

# Ollama's option → the field that vLLM has for it. The options that are not here steer how Ollama loads a model
# (num_ctx, num_gpu, ...) or samplers that only llama.cpp has; the answer's head names them.
_OPTIONS: Final[Mapping[str, str]] = {
    "num_predict": "max_tokens",
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "seed": "seed",
    "stop": "stop",
    "repeat_penalty": "repetition_penalty",
    "presence_penalty": "presence_penalty",
    "frequency_penalty": "frequency_penalty",
}
# A raw prompt may run on and on, and OpenAI's own default for completions is 16 tokens.
_RAW_MAX_TOKENS: Final = 2048
# The first bytes of image files, and their types; vLLM looks into the file itself, so any of them would do.
_IMAGE_TYPES: Final[Mapping[bytes, str]] = {b"\x89PNG": "png", b"GIF8": "gif", b"RIFF": "webp"}
_MAGIC_CHARS: Final = 8  # of base64, which hold the first six bytes


@dataclass(frozen=True, slots=True)
class Asked:
    """One call in OpenAI's words. `shape` is how its answer is said, `model` the name that the answer repeats.

    `loads`: it has nothing to answer, and asks only for the model to be there (or, with `unloads`, to be gone).
    `ignored` are the options that nothing here has a use for.
    """

    shape: Shape
    route: str
    body: dict[str, Any]
    model: str
    streams: bool
    loads: bool = False
    unloads: bool = False
    ignored: tuple[str, ...] = ()


class _Body(BaseModel):
    """Fields that Ollama has and that change nothing here (`keep_alive` but for 0) are let through."""

    model_config = ConfigDict(extra="ignore")

    model: str = Field(min_length=1)
    options: dict[str, Any] | None = None
    keep_alive: Any = None


class _Function(BaseModel):
    name: str
    arguments: dict[str, Any] = {}


class _ToolCall(BaseModel):
    function: _Function
    id: str | None = None


class _Message(BaseModel):
    model_config = ConfigDict(extra="ignore")

    role: str
    content: str | None = None
    thinking: str | None = None
    images: list[str] | None = None
    tool_calls: list[_ToolCall] | None = None
    tool_name: str | None = None
    name: str | None = None
    tool_call_id: str | None = None


class _Generating(_Body):
    stream: StrictBool | None = None
    format: Literal["", "json"] | dict[str, Any] | None = None
    think: StrictBool | Literal["low", "medium", "high", "max"] | None = None
    logprobs: StrictBool | None = None
    top_logprobs: int | None = None
    truncate: StrictBool | None = None


class ChatBody(_Generating):
    """`POST /api/chat`."""

    messages: list[_Message] | None = None
    tools: list[dict[str, Any]] | None = None


class GenerateBody(_Generating):
    """`POST /api/generate`."""

    prompt: str | None = None
    suffix: str | None = None
    system: str | None = None
    template: str | None = None
    context: list[int] | None = None
    raw: StrictBool | None = None
    images: list[str] | None = None


class EmbedBody(_Body):
    """`POST /api/embed`."""

    input: str | list[str]
    truncate: StrictBool | None = None
    dimensions: int | None = None


class EmbeddingsBody(_Body):
    """`POST /api/embeddings`, which Ollama had first."""

    prompt: str = ""


class ShowBody(BaseModel):
    """`POST /api/show`. Older clients say `name`."""

    model: str | None = None
    name: str | None = None


BodyT = TypeVar("BodyT", bound=BaseModel)


def parsed(body: dict[str, Any], kind: type[BodyT]) -> BodyT:
    """The body as one of the classes above. Raises `InvalidRequest`, which names the field at fault."""
    try:
        return kind.model_validate(body)
    except ValidationError as error:
        problem = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(str(part) for part in problem["loc"])
        raise InvalidRequest(f"{place}: {problem['msg']}.", param=place) from error


def chat_asked(body: dict[str, Any]) -> Asked:
    """A chat. Raises `InvalidRequest`."""
    asked = parsed(body, ChatBody)
    spoken = {"messages": _messages(asked.messages or []), **_common(asked)}
    if asked.tools:
        spoken["tools"] = asked.tools
    return _generating("chat", CHAT_ROUTE, spoken, asked, empty=not asked.messages)


def generate_asked(body: dict[str, Any]) -> Asked:
    """One prompt: as it is with `raw`, else as a chat of one message. Raises `InvalidRequest`."""
    asked = parsed(body, GenerateBody)
    _refuse_unsupported(asked)
    empty = not asked.prompt and not asked.images
    if asked.raw:
        if asked.images:
            raise InvalidRequest("`images` cannot go with `raw`.", param="images")
        if asked.logprobs:
            raise InvalidRequest("`logprobs` cannot go with `raw`.", param="logprobs")
        spoken = {"prompt": asked.prompt or "", "max_tokens": _RAW_MAX_TOKENS, **_common(asked)}
        return _generating("raw", COMPLETIONS_ROUTE, spoken, asked, empty=empty)
    system = [{"role": "system", "content": asked.system}] if asked.system else []
    prompt = {"role": "user", "content": _content(asked.prompt or "", asked.images)}
    spoken = {"messages": [*system, prompt], **_common(asked)}
    return _generating("generate", CHAT_ROUTE, spoken, asked, empty=empty)


def embed_asked(body: dict[str, Any]) -> Asked:
    """Embeddings of one text or several. Raises `InvalidRequest`."""
    asked = parsed(body, EmbedBody)
    spoken: dict[str, Any] = {"model": asked.model, "input": asked.input}
    if asked.dimensions is not None:
        spoken["dimensions"] = asked.dimensions
    if asked.truncate is not False:  # Ollama cuts a long text unless it is told not to
        spoken["truncate_prompt_tokens"] = -1
    return Asked("embed", EMBEDDINGS_ROUTE, spoken, asked.model, streams=False)


def embeddings_asked(body: dict[str, Any]) -> Asked:
    """The embedding of one text. Raises `InvalidRequest`."""
    asked = parsed(body, EmbeddingsBody)
    spoken = {"model": asked.model, "input": asked.prompt, "truncate_prompt_tokens": -1}
    return Asked("embedding", EMBEDDINGS_ROUTE, spoken, asked.model, streams=False)


def _generating(shape: Shape, route: str, spoken: dict[str, Any], asked: _Generating, *, empty: bool) -> Asked:
    streams = asked.stream is not False
    if streams:
        spoken |= {"stream": True, "stream_options": {"include_usage": True}}
    unloads = empty and asked.keep_alive in (0, "0", "0s", "0m")
    ignored = tuple(sorted(name for name in asked.options or () if name not in _OPTIONS))
    return Asked(shape, route, spoken, asked.model, streams, loads=empty, unloads=unloads, ignored=ignored)


def _common(asked: _Generating) -> dict[str, Any]:
    return {
        "model": asked.model,
        **_sampling(asked.options or {}),
        **_format(asked.format),
        **_thinking(asked.think),
        **({"logprobs": True, "top_logprobs": asked.top_logprobs or 0} if asked.logprobs else {}),
        **({"truncation": "disabled"} if asked.truncate is False else {}),
    }


def _sampling(options: Mapping[str, Any]) -> dict[str, Any]:
    known = {_OPTIONS[name]: value for name, value in options.items() if name in _OPTIONS and value is not None}
    if isinstance(cap := known.get("max_tokens"), int) and cap < 0:
        del known["max_tokens"]  # -1: without end, -2: what the window leaves
    if isinstance(seed := known.get("seed"), int) and seed < 0:
        del known["seed"]  # -1: any
    return known


def _format(wanted: str | dict[str, Any] | None) -> dict[str, Any]:
    if isinstance(wanted, dict):
        schema = {"name": "format", "schema": wanted, "strict": True}
        return {"response_format": {"type": "json_schema", "json_schema": schema}}
    return {"response_format": {"type": "json_object"}} if wanted == "json" else {}


def _thinking(think: bool | str | None) -> dict[str, Any]:
    """Templates call the switch by one of two names; the one that a template does not read does nothing."""
    if think is None:
        return {}
    if isinstance(think, str):
        return {"reasoning_effort": think}
    return {"chat_template_kwargs": {"enable_thinking": think, "thinking": think}}


def _refuse_unsupported(asked: GenerateBody) -> None:
    """Raise `InvalidRequest` for what would change the answer and cannot be honoured."""
    if asked.template:
        raise InvalidRequest("`template` is not supported: the model's own is used. Or send `raw`.", param="template")
    if asked.context:
        raise InvalidRequest("`context` is not supported: send the conversation to /api/chat.", param="context")
    if asked.suffix:
        raise InvalidRequest(
            "`suffix` is not supported: send the model's own fill-in prompt with `raw`.", param="suffix"
        )


def _messages(messages: Sequence[_Message]) -> list[dict[str, Any]]:
    """Messages with an id for each tool call. Where a client gives none, a result belongs to the first open call of
    its tool."""
    spoken: list[dict[str, Any]] = []
    open_calls: list[tuple[str, str]] = []  # tool, id
    for number, message in enumerate(messages):
        one: dict[str, Any] = {"role": message.role, "content": _content(message.content or "", message.images)}
        if message.thinking:
            one["reasoning"] = message.thinking
        if message.tool_calls:
            calls = [(call.function, call.id or f"call_{number}_{i}") for i, call in enumerate(message.tool_calls)]
            open_calls = [(function.name, call_id) for function, call_id in calls]
            one["tool_calls"] = [_call(function, call_id) for function, call_id in calls]
        if message.role == "tool":
            one["tool_call_id"] = message.tool_call_id or _answered(message, number, open_calls)
        spoken.append(one)
    return spoken


def _answered(message: _Message, number: int, open_calls: list[tuple[str, str]]) -> str:
    """The id of the call that a result answers, which is not open any more then. Raises `InvalidRequest`."""
    tool = message.tool_name or message.name
    found = next((call for call in open_calls if tool in (None, call[0])), None)
    if found is None:
        place = f"messages.{number}"
        raise InvalidRequest(f"{place}: no tool call before it is open for this result.", param=place)
    open_calls.remove(found)
    return found[1]


def _call(function: _Function, call_id: str) -> dict[str, Any]:
    spoken = {"name": function.name, "arguments": json.dumps(function.arguments, ensure_ascii=False)}
    return {"id": call_id, "type": "function", "function": spoken}


def _content(text: str, images: Sequence[str] | None) -> str | list[dict[str, Any]]:
    if not images:
        return text
    shown = [{"type": "image_url", "image_url": {"url": _data_url(image)}} for image in images]
    return [*shown, {"type": "text", "text": text}]


def _data_url(image: str) -> str:
    """Base64 as a data URL. Raises `InvalidRequest` for anything else, which could be an address to be fetched."""
    try:
        head = base64.b64decode(image[:_MAGIC_CHARS], validate=True)
    except (binascii.Error, ValueError) as error:
        raise InvalidRequest("images: not valid base64.", param="images") from error
    kind = next((kind for magic, kind in _IMAGE_TYPES.items() if head.startswith(magic)), "jpeg")
    return f"data:image/{kind};base64,{image}"
