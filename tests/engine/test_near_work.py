"""Short work is done where it is asked for, in the same way, and the rest in vLLM's thread."""

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.engine.arg_utils import EngineArgs
from vllm.exceptions import VLLMValidationError
from vllm.renderers import ChatParams, TokenizeParams
from vllm.renderers.hf import HfRenderer
from vllm.tokenizers import cached_tokenizer_from_config

from server.engine.counting import MessageCounter
from server.engine.near_work import NearRenderer, are_short, do_short_work_near, is_short, short_work

pytestmark = pytest.mark.engine

_LIMIT = 300
_CHAT = ChatParams(chat_template_kwargs={"add_generation_prompt": True, "tokenize": False})


def _renderer(model: Path) -> HfRenderer:
    config = EngineArgs(model=str(model), max_model_len=_LIMIT, enforce_eager=True).create_engine_config()
    return HfRenderer(config, cached_tokenizer_from_config(config.model_config))


@pytest.fixture(scope="module")
def renderers(embedded_model: Path) -> Iterator[tuple[HfRenderer, HfRenderer]]:
    """vLLM's, and one that does short work near."""
    theirs, ours = _renderer(embedded_model), _renderer(embedded_model)
    do_short_work_near(ours, MessageCounter(ours.get_tokenizer(), 100))
    yield theirs, ours
    theirs.shutdown()
    ours.shutdown()


def _tokens(renderer: HfRenderer, text: str, params: TokenizeParams, *, short: bool) -> Any:
    async def run() -> Any:
        with short_work(short):
            _, (rendered,) = await renderer.render_chat_async([[{"role": "user", "content": text}]], _CHAT, params)
            (plain,) = await renderer.render_cmpl_async([{"prompt": text}], params)
        return rendered["prompt_token_ids"], plain["prompt_token_ids"]

    try:
        return asyncio.run(run())
    except (VLLMValidationError, TypeError, UnicodeError) as error:  # what a client is told
        return type(error), str(error)


def test_short_work_needs_no_thread(renderers: tuple[HfRenderer, HfRenderer], monkeypatch: pytest.MonkeyPatch) -> None:
    _, ours = renderers
    assert isinstance(ours, NearRenderer)
    seen: list[int] = []
    encode = ours.encode

    def noting(text: str, special: bool) -> list[int]:
        seen.append(threading.get_ident())
        return encode(text, special)

    monkeypatch.setattr(ours, "encode", noting)
    params = TokenizeParams(max_total_tokens=None)
    _tokens(ours, "Hi", params, short=True)
    assert seen == [threading.get_ident()] * 2
    _tokens(ours, "Hi", params, short=False)
    assert len(seen) == 4
    assert threading.get_ident() not in seen[2:]


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=400), st.booleans(), st.sampled_from([None, 5, _LIMIT]))
def test_the_tokens_are_vllms(
    renderers: tuple[HfRenderer, HfRenderer], text: str, special: bool, limit: int | None
) -> None:
    """Texts that are too long or no Unicode are refused in its words as well."""
    theirs, ours = renderers
    params = TokenizeParams(max_total_tokens=limit, add_special_tokens=special)
    expected = _tokens(theirs, text, params, short=True)
    assert _tokens(ours, text, params, short=True) == expected
    assert _tokens(ours, text, params, short=False) == expected


@pytest.mark.parametrize("text", ["\ud800", "<|im_end|> and so on", "a" * 5000])
def test_odd_texts_are_vllms_as_well(renderers: tuple[HfRenderer, HfRenderer], text: str) -> None:
    theirs, ours = renderers
    params = TokenizeParams(max_total_tokens=_LIMIT, add_special_tokens=False)
    expected = _tokens(theirs, text, params, short=False)
    assert _tokens(ours, text, params, short=True) == expected
    assert _tokens(ours, text, params, short=False) == expected


def test_the_end_of_a_text_is_marked_as_vllm_marks_it(renderers: tuple[HfRenderer, HfRenderer]) -> None:
    theirs, ours = renderers
    assert ours.get_eos_token_id() == theirs.get_eos_token_id() is not None


def test_a_tokenizer_that_is_not_the_counters_stays_vllms(embedded_model: Path) -> None:
    renderer = _renderer(embedded_model)
    counter = MessageCounter(renderer.get_tokenizer(), 100)
    assert counter._backend is not None
    counter._backend.add_tokens(["tide"])
    do_short_work_near(renderer, counter)
    assert type(renderer) is HfRenderer


@pytest.mark.parametrize(
    ("messages", "short"),
    [
        ([{"role": "user", "content": "Hi"}], True),
        ([{"role": "system", "content": "a" * 1000}, {"role": "user", "content": "b" * 1000}], True),
        ([{"role": "user", "content": "a" * 3000}], False),
        ([{"role": "user", "content": "a"}] * 40, False),
        ([{"role": "user", "content": [{"type": "text", "text": "a"}]}], False),
        ([{"role": "assistant", "content": "a", "tool_calls": []}], False),
    ],
)
def test_short_is_what_takes_less_than_a_millisecond(messages: list[dict[str, Any]], short: bool) -> None:
    assert is_short(messages) is short


@pytest.mark.parametrize(
    ("prompts", "short"), [(["Hi"], True), (["a" * 3000], False), ([[1] * 2000], True), (["a"] * 40, False)]
)
def test_short_prompts_are_texts_or_tokens(prompts: list[Any], short: bool) -> None:
    assert are_short(prompts) is short
