"""How much of the KV cache a request is promised, and how much of it each class may take."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final

from server.policy.tenants import TrafficClass

# The share of the engine that a class may fill. What is above a class's share is room kept for the classes before it.
CLASS_SHARES: Final[Mapping[TrafficClass, float]] = {"critical": 1.0, "default": 0.9, "batch": 0.6}
# A cache that is promised to its last block leaves none for the growth that was estimated too low.
KV_SHARE: Final = 0.95

# After SGLang's new-token ratio: begin careful, grow bolder while nothing is preempted, start over when something is.
_FIRST_GROWTH: Final = 0.7
_LEAST_GROWTH: Final = 0.1
_DECAY_STEPS: Final = 600
_DECAY: Final = (_FIRST_GROWTH - _LEAST_GROWTH) / _DECAY_STEPS
_USE_WEIGHT: Final = 0.05
# Clients that name no cap could take the whole window. Until answers have shown how long they are, nobody is expected
# to write more than this.
_LONG_ANSWER_TOKENS: Final = 1024


@dataclass(frozen=True, slots=True)
class Capacity:
    """What an engine can hold: KV tokens (usable ones), the size of a KV block, and sequences at a time."""

    kv_tokens: int
    block_tokens: int
    max_running: int

    def kv_limit(self, traffic_class: TrafficClass) -> int:
        """KV tokens that may be promised while a request of this class is let in."""
        return int(CLASS_SHARES[traffic_class] * KV_SHARE * self.kv_tokens)

    def in_blocks(self, tokens: float) -> int:
        """Tokens rounded up to whole blocks."""
        return -(-int(tokens + 0.999999) // self.block_tokens) * self.block_tokens


@dataclass(frozen=True, slots=True)
class Ask:
    """What one engine request asks for, in tokens. `sequences` is OpenAI's `n`."""

    prompt_tokens: int
    max_tokens: int
    sequences: int = 1


@dataclass(frozen=True, slots=True)
class Growth:
    """The share of their `max_tokens` that requests are expected to use.

    `ratio` falls from 0.7 to 0.1 over 600 engine steps without a preemption and is 0.7 again after one. `used` is what
    finished requests did use, weighted by their caps: where clients know their lengths, nothing is gained by hoping.
    """

    ratio: float = _FIRST_GROWTH
    used: float | None = None

    @property
    def expected(self) -> float:
        return max(self.ratio, self.used or 0.0)

    @property
    def usual(self) -> float:
        """What an answer of the usual kind will use, hoping for nothing."""
        return self.used if self.used is not None else self.ratio

    def tokens(self, max_tokens: float, sequences: float = 1) -> float:
        """What is expected of answers that may have so many tokens in all."""
        hoped = min(self.ratio * max_tokens, _LONG_ANSWER_TOKENS * sequences)
        return max(hoped, (self.used or 0.0) * max_tokens)

    def stepped(self, preemptions: int) -> "Growth":
        """After one engine step."""
        ratio = _FIRST_GROWTH if preemptions else max(_LEAST_GROWTH, self.ratio - _DECAY)
        return self if ratio == self.ratio else Growth(ratio, self.used)

    def finished(self, completion_tokens: int, max_tokens: int, mean_max_tokens: float) -> "Growth":
        """After a request that could have used `max_tokens`; `mean_max_tokens` is the usual cap."""
        if max_tokens <= 0:
            return self
        used = min(1.0, completion_tokens / max_tokens)
        weight = min(1.0, _USE_WEIGHT * max_tokens / max(mean_max_tokens, 1.0))
        return replace(self, used=used if self.used is None else self.used + weight * (used - self.used))


def reservation(ask: Ask, growth: Growth, capacity: Capacity) -> int:
    """KV tokens to promise: `ceil_block(prompt + growth.tokens(max_tokens)) * n`."""
    return capacity.in_blocks(ask.prompt_tokens + growth.tokens(ask.max_tokens)) * ask.sequences


def exceeds_cache(ask: Ask, capacity: Capacity) -> bool:
    """Whether several answers at their full length have no room beside each other, even with one prompt for all."""
    return ask.sequences > 1 and ask.prompt_tokens + ask.sequences * ask.max_tokens > capacity.kv_tokens
