"""The end of a prompt, which is all that the text of an answer depends on.

A token's text can depend on the tokens before it: half a character is completed, a space in front is dropped at the
beginning of a text. vLLM gives its detokenizer the whole prompt for that, which decodes it twice in the event loop
when the first token comes; everybody's tokens wait for a long one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import tokenizers.decoders
from vllm.v1.engine.detokenizer import FastIncrementalDetokenizer

# Enough for any character; vLLM's detokenizer for tokenizers in Python begins with five.
_TAIL_TOKENS: Final = 32
_BROKEN_CHARACTER: Final = "\ufffd"


def begin_with_tail(detokenizer: Any, prompt_token_ids: Sequence[int] | None) -> None:
    """Let a new detokenizer know the end of its prompt only, where that is whole characters and some text."""
    if type(detokenizer) is not FastIncrementalDetokenizer or not prompt_token_ids:
        return
    if len(prompt_token_ids) <= _TAIL_TOKENS:
        return
    tail, skips = list(prompt_token_ids[-_TAIL_TOKENS:]), detokenizer.skip_special_tokens
    text = detokenizer.tokenizer.decode(tail, skip_special_tokens=skips)
    if text and _BROKEN_CHARACTER not in text:
        # Looked up on the module, as vLLM does, since others may have put their own there.
        detokenizer.stream = tokenizers.decoders.DecodeStream(ids=tail, skip_special_tokens=skips)
