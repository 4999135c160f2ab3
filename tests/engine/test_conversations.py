"""What a history costs, with real counts and a template of the kind that reasoning models have."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
from cachetools import LRUCache
from transformers import AutoTokenizer

from server.engine.conversations import Conversation, Costs
from server.engine.counting import MessageCounter, Overheads
from server.engine.thinking import Place, Spot

pytestmark = pytest.mark.engine

_THOUGHT = "The moon pulls at the sea. " * 20
_AROUND = 6
ROUND = [{"role": "user", "content": "How often does it rise?"}, {"role": "assistant", "content": "Twice a day."}]


@pytest.fixture(scope="module")
def counter(embedded_model: Path) -> MessageCounter:
    return MessageCounter(AutoTokenizer.from_pretrained(embedded_model), 1000)


def conversation(
    counter: MessageCounter, messages: list[dict[str, Any]], left_out: frozenset[Spot] | None = None
) -> Conversation:
    """`left_out` None: the template may not be asked."""

    async def tried_out() -> frozenset[Spot]:
        assert left_out is not None
        return left_out

    async def never(*_: object) -> Any:
        raise AssertionError("nothing has to be rendered")

    return Conversation(
        messages=messages,
        tools=(),
        max_model_len=1000,
        counter=counter,
        overheads=Overheads({"user": _AROUND, "assistant": _AROUND}, 3),
        tool_tokens=LRUCache(1),
        bare_length=never,
        left_out=tried_out,
        render_messages=never,
        counts_only=False,
    )


def costs(given: Conversation) -> Costs:
    return asyncio.run(given.costs())


def counted(counter: MessageCounter, text: str) -> int:
    return asyncio.run(counter.count([text]))[0] + _AROUND


def test_a_message_costs_its_text_and_what_stands_around_it(counter: MessageCounter) -> None:
    found = costs(conversation(counter, [{"role": "user", "content": "The sea."}]))
    assert found.messages == [counted(counter, "The sea.")]
    assert found.fixed == 3


def test_a_template_is_not_tried_out_for_a_history_without_thinking(counter: MessageCounter) -> None:
    found = costs(conversation(counter, [{"role": "assistant", "content": "The sea."}]))
    assert found.settled is found.messages


def test_thinking_that_is_left_out_later_costs_only_now(counter: MessageCounter) -> None:
    answer = {"role": "assistant", "content": f"<think>{_THOUGHT}</think>Twice."}
    found = costs(conversation(counter, [answer], frozenset({(Place.TAGS, False)})))
    assert found.settled == [counted(counter, "Twice.")]
    assert found.messages[0] > found.settled[0] + 100
    assert found.counted == 2


def test_thinking_that_the_template_keeps_costs_the_same_for_ever(counter: MessageCounter) -> None:
    call = {"id": "a", "type": "function", "function": {"name": "look", "arguments": "{}"}}
    answer = {"role": "assistant", "content": f"<think>{_THOUGHT}</think>Twice.", "tool_calls": [call]}
    found = costs(conversation(counter, [answer], frozenset({(Place.TAGS, False)})))
    assert found.settled == found.messages


def test_reasoning_beside_the_content_is_left_out_too(counter: MessageCounter) -> None:
    answer = {"role": "assistant", "content": "Twice.", "reasoning": _THOUGHT}
    found = costs(conversation(counter, [answer], frozenset({(Place.FIELD, False)})))
    assert found.settled == [counted(counter, "Twice.")]


@pytest.mark.parametrize(("most", "length"), [(8, 8), (7, None)])
def test_bytes_matter_only_up_to_a_length(counter: MessageCounter, most: int, length: int | None) -> None:
    messages = [{"role": "user", "content": "海"}, {"role": "assistant", "content": "tide"}]  # and one between them
    assert conversation(counter, messages).bytes_within(most) == length


def test_what_is_known_adds_up_to_the_costs(counter: MessageCounter) -> None:
    history = [{"role": "system", "content": "Be brief."}, *ROUND, {"role": "user", "content": "And then?"}]
    assert conversation(counter, history).known_tokens() is None  # nobody has counted them yet
    found = costs(conversation(counter, history))
    assert conversation(counter, history).known_tokens() == sum(found.messages) + found.fixed


@pytest.mark.parametrize(
    "odd",
    [
        {"role": "assistant", "content": "<think>so</think>Twice."},
        {"role": "assistant", "content": "Twice.", "reasoning": "so"},
        {"role": "tool", "content": "Twice.", "tool_call_id": "a"},
        {"role": "user", "content": [{"type": "text", "text": "Twice."}]},
    ],
)
def test_what_has_to_be_looked_into_is_not_known(counter: MessageCounter, odd: dict[str, Any]) -> None:
    history = [*ROUND, odd]
    costs(conversation(counter, history, frozenset()))
    assert conversation(counter, history).known_tokens() is None


def test_media_have_no_byte_length(counter: MessageCounter) -> None:
    image = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}
    assert conversation(counter, [image]).bytes_within(1000) is None
