"""Made-up traffic with the shape of published traces: who asks when, for how long an answer, with how long a prompt.

Lengths are lognormal. Their medians are those of Azure's conversation trace (1,020 prompt and 129 answer tokens: Patel
et al., "Splitwise", ISCA 2024); their spread gives them long tails, as that trace and Mooncake's have (Qin et al., FAST
2025: prompts of 7,590 tokens on average, answers of 182). Both are scaled down to what a CPU can serve: prompts to an
eighth, answers to a quarter.
Bursts come from gamma distributed gaps, which fit production arrivals (Wang et al., "BurstGPT", 2024).
"""

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

_PROMPT_MEDIAN: Final = 1020
_PROMPT_SIGMA: Final = 0.8
_ANSWER_MEDIAN: Final = 129
_ANSWER_SIGMA: Final = 0.7
_SCALE: Final = 0.125
_MAX_PROMPT_TOKENS: Final = 1200
_MAX_ANSWER_TOKENS: Final = 160
_LEAST_ANSWER_TOKENS: Final = 4
_WORDS: Final = ("tide", "gate", "river", "boat", "lock", "stone", "wind", "rope", "north", "lamp", "storm", "depth")


@dataclass(frozen=True, slots=True)
class Caller:
    """A tenant of the benchmark. `share` of the arrivals are its own; `key` is what it sends to servers that ask."""

    name: str
    traffic_class: str
    share: float
    key: str | None = None


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request: when it comes (seconds from the start), whose it is, and how long it is in words and tokens."""

    at_s: float
    caller: Caller
    prompt_words: int
    max_tokens: int
    seed: int

    def body(self, model: str) -> dict[str, Any]:
        """A streamed chat whose answer is as long as it may be."""
        words = random.Random(self.seed)
        text = " ".join(words.choices(_WORDS, k=self.prompt_words))
        return {
            "model": model,
            "messages": [{"role": "user", "content": f"{self.seed}: {text}"}],
            "max_tokens": self.max_tokens,
            "ignore_eos": True,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }


@dataclass(frozen=True, slots=True)
class Traffic:
    """Requests per second for so many seconds. `burstiness` is the coefficient of variation of the gaps; 1: Poisson."""

    rate_per_s: float
    duration_s: float
    callers: Sequence[Caller]
    seed: int
    burstiness: float = 1.0

    def arrivals(self) -> list[Arrival]:
        """The same ones for the same traffic."""
        return list(self._arrivals())

    def _arrivals(self) -> Iterator[Arrival]:
        chance = random.Random(self.seed)
        shape = 1 / self.burstiness**2
        shares = [caller.share for caller in self.callers]
        at_s, number = 0.0, 0
        while (at_s := at_s + chance.gammavariate(shape, 1 / (self.rate_per_s * shape))) < self.duration_s:
            number += 1
            yield lengths(chance, at_s, chance.choices(self.callers, shares)[0], self.seed * 100_000 + number)


def lengths(chance: random.Random, at_s: float, caller: Caller, seed: int) -> Arrival:
    """A request of random length."""
    prompt = chance.lognormvariate(math.log(_PROMPT_MEDIAN * _SCALE), _PROMPT_SIGMA)
    answer = chance.lognormvariate(math.log(_ANSWER_MEDIAN * 2 * _SCALE), _ANSWER_SIGMA)
    return Arrival(
        at_s=at_s,
        caller=caller,
        prompt_words=max(1, min(round(prompt), _MAX_PROMPT_TOKENS)),
        max_tokens=max(_LEAST_ANSWER_TOKENS, min(round(answer), _MAX_ANSWER_TOKENS)),
        seed=seed,
    )
