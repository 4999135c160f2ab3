"""What a load test asks: made-up chats of several kinds, sent as fast as answers come or at a rate."""

import math
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from benchmarks.load import WORDS


@dataclass(frozen=True, slots=True)
class Profile:
    """One kind of traffic.

    `prompt_words` is the median length of a client's message, and lengths are lognormal with `spread` as their sigma.
    `turns` exchanges stand before it in the history. At most `concurrency` requests are open at a time. `rate_per_s`
    infinite: the next one goes when an answer has come. `burstiness` is the shape of the gamma distributed gaps; 1 is
    Poisson, less comes in bursts.
    """

    says: str
    prompt_words: int
    answer_tokens: int
    requests: int
    concurrency: int | None
    spread: float = 0.6
    turns: int = 0
    rate_per_s: float = math.inf
    burstiness: float = 1.0

    def chats(self, seed: int) -> list[list[dict[str, Any]]]:
        """The messages of each request; another seed gives others, which no prefix cache has seen."""
        chance = random.Random(seed)
        return [self._chat(chance, f"{seed}-{number}") for number in range(self.requests)]

    def _chat(self, chance: random.Random, name: str) -> list[dict[str, Any]]:
        messages: list[dict[str, Any]] = [{"role": "system", "content": f"Chat {name}. Answer briefly."}]
        for _ in range(self.turns):
            messages.append({"role": "user", "content": self._text(chance)})
            messages.append({"role": "assistant", "content": self._text(chance)})
        return [*messages, {"role": "user", "content": f"Tell a story with these words: {self._text(chance)}"}]

    def _text(self, chance: random.Random) -> str:
        count = max(1, round(chance.lognormvariate(math.log(self.prompt_words), self.spread)))
        return " ".join(chance.choices(WORDS, k=count))


PROFILES: Final[Mapping[str, Profile]] = {
    "single": Profile("one person, one chat after the other", 60, 128, requests=8, concurrency=1),
    "chat": Profile("people who chat side by side", 60, 128, requests=64, concurrency=8),
    "long-chat": Profile("histories of thirty exchanges", 60, 128, requests=32, concurrency=4, turns=30),
    "batch": Profile("one client's many short questions at once", 40, 16, requests=256, concurrency=32),
    "burst": Profile(
        "arrivals in bursts, whether earlier ones are answered or not", 60, 64, requests=96, concurrency=None,
        rate_per_s=4.0, burstiness=0.25,
    ),
    "soak": Profile("the same as chat, for long", 60, 64, requests=2000, concurrency=8),
}  # fmt: skip
