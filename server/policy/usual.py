"""What comes usually, learnt from what came."""

from dataclasses import dataclass, field
from typing import Final

from server.policy.tenants import TrafficClass
from server.policy.terms import TRAFFIC_CLASSES

_USUAL_WEIGHT: Final = 0.05
_LEAST_SHARE: Final = 0.1


@dataclass(slots=True)
class Usual:
    """What comes usually: how long the answers of `asks` may be, and how much of what is let in is of which class."""

    max_tokens: float = 0.0
    asks: int = 0
    shares: dict[TrafficClass, float] = field(default_factory=lambda: dict.fromkeys(TRAFFIC_CLASSES, 0.0))
    favoured: float = 0.0  # of the default ones, those that used little and went in before their class

    def asked(self, max_tokens: int) -> None:
        self.asks += 1
        weight = max(_USUAL_WEIGHT, 1 / self.asks)
        self.max_tokens += weight * (max_tokens - self.max_tokens)

    def admitted(self, traffic_class: TrafficClass, *, favoured: bool) -> None:
        for name in self.shares:
            self.shares[name] += _USUAL_WEIGHT * ((name == traffic_class) - self.shares[name])
        self.favoured += _USUAL_WEIGHT * (favoured - self.favoured)

    def share_left_to(self, traffic_class: TrafficClass, *, favoured: bool) -> float:
        """The part of all places that is not taken by those who go before a request, however long it waits already."""
        above = TRAFFIC_CLASSES[: TRAFFIC_CLASSES.index(traffic_class)]
        taken = sum(self.shares[name] for name in above)
        if traffic_class == "default" and not favoured:
            taken += self.favoured
        return max(_LEAST_SHARE, 1.0 - taken)
