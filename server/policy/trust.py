"""How far a forecast of the wait is trusted."""

from dataclasses import dataclass, field
from typing import Final

from server.policy.tenants import TrafficClass
from server.policy.terms import TRAFFIC_CLASSES

# Who is refused late has waited for nothing, and a forecast is a forecast.
_MOST: Final = 0.7
_LEAST: Final = 0.3
# Before who is next stand only those who run, whose ends are known best.
_FIRST: Final = 0.9
_BROKEN_FACTOR: Final = 0.8
_KEPT: Final = 0.002
_RESTED: Final = 0.1
_AT_ONCE: Final = 0.1  # of a deadline: waiting for less is as good as not waiting


@dataclass(slots=True)
class Trust:
    """The part of a deadline that a forecast may use up, by class.

    It follows the forecasts' own mistakes, which a standing overload makes more of: a part that was right for a burst
    lets in too many then, and one that is right then refuses what a burst would have seen served. In the long run one
    in fifty or so of those who were let in is one who waited in vain. Once nobody waits, what was learnt is soon
    forgotten.
    """

    _shares: dict[TrafficClass, float] = field(default_factory=lambda: dict.fromkeys(TRAFFIC_CLASSES, _MOST))

    def share(self, traffic_class: TrafficClass, *, first: bool) -> float:
        """The part of a deadline that a request of this class may be told to wait. `first`: nobody waits before it."""
        return max(_FIRST if first else 0.0, self._shares[traffic_class])

    def kept(self, traffic_class: TrafficClass, used_up: float, *, last: bool) -> None:
        """Somebody came in before the deadline, of which this part was `used_up`. `last`: nobody waits behind."""
        gained = _RESTED if last and used_up < _AT_ONCE else _KEPT
        self._shares[traffic_class] = min(_MOST, self._shares[traffic_class] + gained)

    def broken(self, traffic_class: TrafficClass) -> None:
        """Somebody waited in vain."""
        self._shares[traffic_class] = max(_LEAST, self._shares[traffic_class] * _BROKEN_FACTOR)
