"""What comes usually, learnt from what came."""

from dataclasses import dataclass, field
from typing import Final

from server.policy.tenants import TrafficClass
from server.policy.terms import TRAFFIC_CLASSES

_USUAL_WEIGHT: Final = 0.05
_LEAST_SHARE: Final = 0.1


@dataclass(slots=True)
class Usual:
    """What comes usually: how long the answers may be, and how much of what is let in belongs to which class."""

    max_tokens: float = 0.0
    shares: dict[TrafficClass, float] = field(default_factory=lambda: dict.fromkeys(TRAFFIC_CLASSES, 0.0))

    def asked(self, max_tokens: int) -> None:
        weight = _USUAL_WEIGHT if self.max_tokens else 1.0
        self.max_tokens += weight * (max_tokens - self.max_tokens)

    def admitted(self, traffic_class: TrafficClass) -> None:
        for name in self.shares:
            self.shares[name] += _USUAL_WEIGHT * ((name == traffic_class) - self.shares[name])

    def share_left_to(self, traffic_class: TrafficClass) -> float:
        """The part of all places that higher classes do not take before a request of this class has its turn."""
        above = TRAFFIC_CLASSES[: TRAFFIC_CLASSES.index(traffic_class)]
        return max(_LEAST_SHARE, 1.0 - sum(self.shares[name] for name in above))
