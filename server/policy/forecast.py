"""What the engine's recent steps say about the next seconds: rates, and the wait until a first token."""

from dataclasses import dataclass, replace
from typing import Final

from server.policy.objectives import Unloaded

_RATE_WEIGHT: Final = 0.1
_RESIDENCE_WEIGHT: Final = 0.1
# The first to end are the short ones: so many have to, before what is expected of answers' lengths no longer counts.
_TELLING_ENDS: Final = 16
# Fewer tokens than this, as of prompts that the prefix cache knows, take one step's time however many they are.
_TELLING_TOKENS: Final = 64
# So does what is done in less than so many steps without any prompt: how much more would have fitted, it does not tell.
_TELLING_STEPS: Final = 2
# A prompt that shares its steps with many streams is slow; the mean may not fall so low that a burst looks endless.
_LEAST_RATE_SHARE: Final = 0.1
_MAX_JITTER: Final = 0.25
_LEAST_RETRY_S: Final = 1.0


@dataclass(frozen=True, slots=True)
class Step:
    """One engine step, as the engine reports it.

    `running` and `waiting` count sequences inside the engine after it. `itl_s` is the mean time since the previous
    token of the streams that got one (None: no stream did). `prefilled_tokens` are the computed prompt tokens of the
    requests whose prompt was completed, `cached_tokens` those that were found in the prefix cache; `prefilling` tells
    whether any prompt was worked on. `duration_s` is the time since the previous step, or since there was work.
    """

    running: int
    waiting: int
    kv_usage_ratio: float
    preemptions: int = 0
    itl_s: float | None = None
    prefilled_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    prefilling: bool = False
    duration_s: float = 0.0


@dataclass(frozen=True, slots=True)
class StepPart:
    """What one step was for the requests of one front-end. `gaps_s` is the sum of `gaps` times since a previous token,
    `first_s` the longest time to a first token (None: there was none), `finished` counts requests, the rest is tokens.
    """

    gaps: int = 0
    gaps_s: float = 0.0
    first_s: float | None = None
    finished: int = 0
    preempted: int = 0
    computed: int = 0
    cached: int = 0
    generated: int = 0

    def __add__(self, other: "StepPart") -> "StepPart":
        firsts_s = [first_s for first_s in (self.first_s, other.first_s) if first_s is not None]
        return StepPart(
            gaps=self.gaps + other.gaps,
            gaps_s=self.gaps_s + other.gaps_s,
            first_s=max(firsts_s, default=None),
            finished=self.finished + other.finished,
            preempted=self.preempted + other.preempted,
            computed=self.computed + other.computed,
            cached=self.cached + other.cached,
            generated=self.generated + other.generated,
        )


NO_PART: Final = StepPart()


@dataclass(frozen=True, slots=True)
class Rates:
    """Smoothed rates; 0 where nothing was seen yet. `residence_s`: from admission to the end, of `ended` requests."""

    prefill_tokens: float = 0.0
    prefill_s: float = 0.0
    decode_tokens_per_s: float = 0.0
    residence_s: float = 0.0
    ended: int = 0
    pending_prefill_s: float = 0.0

    def prefill_tokens_per_s(self, unloaded: Unloaded | None) -> float:
        """How fast prompts are worked off, beside whatever else runs; 0 while unknown."""
        at_best = unloaded.prefill_tokens_per_s if unloaded else 0.0
        if not self.prefill_s:
            return at_best
        return max(self.prefill_tokens / self.prefill_s, _LEAST_RATE_SHARE * at_best)

    def stepped(self, step: Step, unloaded: Unloaded | None = None) -> "Rates":
        """After one engine step. Prompts are reported when they are done, and may take several steps."""
        decode = self.decode_tokens_per_s
        if step.duration_s > 0:
            decode += _RATE_WEIGHT * (step.generated_tokens / step.duration_s - decode)
        pending_s = self.pending_prefill_s + step.duration_s if step.prefilling else self.pending_prefill_s
        if not step.prefilled_tokens or not pending_s:
            # By its positions: `replace` looks at every field of it, in every step.
            return Rates(self.prefill_tokens, self.prefill_s, decode, self.residence_s, self.ended, pending_s)
        least_s = _TELLING_STEPS * unloaded.tpot_s if unloaded else 0.0
        if step.prefilled_tokens < _TELLING_TOKENS or pending_s < least_s:
            return replace(self, decode_tokens_per_s=decode, pending_prefill_s=0.0)
        first = not self.prefill_s
        weight = 1.0 if first else _RATE_WEIGHT
        return replace(
            self,
            decode_tokens_per_s=decode,
            prefill_tokens=self.prefill_tokens + weight * (step.prefilled_tokens - self.prefill_tokens),
            prefill_s=self.prefill_s + weight * (pending_s - self.prefill_s),
            pending_prefill_s=0.0,
        )

    def paused(self) -> "Rates":
        """While nothing runs. What was worked on a prompt that was given up counts for no other."""
        return replace(self, pending_prefill_s=0.0) if self.pending_prefill_s else self

    def residence_with(self, expected_s: float) -> float:
        """How long requests stay, if `expected_s` is what their lengths and the pace say."""
        share = max(0.0, 1 - self.ended / _TELLING_ENDS)
        return self.residence_s + share * (expected_s - self.residence_s)

    def released(self, residence_s: float) -> "Rates":
        """After a request that was with the engine for so long."""
        ended = self.ended + 1
        weight = max(_RESIDENCE_WEIGHT, 1 / ended)
        return replace(self, residence_s=self.residence_s + weight * (residence_s - self.residence_s), ended=ended)


def place_wait_s(needed: float, limit: float, residence_s: float) -> float:
    """Seconds until `needed` more units of a full resource are free, if `limit` units turn over in `residence_s`.

    Little's law: of `limit` units that are each held for `residence_s`, `limit / residence_s` are freed every second.
    """
    return max(0.0, needed) * residence_s / max(limit, 1.0)


def retry_after_s(wait_s: float, jitter_ratio: float) -> float:
    """When to come back: the predicted wait and up to a quarter more, so that they do not all come at once.

    `jitter_ratio` is a random number between 0 and 1.
    """
    return max(_LEAST_RETRY_S, wait_s) * (1 + _MAX_JITTER * jitter_ratio)
