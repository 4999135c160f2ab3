"""How near an answer comes to the one that is known: exact match, ROUGE-L and BLEU-4.

BLEU is sacrebleu's. ROUGE-L is the F1 of Lin (2004), "ROUGE: A Package for Automatic Evaluation of Summaries", on the
longest common subsequence that RapidFuzz finds. Both look at the same words: those of sacrebleu's tokenizers, which
also part Chinese, Japanese and Korean, where there are no spaces.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Final

from rapidfuzz.distance import LCSseq
from sacrebleu.metrics.bleu import BLEU

_CHINESE: Final = re.compile(r"[\u4e00-\u9fff]")
_JAPANESE_OR_KOREAN: Final = re.compile(r"[\u3040-\u30ff\uac00-\ud7af]")


@dataclass(frozen=True, slots=True)
class Scores:
    """All from 0 to 1."""

    exact: float
    rouge_l: float
    bleu_4: float


def score(answer: str, reference: str) -> Scores:
    """How near an answer comes to its reference."""
    bleu = _bleu(_tokenizer_for(reference))
    words, known = _words(bleu, answer), _words(bleu, reference)
    return Scores(
        exact=float(answer.split() == reference.split()),
        rouge_l=_rouge_l(words, known),
        bleu_4=bleu.sentence_score(answer, [reference]).score / 100,
    )


def _rouge_l(words: Sequence[str], known: Sequence[str]) -> float:
    if not words or not known:
        return float(words == known)
    common = LCSseq.similarity(words, known)
    return 2 * common / (len(words) + len(known))  # the F1 of common/words and common/known


def _words(bleu: BLEU, text: str) -> list[str]:
    tokenized: str = bleu.tokenizer(text.lower())
    return tokenized.split()


def _tokenizer_for(text: str) -> str:
    """sacrebleu's name for the way in which a text is parted into words."""
    if _JAPANESE_OR_KOREAN.search(text):
        return "char"
    return "zh" if _CHINESE.search(text) else "13a"


@cache
def _bleu(tokenizer: str) -> BLEU:
    return BLEU(tokenize=tokenizer, effective_order=True)  # what sacrebleu advises for single sentences
