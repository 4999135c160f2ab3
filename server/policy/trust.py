"""How far a forecast of the wait is trusted."""

from dataclasses import dataclass, field
from typing import Final

from server.policy.tenants import TrafficClass
from server.policy.terms import TRAFFIC_CLASSES

# Who is refused late has waited for nothing, and a forecast is a forecast.
_MOST: Final = 0.7
_LEAST: Final = 0.3
_BROKEN_FACTOR: Final = 0.8
_KEPT: Final = 0.002


@dataclass(slots=True)
class Trust:
    """The part of a deadline that a forecast may use up, by class.

    It follows the forecasts' own mistakes, which a standing overload makes more of: a part that was right for a burst
    lets in too many then, and one that is right then refuses what a burst would have seen served. At rest one in
    fifty or so of those who were let in is one who waited in vain.
    """

    _shares: dict[TrafficClass, float] = field(default_factory=lambda: dict.fromkeys(TRAFFIC_CLASSES, _MOST))

    def share(self, traffic_class: TrafficClass) -> float:
        """The part of a deadline that a request of this class may be told to wait."""
        return self._shares[traffic_class]

    def kept(self, traffic_class: TrafficClass) -> None:
        """Somebody came in before the deadline."""
        self._shares[traffic_class] = min(_MOST, self._shares[traffic_class] + _KEPT)

    def broken(self, traffic_class: TrafficClass) -> None:
        """Somebody waited in vain."""
        self._shares[traffic_class] = max(_LEAST, self._shares[traffic_class] * _BROKEN_FACTOR)
