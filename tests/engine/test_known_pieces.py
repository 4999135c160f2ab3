import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer

from server.engine.known_pieces import Encode, KnownPieces, may_be_cut_at

pytestmark = pytest.mark.engine

START, END = "<|im_start|>", "<|im_end|>"
WORDS = st.text(st.characters(codec="utf-8"), max_size=40)
CONTENTS = st.one_of(
    WORDS,
    st.sampled_from([START, END, f"a{START}b", "<|im_", "start|>", " \n\n ", "<|", "\u0301", "<|im_start|", "", "▁ x"]),
)
CHATS = st.lists(st.tuples(st.sampled_from(["system", "user", "assistant"]), CONTENTS), max_size=6)


def text_of(chat: list[tuple[str, str]]) -> str:
    return "".join(f"{START}{role}\n{content}{END}\n" for role, content in chat) + f"{START}assistant\n"


def encode_of(tokenizer: Tokenizer, asked: list[str] | None = None) -> Encode:
    def encode(text: str, special: bool) -> list[int]:
        if asked is not None:
            asked.append(text)
        ids: list[int] = tokenizer.encode(text, add_special_tokens=special).ids
        return ids

    return encode


def pieces_of(tokenizer: Tokenizer, asked: list[str] | None = None, **bounds: int) -> KnownPieces:
    return KnownPieces(encode_of(tokenizer, asked), tokenizer.get_added_tokens_decoder(), **bounds)


@pytest.fixture(scope="module")
def tokenizer(embedded_model: Path) -> Tokenizer:
    made: Any = AutoTokenizer.from_pretrained(embedded_model)
    backend: Tokenizer = made.backend_tokenizer
    backend.no_truncation()
    return backend


@pytest.fixture(scope="module")
def used(tokenizer: Tokenizer) -> KnownPieces:
    """Pieces that have seen many chats, of which few are kept."""
    return pieces_of(tokenizer, most_tokens=400)


@settings(max_examples=300, deadline=None)
@given(chat=CHATS)
def test_the_tokens_are_those_of_the_whole_text(tokenizer: Tokenizer, used: KnownPieces, chat: Any) -> None:
    for length in range(len(chat) + 1):
        text = text_of(chat[:length])
        assert used(text, False) == tokenizer.encode(text, add_special_tokens=False).ids


def test_a_next_turn_has_only_what_is_new_tokenized(tokenizer: Tokenizer) -> None:
    asked: list[str] = []
    pieces = pieces_of(tokenizer, asked)
    chat = [("system", "Be short."), ("user", "Where is the boat?")]
    pieces(text_of(chat), False)
    chat += [("assistant", "In the lock."), ("user", "And the crew?")]
    asked.clear()
    pieces(text_of(chat), False)
    assert asked == [f"{START}assistant\nIn the lock.{END}\n{START}user\nAnd the crew?{END}\n"]
    asked.clear()
    pieces(text_of(chat[2:]), False)  # a history that was cut
    assert asked == []


def test_a_text_with_special_tokens_around_it_is_tokenized_whole(tokenizer: Tokenizer) -> None:
    asked: list[str] = []
    pieces = pieces_of(tokenizer, asked)
    for _ in range(2):
        pieces(text_of([("user", "Hi")]), False)
        asked.clear()
        pieces(text_of([("user", "Hi")]), True)
        assert asked == [text_of([("user", "Hi")])]


def test_what_is_kept_is_bounded(tokenizer: Tokenizer) -> None:
    pieces = pieces_of(tokenizer, most_tokens=1000)
    for number in range(500):
        pieces(text_of([("user", f"{number} boats and some more words")]), False)
    assert pieces._pieces is not None
    assert 500 <= len(pieces._pieces) < 1100


def test_pieces_that_are_asked_for_again_stay(tokenizer: Tokenizer) -> None:
    asked: list[str] = []
    pieces = pieces_of(tokenizer, asked, most_tokens=1000)
    system = ("system", "Be short, and say what you know of boats.")
    for number in range(500):
        pieces(text_of([system, ("user", f"{number} boats and some more words")]), False)
    asked.clear()
    pieces(text_of([system]), False)
    assert asked == []


def made(*added: AddedToken, pre_tokenizer: Any = None, normalizer: Any = None) -> Tokenizer:
    """A tokenizer of letters with these added tokens."""
    letters = {letter: i for i, letter in enumerate("abcdefghijklmnopqrstuvwxyz▁<>| ")}
    tokenizer = Tokenizer(models.BPE(vocab=letters, merges=[]))
    if pre_tokenizer is not None:
        tokenizer.pre_tokenizer = pre_tokenizer
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.add_tokens(list(added))
    return tokenizer


def special(content: str, **kind: bool) -> AddedToken:
    return AddedToken(content, special=True, normalized=kind.pop("normalized", False), **kind)


@pytest.mark.parametrize("scheme", ["first", "always", "never"])
def test_a_space_before_words_is_put_where_it_is_put_in_the_whole_text(scheme: Any) -> None:
    tokenizer = made(special("<s>"), pre_tokenizer=pre_tokenizers.Metaspace(prepend_scheme=scheme))
    asked: list[str] = []
    pieces = pieces_of(tokenizer, asked)
    for text in ("a b<s>c d<s> e<s>", "x<s>c d<s> e<s>", "<s>c d<s><s>new", "no boundary"):
        assert pieces(text, False) == tokenizer.encode(text, add_special_tokens=False).ids
    assert "x" in asked  # it was taken apart


def test_a_normalizer_sees_each_piece_as_before() -> None:
    rules = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer = made(special("<s>"), normalizer=rules)
    pieces = pieces_of(tokenizer)
    for text in ("a b<s>c d<s> e<s>", "x<s>c d<s> e<s>", "<s>c d<s><s>"):
        assert pieces(text, False) == tokenizer.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize(
    ("token", "others", "cut"),
    [(special("<s>"), [special("<e>")], True), (special("<s>", lstrip=True), [], False),
     (special("<s>", single_word=True), [], False), (special("<s>", normalized=True), [], False),
     (special("<s>"), [special("<s>b")], False), (special("<s>"), [special("a<")], False),
     (special("<s>"), [special("s>b")], True), (special("<s>", rstrip=True), [], True)],
)  # fmt: skip
def test_a_text_is_cut_only_where_nothing_reaches_over_the_cut(
    token: AddedToken, others: list[AddedToken], cut: bool
) -> None:
    tokenizer = made(token, *others)
    assert may_be_cut_at(token, [each.content for each in (token, *others)]) == cut
    pieces = pieces_of(tokenizer)
    for text in ("a<s>b<s>c", "a <s>b <s> c<s>b", "a<s>bs>ba<s>", "  <s>  <s>"):
        assert pieces(text, False) == tokenizer.encode(text, add_special_tokens=False).ids


def test_without_a_token_between_messages_texts_stay_whole() -> None:
    tokenizer = made()
    asked: list[str] = []
    pieces = pieces_of(tokenizer, asked)
    texts = [f"a b{'c' * number}" for number in range(40)]
    for text in texts:
        pieces(text, False)
    assert asked == texts


def test_threads_that_look_for_the_token_at_the_same_time_do_not_mix_what_they_cut() -> None:
    """One text has more of one token, the other of another."""
    tokenizer = made(special("<s>"), special("<e>"))
    texts = ["<s>a<s>b<s>c<e>a<e>b", "<e>a<e>b<e>c<s>a<s>b"]
    both_look = threading.Barrier(2)
    encode, looked = encode_of(tokenizer), threading.local()

    def meeting(text: str, special: bool) -> list[int]:
        if not getattr(looked, "once", False):
            looked.once = True
            both_look.wait(5)
        return encode(text, special)

    pieces = KnownPieces(meeting, tokenizer.get_added_tokens_decoder())
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(lambda text: pieces(text, False), texts)) == [encode(text, False) for text in texts]
    looked.once = True
    for text in texts:
        assert pieces(text, False) == encode(text, False)
