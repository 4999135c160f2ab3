"""OpenAI's answers in Ollama's words: whole, and as lines of JSON."""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Final

from server.api.ollama_bodies import Asked
from server.engine.calls import Frame, Reply, StreamReply

LINES_TYPE: Final = "application/x-ndjson"
_JSON: Final = "application/json"
_NS: Final = 1_000_000_000
_DATA: Final = b"data:"
_END: Final = b"[DONE]"

Clock = Callable[[], float]


class Saying:
    """Says one call's answer. Times are counted from its making, on `clock`, in seconds."""

    def __init__(self, asked: Asked, clock: Clock = time.perf_counter) -> None:
        self._asked = asked
        self._clock = clock
        self._began_s = clock()

    def whole(self, reply: Reply) -> Reply:
        """A complete answer."""
        answer = json.loads(reply.body)
        if reply.status != 200:  # the words of a fallback upstream
            return Reply(_line({"error": _error_text(answer)}), _JSON, reply.headers, reply.status)
        if self._asked.shape in ("embed", "embedding"):
            return Reply(_line(self._embedded(answer)), _JSON, reply.headers)
        choice = answer["choices"][0]
        message = choice.get("message") or {"content": choice.get("text")}
        calls = _called(message.get("tool_calls") or ())
        said = self._said(message, calls, choice.get("logprobs"))
        last = self.last(choice.get("finish_reason"), answer.get("usage") or {})
        return Reply(_line({**said, **last}), _JSON, reply.headers)

    def nothing(self, reason: str) -> Reply:
        """The answer to a call that only loads or unloads the model, in one line whether it streams or not."""
        said = {**self._said({"content": ""}, []), "done": True, "done_reason": reason}
        return Reply(_line(said), LINES_TYPE if self._asked.streams else _JSON)

    def part(self, delta: Mapping[str, Any], logprobs: Any = None) -> dict[str, Any]:
        """A line of a stream: some text, some thinking, or both."""
        return {**self._said(delta, [], logprobs), "done": False}

    def calls(self, calls: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The line with the tool calls of a stream, which Ollama's clients expect whole."""
        return {**self._said({"content": ""}, _called(calls)), "done": False}

    def last(
        self, finish_reason: str | None, usage: Mapping[str, Any], first_token_s: float | None = None
    ) -> dict[str, Any]:
        """What ends an answer. How long the prompt and the answer took apart is known of streams only."""
        now_s = self._clock()
        told = {
            "done": True,
            "done_reason": "length" if finish_reason == "length" else "stop",
            "total_duration": _ns(now_s - self._began_s),
            "load_duration": 0,
            "prompt_eval_count": usage.get("prompt_tokens", 0),
            "eval_count": usage.get("completion_tokens", 0),
        }
        if first_token_s is not None:
            told["prompt_eval_duration"] = _ns(first_token_s - self._began_s)
            told["eval_duration"] = _ns(now_s - first_token_s)
        return told

    def closing(self) -> dict[str, Any]:
        """What the last line of a stream says besides its figures."""
        return self._said({"content": ""}, [])

    def now_s(self) -> float:
        return self._clock()

    def _said(self, message: Mapping[str, Any], calls: list[dict[str, Any]], logprobs: Any = None) -> dict[str, Any]:
        text = message.get("content") or ""
        thinking = message.get("reasoning") or message.get("reasoning_content")
        said: dict[str, Any] = {"model": self._asked.model, "created_at": _now()}
        if self._asked.shape == "chat":
            said["message"] = {"role": "assistant", "content": text}
            if thinking:
                said["message"]["thinking"] = thinking
            if calls:
                said["message"]["tool_calls"] = calls
        else:
            said["response"] = text
            if thinking:
                said["thinking"] = thinking
        if isinstance(logprobs, dict) and logprobs.get("content"):
            said["logprobs"] = logprobs["content"]
        return said

    def _embedded(self, answer: Mapping[str, Any]) -> dict[str, Any]:
        vectors = [item["embedding"] for item in answer["data"]]
        if self._asked.shape == "embedding":
            return {"embedding": vectors[0]}
        return {
            "model": self._asked.model,
            "embeddings": vectors,
            "total_duration": _ns(self._clock() - self._began_s),
            "load_duration": 0,
            "prompt_eval_count": (answer.get("usage") or {}).get("prompt_tokens", 0),
        }


class Lines:
    """A stream of events as lines of JSON. An object and no generator: it is closed also if nobody ever reads it."""

    def __init__(self, reply: StreamReply, saying: Saying) -> None:
        self._reply = reply
        self._saying = saying
        self._rest = b""
        self._over = False
        self._first_token_s: float | None = None
        self._finish_reason: str | None = None
        self._usage: Mapping[str, Any] = {}
        self._calls: dict[int, dict[str, Any]] = {}

    def __aiter__(self) -> "Lines":
        return self

    async def __anext__(self) -> Frame:
        """The next lines. Raises the `Refusal` that stands in an error frame."""
        while not self._over:
            try:
                frame = await anext(self._reply.frames)
            except StopAsyncIteration:
                self._over = True
                return self._ending()
            if (refusal := self._reply.refusal_in(frame)) is not None:
                raise refusal
            if lines := self._lines(frame.encode() if isinstance(frame, str) else frame):
                return lines
        raise StopAsyncIteration

    async def aclose(self) -> None:
        await self._reply.frames.aclose()

    def _lines(self, frame: bytes) -> bytes:
        """The lines for a frame, which may hold several events, or a part of one."""
        *complete, self._rest = (self._rest + frame).split(b"\n")
        events = [line.removeprefix(_DATA).strip() for line in complete if line.startswith(_DATA)]
        return b"".join(self._line(json.loads(event)) for event in events if event != _END)

    def _line(self, event: Mapping[str, Any]) -> bytes:
        if "error" in event:  # the words of a fallback upstream
            return _line({"error": _error_text(event)})
        self._usage = event.get("usage") or self._usage
        if not event.get("choices"):
            return b""
        choice = event["choices"][0]
        delta = choice.get("delta") or {"content": choice.get("text")}
        self._finish_reason = choice.get("finish_reason") or self._finish_reason
        for call in delta.get("tool_calls") or ():
            self._gather(call)
        is_first = self._first_token_s is None
        if is_first:
            self._first_token_s = self._saying.now_s()
        speaks = delta.get("content") or delta.get("reasoning") or delta.get("reasoning_content")
        return _line(self._saying.part(delta, choice.get("logprobs"))) if is_first or speaks else b""

    def _gather(self, call: Mapping[str, Any]) -> None:
        whole = self._calls.setdefault(call.get("index", 0), {"id": None, "function": {"name": "", "arguments": ""}})
        whole["id"] = whole["id"] or call.get("id")
        for name, part in (call.get("function") or {}).items():
            whole["function"][name] = whole["function"].get(name, "") + (part or "")

    def _ending(self) -> bytes:
        calls = [call for _, call in sorted(self._calls.items())]
        said = _line(self._saying.calls(calls)) if calls else b""
        figures = self._saying.last(self._finish_reason, self._usage, self._first_token_s)
        return said + _line({**self._saying.closing(), **figures})


def _called(calls: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Tool calls, numbered, with their arguments as objects."""
    functions = [(call.get("id"), call.get("function") or {}) for call in calls]
    return [
        {"id": call_id, "function": {"index": i, "name": function.get("name"), "arguments": _arguments(function)}}
        for i, (call_id, function) in enumerate(functions)
    ]


def _arguments(function: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments as an object. What is none, as in an answer that was cut short, goes as text under an empty name."""
    written = function.get("arguments") or "{}"
    try:
        arguments = json.loads(written)
    except json.JSONDecodeError:
        return {"": written}
    return arguments if isinstance(arguments, dict) else {"": written}


def _error_text(answer: Any) -> str:
    error = answer.get("error", answer) if isinstance(answer, dict) else answer
    return str(error.get("message", error)) if isinstance(error, dict) else str(error)


def _line(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"


def _now() -> str:
    return datetime.now(UTC).isoformat().replace("+00:00", "Z")


def _ns(seconds: float) -> int:
    return int(seconds * _NS)
