"""How soon a first token and how fast the next ones should come: set by the operator, or learnt from the machine."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Final, Literal

from server.policy.tenants import TrafficClass

# The classes that somebody waits for.
InteractiveClass = Literal["critical", "default"]
# Unset objectives are these multiples of what an unloaded engine does.
_TTFT_FACTOR: Final = 5.0
_TPOT_FACTOR: Final = 2.0
# But not below what a person takes: attention lasts ten seconds (Nielsen, "Usability Engineering", 1993). Running
# fewer streams for a better pace costs throughput, and nobody asked for that: unset, the pace only
# keeps an overloaded engine from standing still.
_LEAST_TTFT_S: Final = 10.0
_LEAST_TPOT_S: Final = 1.0
# An engine that was too slow to be measured at the start is a slow one.
_UNKNOWN_TTFT_S: Final = 60.0
_UNKNOWN_TPOT_S: Final = 1.0
# No number of streams is small enough for a pace that one stream alone does not have.
_POSSIBLE_TPOT_FACTOR: Final = 1.5
# A stream's steps alone say what the engine can do after so many of them.
_TELLING_STEPS: Final = 20
_ALONE_WEIGHT: Final = 0.05
# Batch work fills gaps. Ten minutes are the timeout of OpenAI's clients for their `flex` tier.
_BATCH_TTFT_S: Final = 600.0


@dataclass(frozen=True, slots=True)
class Unloaded:
    """What an engine did with nothing else to do: seconds to a first token, seconds per further token, and prompt
    tokens per second."""

    ttft_s: float
    tpot_s: float
    prefill_tokens_per_s: float


@dataclass(slots=True)
class Alone:
    """The pace of a stream that has the engine for itself, over so many steps in a row."""

    itl_s: float = 0.0
    steps: int = 0

    def stepped(self, unloaded: Unloaded | None, itl_s: float | None, *, alone: bool) -> Unloaded | None:
        """What is known of the unloaded engine after a step: a start in a slow moment of the machine says too much."""
        if not alone or itl_s is None:
            self.steps = 0
            return unloaded
        self.steps += 1
        self.itl_s += max(_ALONE_WEIGHT, 1 / self.steps) * (itl_s - self.itl_s)
        if unloaded is None or self.steps < _TELLING_STEPS or self.itl_s >= unloaded.tpot_s:
            return unloaded
        return replace(unloaded, tpot_s=self.itl_s)


@dataclass(frozen=True, slots=True)
class Objectives:
    """Service level objectives by class; what is not in a mapping is learnt."""

    ttft_s: Mapping[TrafficClass, float] = field(default_factory=dict)
    tpot_s: Mapping[InteractiveClass, float] = field(default_factory=dict)

    def ttft(self, traffic_class: TrafficClass, unloaded: Unloaded | None) -> float:
        """Seconds that a request of this class may take to its first token."""
        if (chosen := self.ttft_s.get(traffic_class)) is not None:
            return chosen
        if traffic_class == "batch":
            return _BATCH_TTFT_S
        return max(_LEAST_TTFT_S, _TTFT_FACTOR * unloaded.ttft_s) if unloaded else _UNKNOWN_TTFT_S

    def tpot(self, unloaded: Unloaded | None) -> float:
        """Seconds per token that every stream should see: the strictest of the classes that have an objective, or what
        the engine can do at all."""
        if self.tpot_s:
            possible_s = _POSSIBLE_TPOT_FACTOR * unloaded.tpot_s if unloaded else 0.0
            return max(possible_s, min(self.tpot_s.values()))
        return max(_LEAST_TPOT_S, _TPOT_FACTOR * unloaded.tpot_s) if unloaded else _UNKNOWN_TPOT_S

    def tpot_beside_batches(self, unloaded: Unloaded | None) -> float:
        """Seconds per token that batches have to leave to everyone else: without floors, since they can wait."""
        asked_or_usual_s = self.tpot(unloaded)
        return asked_or_usual_s if self.tpot_s or unloaded is None else _TPOT_FACTOR * unloaded.tpot_s
