"""The files that `tidegate batch` reads: OpenAI's batch lines, and the data that models are fine-tuned on.

ShareGPT and Alpaca are read as LLaMA-Factory and ms-swift write them, as JSONL or as one JSON array. Their last answer
is what a run can be compared with.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

CHAT_ENDPOINT: Final = "/v1/chat/completions"
_ROLES: Final[Mapping[str, str]] = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant",
    "bing": "assistant", "bard": "assistant", "model": "assistant", "system": "system", "developer": "developer",
}  # fmt: skip

Messages = list[dict[str, Any]]


class BadRecord(Exception):
    """A record that is of no known form; the message names it."""


@dataclass(frozen=True, slots=True)
class Asking:
    """What a run adds to questions that do not say it themselves."""

    model: str | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    system: str | None = None


@dataclass(frozen=True, slots=True)
class Question:
    """One request of a batch, what it asks, and the answer that is known for it."""

    request: dict[str, Any]
    text: str
    reference: str | None

    @property
    def custom_id(self) -> str:
        return str(self.request["custom_id"])


def read_questions(path: Path, asking: Asking) -> Iterator[Question]:
    """Every question of a file, in its order. Raises `BadRecord` and `OSError`."""
    for number, record in _records(path):
        try:
            yield _question(record, number, asking)
        except BadRecord as error:
            raise BadRecord(f"{path}, record {number}: {error}") from error


def _records(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Records with their numbers from 1."""
    with path.open(encoding="utf-8-sig") as file:
        try:
            if _opens_array(file.read(4096)):
                file.seek(0)
                items: Any = json.load(file)
            else:
                file.seek(0)
                items = (json.loads(line) for line in file if line.strip())
            for number, item in enumerate(items, 1):
                if not isinstance(item, dict):
                    raise BadRecord(f"{path}, record {number}: it is not a JSON object.")
                yield number, item
        except json.JSONDecodeError as error:
            raise BadRecord(f"{path} is neither JSONL nor a JSON array: {error.msg} ({error.doc[:40]!r} …).") from error
        except UnicodeDecodeError as error:
            raise BadRecord(f"{path} is not UTF-8 (byte {error.start}).") from error


def _opens_array(beginning: str) -> bool:
    return beginning.lstrip("\ufeff \t\r\n").startswith("[")


def _question(record: Mapping[str, Any], number: int, asking: Asking) -> Question:
    if "custom_id" in record and isinstance(body := record.get("body"), dict):
        return Question({**record, "body": _completed(body, asking)}, _asked(body), None)
    messages, reference = _conversation(record, asking)
    body = _completed({"messages": messages}, asking)
    custom_id = str(record.get("id") or f"line-{number}")
    request = {"custom_id": custom_id, "method": "POST", "url": CHAT_ENDPOINT, "body": body}
    return Question(request, str(messages[-1]["content"]), reference)


def _completed(body: Mapping[str, Any], asking: Asking) -> dict[str, Any]:
    """The body with the run's choices; a model that is named for the run counts more than the body's own."""
    chosen: dict[str, Any] = {"max_tokens": asking.max_tokens, "temperature": asking.temperature}
    chosen = {name: value for name, value in chosen.items() if value is not None and name not in body}
    named = {"model": asking.model} if asking.model is not None else {}
    return {**body, **chosen, **named}


def _asked(body: Mapping[str, Any]) -> str:
    """What a body asks, for people."""
    messages = body.get("messages")
    if isinstance(messages, list) and messages and isinstance(messages[-1], dict):
        return str(messages[-1].get("content", ""))
    return str(body.get("prompt", body.get("input", "")))


def _conversation(record: Mapping[str, Any], asking: Asking) -> tuple[Messages, str | None]:
    """The messages to send and the answer that is known."""
    if "instruction" in record:
        messages, reference = _alpaca(record)
    elif isinstance(turns := record.get("conversations", record.get("messages")), list):
        messages, reference = _sharegpt(turns)
    else:
        raise BadRecord("it is no batch line, no ShareGPT and no Alpaca record.")
    if not messages or messages[-1]["role"] != "user":
        raise BadRecord("it does not end with a question and its answer.")
    system = record.get("system") or asking.system
    if system and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system})
    return messages, reference


def _alpaca(record: Mapping[str, Any]) -> tuple[Messages, str | None]:
    messages: Messages = []
    for turn in record.get("history") or ():
        question, answer = turn
        messages += ({"role": "user", "content": question}, {"role": "assistant", "content": answer})
    asked = "\n".join(str(part) for part in (record["instruction"], record.get("input")) if part)
    messages.append({"role": "user", "content": asked})
    return messages, record.get("output") or None


def _sharegpt(turns: list[Any]) -> tuple[Messages, str | None]:
    messages: Messages = []
    for turn in turns:
        if not isinstance(turn, dict):
            raise BadRecord("a turn is not an object.")
        said = str(turn.get("from", turn.get("role")))
        if said not in _ROLES:
            raise BadRecord(f"the role {said!r} cannot be asked again.")
        messages.append({"role": _ROLES[said], "content": turn.get("value", turn.get("content"))})
    if messages and messages[-1]["role"] == "assistant":
        return messages[:-1], str(messages[-1]["content"])
    return messages, None
