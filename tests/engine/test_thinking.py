import asyncio
import re
from collections.abc import Callable
from typing import Any

import pytest

from server.engine.thinking import Place, Spot, spot_of, spots_left_out, without_thinking

Message = dict[str, Any]


def answer(content: object = "Low.", **fields: Any) -> Message:
    return {"role": "assistant", "content": content, **fields}


CALLS = [{"id": "a", "type": "function", "function": {"name": "look", "arguments": "{}"}}]


@pytest.mark.parametrize(
    ("message", "spot", "left"),
    [
        (answer("<think>\nHm.\n</think>\n\nLow."), (Place.TAGS, False), "\n\nLow."),
        (answer("  <think></think>Low."), (Place.TAGS, False), "Low."),
        (answer("Hm.\n</think>\n\nLow."), (Place.CLOSING_TAG, False), "\n\nLow."),
        (answer("<think>Hm.</think>", tool_calls=CALLS), (Place.TAGS, True), ""),
        (answer("Low.", reasoning="Hm."), (Place.FIELD, False), "Low."),
        (answer(None, reasoning="Hm.", tool_calls=CALLS), (Place.FIELD, True), None),
    ],
)
def test_thinking_is_found_where_clients_put_it(message: Message, spot: tuple[Place, bool], left: object) -> None:
    assert spot_of(message) == spot
    shorter = without_thinking(message, spot[0])
    assert shorter["content"] == left
    assert "reasoning" not in shorter
    assert shorter.get("tool_calls") == message.get("tool_calls")


@pytest.mark.parametrize(
    "message",
    [
        answer(),
        answer(None),
        answer([{"type": "text", "text": "<think>Hm.</think>Low."}]),
        answer("<think>It is not finished"),
        answer("Low. <think>Hm.</think>Or high."),
        answer("<think>Hm.</think>Low. <think>Hm?</think>High."),
        answer("<think>Hm.</think>The tag </think> ends it."),
        answer("<think>Hm.</think>Low.", reasoning="Hm."),
        answer("<think>Hm.", reasoning="Hm."),
        answer("Low.", reasoning=""),
    ],
)
def test_thinking_that_templates_may_treat_otherwise_is_left_alone(message: Message) -> None:
    assert spot_of(message) is None


def left_out_by(shown: Callable[[Message, bool], str | None]) -> frozenset[Spot]:
    """What is left out by a template that shows a message, of an earlier turn or of the last one, in those words."""

    async def length(messages: list[Message]) -> int | None:
        last = max(i for i, message in enumerate(messages) if message["role"] == "user")
        texts = [shown(message, i < last) for i, message in enumerate(messages)]
        return None if None in texts else sum(len(text.split()) for text in texts if text)

    return asyncio.run(spots_left_out(length))


def everything(message: Message, _: bool) -> str:
    return f"{message.get('reasoning', '')} {message['content']}"


def test_a_template_that_prints_all_leaves_nothing_out() -> None:
    assert left_out_by(everything) == frozenset()


def test_a_template_that_takes_tags_out_of_earlier_answers_is_known_by_that() -> None:
    def shown(message: Message, earlier: bool) -> str:
        return re.sub(r"(?s)<think>.*</think>", "", everything(message, earlier)) if earlier else ""

    assert left_out_by(shown) == {(Place.TAGS, False), (Place.TAGS, True)}


def test_a_template_that_leaves_out_only_some_of_the_thinking_is_not_trusted() -> None:
    """As one would that keeps the thinking of the newest answers."""
    shown_before = set[str]()

    def shown(message: Message, earlier: bool) -> str:
        text = everything(message, earlier)
        if text in shown_before:
            return text
        shown_before.add(text)
        return text.rpartition("</think>")[2]

    assert not {place for place, _ in left_out_by(shown)} & {Place.TAGS, Place.CLOSING_TAG}


def test_a_template_that_refuses_tools_tells_only_of_plain_answers() -> None:
    def shown(message: Message, _: bool) -> str | None:
        return None if message["role"] == "tool" else str(message["content"]).rpartition("</think>")[2]

    assert left_out_by(shown) == {(place, False) for place in Place}


def test_of_a_template_that_refuses_everything_nothing_is_known() -> None:
    assert left_out_by(lambda *_: None) == frozenset()
