"""The tokens of prompts of which the most is known from before.

A client sends all of a chat with every turn, and tokenizing it takes longer than anything else that is done for a long
one. A tokenizer looks for its special tokens first, and what lies between two of them becomes tokens by itself. So a
prompt is taken apart in front of the token that begins a message, and only the pieces that were not there lately are
tokenized.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

Encode = Callable[[str, bool], list[int]]

# At most some 80 MB with their texts: a thousand chats of 8,000 tokens.
_MOST_TOKENS: Final = 8_000_000
# Texts in which a token is looked for that begins messages. Where these have none, there is none.
_TEXTS_LOOKED_AT: Final = 16
_LEAST_MESSAGES: Final = 2


class KnownPieces:
    """The token ids of a text, as `encode` gives them. May be called in several threads."""

    def __init__(self, encode: Encode, added_tokens: Mapping[int, Any], most_tokens: int = _MOST_TOKENS) -> None:
        self._encode = encode
        self._added = {token.content: (token_id, token) for token_id, token in added_tokens.items()}
        self._most_tokens = most_tokens
        self._pieces: Pieces | None = None
        self._looks_left = _TEXTS_LOOKED_AT

    def __call__(self, text: str, special: bool) -> list[int]:
        """The ids; `special`: with the tokens that the tokenizer puts around every text."""
        if special or (self._pieces is None and not self._looks_left):
            return self._encode(text, special)
        return self._looked_at(text) if self._pieces is None else self._pieces.token_ids(text)

    def _looked_at(self, text: str) -> list[int]:
        """Find out which token begins a message: the most frequent one that may be cut at, of these the first."""
        self._looks_left -= 1
        token_ids = self._encode(text, False)
        counts = {content: text.count(content) for content in self._added if content}
        often = [content for content, count in counts.items() if count >= _LEAST_MESSAGES]
        for content in sorted(often, key=lambda content: (-counts[content], text.find(content))):
            token_id, token = self._added[content]
            if not may_be_cut_at(token, self._added):
                continue
            pieces = Pieces(self._encode, content, token_id, self._most_tokens)
            if all(pieces.token_ids(text) == token_ids for _ in ("new", "known")):
                self._pieces = pieces
                break
        return token_ids


class Pieces:
    """The token ids of texts that are cut in front of one token, the `boundary`. May be called in several threads.

    Pieces are kept in two dictionaries: when the recent one is full it becomes the older one, and what is not asked for
    again goes with that.
    """

    def __init__(self, encode: Encode, boundary: str, boundary_id: int, most_tokens: int) -> None:
        self._encode = encode
        self._boundary = boundary
        self._boundary_id = boundary_id
        self._half = most_tokens // 2
        self._tokens = 0  # in the recent ones
        self._recent: dict[str, array[int]] = {}
        self._older: dict[str, array[int]] = {}

    def __len__(self) -> int:
        """How many tokens are kept."""
        return sum(map(len, self._recent.values())) + sum(map(len, self._older.values()))

    def token_ids(self, text: str) -> list[int]:
        """The ids of a text without special tokens around it."""
        before, *rest = text.split(self._boundary)
        token_ids = self._encode(before, False) if before else []
        new: list[str] = []
        for piece in rest:
            if (known := self._known(piece)) is None:
                new.append(piece)
                continue
            if new:
                token_ids += self._encoded(new)
                new = []
            token_ids += known
        return token_ids + self._encoded(new) if new else token_ids

    def _encoded(self, pieces: list[str]) -> list[int]:
        """The ids of pieces that follow each other, which are kept."""
        token_ids = self._encode(self._boundary + self._boundary.join(pieces), False)
        starts = [i for i, token_id in enumerate(token_ids) if token_id == self._boundary_id]
        if len(starts) == len(pieces):
            for piece, start, end in zip(pieces, starts, [*starts[1:], len(token_ids)], strict=True):
                self._keep(piece, array("I", token_ids[start:end]))
        return token_ids

    def _known(self, piece: str) -> array[int] | None:
        if (known := self._recent.get(piece)) is None and (known := self._older.get(piece)) is not None:
            self._keep(piece, known)
        return known

    def _keep(self, piece: str, token_ids: array[int]) -> None:
        if self._tokens >= self._half:
            self._recent, self._older, self._tokens = {}, self._recent, 0
        self._recent[piece] = token_ids
        self._tokens += len(token_ids)


def may_be_cut_at(token: Any, added: Iterable[str]) -> bool:
    """Whether a text in front of this token, and one that begins with it, become tokens apart from each other.

    The token takes no white space in front of it along, depends on no neighbours, and is found wherever it stands:
    no other one begins before it and ends in it, or is longer than it.
    """
    content: str = token.content
    if token.lstrip or token.single_word or token.normalized or content != content.strip():
        return False
    others = [other for other in added if other != content]
    beginnings = [content[:length] for length in range(1, len(content))]
    return not any(content in other or other.endswith(tuple(beginnings)) for other in others)
