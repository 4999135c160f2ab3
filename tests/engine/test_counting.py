"""Counts against the real tokenizer, and overheads against a real template."""

import asyncio
import threading
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from server.engine.counting import MessageCounter, has_media, measure_overheads, message_text, text_bytes

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def tokenizer(embedded_model: Path) -> Any:
    return AutoTokenizer.from_pretrained(embedded_model)


def _count(counter: MessageCounter, *texts: str) -> tuple[list[int], int]:
    return asyncio.run(counter.count_and_tell(texts))


def test_counts_are_those_of_the_tokenizer(tokenizer: Any) -> None:
    texts = ["The sea.", "", "海 and 🌊", "x" * 5000]
    counts, _ = _count(MessageCounter(tokenizer, 10), *texts)
    assert counts == [len(tokenizer.encode(text, add_special_tokens=False)) for text in texts]


def test_a_text_is_counted_once(tokenizer: Any) -> None:
    counter = MessageCounter(tokenizer, 10)
    assert _count(counter, "a", "b", "a")[1] == 2
    assert _count(counter, "a", "b", "c") == ([1, 1, 1], 1)


def test_the_cache_forgets_the_oldest_beyond_its_bound(tokenizer: Any) -> None:
    counter = MessageCounter(tokenizer, 2)
    _count(counter, "a", "b", "c")
    assert _count(counter, "c")[1] == 0
    assert _count(counter, "a")[1] == 1


def test_what_is_asked_for_again_is_kept_and_the_rest_forgotten(tokenizer: Any) -> None:
    counter = MessageCounter(tokenizer, 4)
    for text in ("a", "b", "c", "a", "d"):
        _count(counter, text)
    assert _count(counter, "a")[1] == 0
    assert _count(counter, "b")[1] == 1


def test_the_cache_never_holds_more_than_its_bound(tokenizer: Any) -> None:
    counter = MessageCounter(tokenizer, 6)
    for start in range(0, 40, 2):
        _count(counter, *(f"{i % 11}" for i in range(start, start + 5)))
        assert len(counter) <= 6


def test_more_texts_at_once_than_the_cache_holds_are_all_counted(tokenizer: Any) -> None:
    assert _count(MessageCounter(tokenizer, 2), *"abcdef") == ([1] * 6, 6)


def test_a_lone_surrogate_is_counted_and_not_an_error(tokenizer: Any) -> None:
    assert _count(MessageCounter(tokenizer, 10), "\ud800") == ([1], 1)
    assert text_bytes({"role": "user", "content": "\ud800"}) == 3


def test_counting_runs_off_the_event_loop(tokenizer: Any) -> None:
    class Watching(MessageCounter):
        def _encode(self, texts: list[str]) -> list[int]:
            assert threading.current_thread() is not threading.main_thread()
            return super()._encode(texts)

    assert _count(Watching(tokenizer, 10), "a") == ([1], 1)


def test_overheads_measured_on_a_template_cover_what_it_prints(tokenizer: Any) -> None:
    async def length(messages: list[dict[str, Any]]) -> int:
        return len(tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"])

    async def check() -> None:
        counter = MessageCounter(tokenizer, 100)
        overheads = await measure_overheads(length, counter)
        history = [{"role": "user", "content": "Where to?"}, {"role": "assistant", "content": "To sea, and far."}] * 20
        counts = await counter.count([message["content"] for message in history])
        estimate = overheads.prompt + sum(
            count + overheads.around([message["role"]]) for count, message in zip(counts, history, strict=True)
        )
        real = await length(history)
        assert real <= estimate <= real * 1.15

    asyncio.run(check())


def test_a_template_that_always_raises_leaves_a_careful_guess(tokenizer: Any) -> None:
    async def never(messages: list[dict[str, Any]]) -> int:
        raise ValueError(f"no template for {len(messages)} messages")

    overheads = asyncio.run(measure_overheads(never, MessageCounter(tokenizer, 10)))
    assert overheads.around(["user"]) >= 10
    assert overheads.around(["unheard of", "user"]) >= 20


@pytest.mark.parametrize(
    ("message", "text"),
    [
        ({"role": "user", "content": "a"}, "a"),
        ({"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}, "a\nb"),
        ({"role": "user", "content": None}, ""),
        ({"role": "user"}, ""),
    ],
)
def test_the_text_of_a_message_is_all_that_a_template_may_print(message: dict[str, Any], text: str) -> None:
    assert message_text(message) == text
    assert text_bytes(message) == len(text)


def test_tool_calls_are_part_of_the_text() -> None:
    calls = [{"id": "c", "function": {"name": "look", "arguments": '{"at": "sea"}'}}]
    assert "look" in message_text({"role": "assistant", "content": None, "tool_calls": calls})


def test_media_has_no_byte_length() -> None:
    image = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}
    assert has_media(image)
    assert text_bytes(image) is None
