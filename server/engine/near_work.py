"""Templates and tokenizers at work: on short prompts where they are asked for, on others in vLLM's threads.

vLLM hands both to a thread, so that a long prompt does not hold up everybody's tokens. The way to a thread and back
costs more than a short prompt itself, and on a busy server the thread has to wait for the interpreter besides. So short
work is done at once. vLLM's pool of tokenizers has one more than its threads need, and ours has no state that an
encoding changes, so the two never meet.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Final

from vllm.inputs import TextPrompt, TokensPrompt
from vllm.renderers import TokenizeParams
from vllm.renderers.base import BaseRenderer
from vllm.renderers.hf import HfRenderer
from vllm.utils.async_utils import make_async

from server.engine.counting import MessageCounter, plain_texts
from server.engine.known_pieces import Encode, KnownPieces

# A few hundred tokens: rendered and tokenized in well under a millisecond.
_SHORT_CHARS: Final = 2048
_MOST_MESSAGES: Final = 16
_PROBES: Final = ("The tide is low, and rises.", "  Zwölf Boote\n\n潮水 🌊\t</s><|im_end|>")

_short: ContextVar[bool] = ContextVar("short_work", default=False)


class NearRenderer(HfRenderer):
    """vLLM's renderer, which does short work in the event loop. Made from a live one by `do_short_work_near`.

    `encode`: the token ids of a text, with special tokens around it or not. `eos_token_id`: the tokenizer's, which it
    looks for among its tokens each time that it is asked.
    """

    encode: Encode
    eos_token_id: int | None

    def get_eos_token_id(self) -> int | None:
        """As vLLM's."""
        return self.eos_token_id

    async def render_chat_async(self, *args: Any, **kwargs: Any) -> Any:
        """As vLLM's, which calls the same functions one by one in tasks and in its thread."""
        if _short.get():
            return self.render_chat(*args, **kwargs)
        return await super().render_chat_async(*args, **kwargs)

    async def render_cmpl_async(self, *args: Any, **kwargs: Any) -> Any:
        """As vLLM's."""
        if _short.get():
            return self.render_cmpl(*args, **kwargs)
        return await super().render_cmpl_async(*args, **kwargs)

    def _tokenize_prompt(self, prompt: TextPrompt, params: TokenizeParams) -> TokensPrompt:
        """As vLLM's, without the tokenizer's Python layers, which take longer than a short text does."""
        if self._wants_offsets(prompt, params):
            return super()._tokenize_prompt(prompt, params)
        limits = params.get_encode_kwargs()
        try:
            token_ids = self.encode(prompt["prompt"], limits["add_special_tokens"])
        except (TypeError, UnicodeError):  # a text that is no Unicode; vLLM's way has the words for it
            return super()._tokenize_prompt(prompt, params)
        if limits["truncation"] and len(token_ids) > limits["max_length"]:
            return super()._tokenize_prompt(prompt, params)
        return self._build_tokens_prompt(token_ids, prompt)


def do_short_work_near(renderer: BaseRenderer[Any], counter: MessageCounter) -> None:
    """Put it into a live renderer in place, if the counter's tokenizer is surely the one that vLLM's renderer calls."""
    encode = counter.encode
    if type(renderer) is not HfRenderer or encode is None or not _encodes_alike(renderer.get_tokenizer(), encode):
        return
    renderer.__class__ = NearRenderer
    assert isinstance(renderer, NearRenderer)
    tokenizer: Any = renderer.get_tokenizer()
    renderer.eos_token_id = tokenizer.eos_token_id
    renderer.encode = KnownPieces(encode, tokenizer.added_tokens_decoder)
    renderer._tokenize_prompt_async = make_async(renderer._tokenize_prompt, executor=renderer._executor)


def _encodes_alike(tokenizer: Any, encode: Encode) -> bool:
    return all(
        tokenizer(text, add_special_tokens=special)["input_ids"] == encode(text, special)
        for text in _PROBES
        for special in (False, True)
    )


@contextmanager
def short_work(short: bool) -> Generator[None]:
    """What is rendered and tokenized inside is short, or not."""
    token = _short.set(short)
    try:
        yield
    finally:
        _short.reset(token)


def is_short(messages: Sequence[Mapping[str, Any]]) -> bool:
    """Whether these are plain texts, and few and short enough."""
    texts = plain_texts(messages) if len(messages) <= _MOST_MESSAGES else None
    return texts is not None and sum(map(len, texts)) <= _SHORT_CHARS


def are_short(prompts: Sequence[Any]) -> bool:
    """Whether these are texts or lists of token ids, and few and short enough."""
    return len(prompts) <= _MOST_MESSAGES and sum(map(len, prompts)) <= _SHORT_CHARS
