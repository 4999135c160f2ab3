"""Finds the thinking in earlier answers that a chat template leaves out, so that nobody counts what is not printed.

Templates of reasoning models show thinking in the turn that is under way and take it out once the user speaks again.
Whether this one does is tried out on it, for each place where a client may put thinking.
"""

import copy
from collections.abc import Awaitable, Callable, Mapping, Sequence
from enum import Enum, auto
from typing import Any, Final

ProbeLength = Callable[[list[dict[str, Any]]], Awaitable[int | None]]

_OPEN: Final = "<think>"
THINKING_ENDS: Final = "</think>"
_PLAIN_FIELDS: Final = 2  # role and content
_MUCH: Final = " ".join(["thought"] * 48)
_MERGED_TOKENS: Final = 2  # for each answer: text split in two places can take a token more or less at the seam


class Place(Enum):
    """Where the thinking of an answer stands."""

    TAGS = auto()  # <think>...</think> before the answer
    CLOSING_TAG = auto()  # the same without the first tag, which the template wrote
    FIELD = auto()  # beside the content, in `reasoning`


Spot = tuple[Place, bool]  # True for an answer that calls tools, which templates treat in their own way


def spot_of(message: Mapping[str, Any]) -> Spot | None:
    """Where an assistant message has its thinking; None where it has none, or where that is open to doubt."""
    if message.get("role") != "assistant":
        return None
    content, reasoning = message.get("content"), message.get("reasoning")
    text = content if isinstance(content, str) else ""
    place = _place_in(text) if THINKING_ENDS in text and not reasoning else None
    if reasoning and isinstance(reasoning, str) and _OPEN not in text and THINKING_ENDS not in text:
        place = Place.FIELD
    return None if place is None else (place, bool(message.get("tool_calls")))


def spots_in(messages: Sequence[Mapping[str, Any]]) -> dict[int, Spot]:
    """By index, where the messages of a history have their thinking."""
    likely = [
        i
        for i, message in enumerate(messages)
        if message.get("role") == "assistant"
        and (len(message) > _PLAIN_FIELDS or THINKING_ENDS in (message.get("content") or ""))
    ]
    return {i: spot for i in likely if (spot := spot_of(messages[i])) is not None}


def _place_in(text: str) -> Place | None:
    before, after = text.split(THINKING_ENDS, 1)
    if THINKING_ENDS in after or _OPEN in after:
        return None
    if before.lstrip().startswith(_OPEN) and before.count(_OPEN) == 1:
        return Place.TAGS
    return None if _OPEN in before else Place.CLOSING_TAG


def without_thinking(message: Mapping[str, Any], place: Place) -> dict[str, Any]:
    """What is left of a message whose thinking stands in that place."""
    if place is Place.FIELD:
        return {key: value for key, value in message.items() if key not in ("reasoning", "reasoning_content")}
    return {**message, "content": message["content"].split(THINKING_ENDS, 1)[1]}


async def spots_left_out(length: ProbeLength) -> frozenset[Spot]:
    """Where thinking is left out of earlier turns, by the length of a conversation with and without it.

    `length` gives None where the template refuses the conversation; then nothing is known, and nothing left out.
    """
    found = set[Spot]()
    for calling in (False, True):
        plain = await length(_conversation(None, calling=calling))
        for place in Place if plain is not None else ():
            thoughtful = await length(_conversation(place, calling=calling))
            if plain is not None and thoughtful is not None and thoughtful <= plain + 2 * _MERGED_TOKENS:
                found.add((place, calling))
    return frozenset(found)


def _conversation(place: Place | None, *, calling: bool) -> list[dict[str, Any]]:
    """Two earlier turns whose answers think, and a question."""
    answer: dict[str, Any] = {"role": "assistant", "content": "a"}
    match place:
        case Place.TAGS:
            answer["content"] = f"{_OPEN}\n{_MUCH}\n{THINKING_ENDS}\n\na"
        case Place.CLOSING_TAG:
            answer["content"] = f"{_MUCH}\n{THINKING_ENDS}\n\na"
        case Place.FIELD:
            answer["reasoning"] = _MUCH
    messages: list[dict[str, Any]] = []
    for number in (1, 2):
        messages.append({"role": "user", "content": f"q{number}"})
        if calling:
            call_id = f"call_000{number}"
            call = {"id": call_id, "type": "function", "function": {"name": "a", "arguments": "{}"}}
            messages.append({**copy.deepcopy(answer), "tool_calls": [call]})
            messages.append({"role": "tool", "tool_call_id": call_id, "content": "a"})
            messages.append({"role": "assistant", "content": "a"})
        else:
            messages.append(dict(answer))
    return [*messages, {"role": "user", "content": "q3"}]
