"""When a queue is better served from its newest end."""

from dataclasses import dataclass, field

from server.policy.tenants import TrafficClass


@dataclass(slots=True)
class StandingOverload:
    """Adaptive LIFO (Maurer, "Fail at Scale", ACM Queue 2015): under standing overload the newest can still be served
    in time, while the oldest are about to give up.

    Refusing on arrival keeps the queue short enough for its deadlines, so overload alone does not turn the order round.
    It turns when a class has waited without a break for as long as its objective, and requests expire.
    """

    _busy_since_s: dict[TrafficClass, float] = field(default_factory=dict)
    _expired_s: dict[TrafficClass, float] = field(default_factory=dict)

    def waits(self, traffic_class: TrafficClass, now_s: float) -> None:
        """Somebody of this class begins to wait."""
        self._busy_since_s.setdefault(traffic_class, now_s)

    def empty(self, traffic_class: TrafficClass) -> None:
        """Nobody of this class waits any more."""
        self._busy_since_s.pop(traffic_class, None)

    def expired(self, traffic_class: TrafficClass, now_s: float) -> None:
        """Somebody of this class waited for as long as the objective, in vain."""
        self._expired_s[traffic_class] = now_s

    def newest_first(self, traffic_class: TrafficClass, ttft_slo_s: float, now_s: float) -> bool:
        """Whether the class is to be served from its newest end now. Batches never are: they are in no hurry."""
        since_s, expired_s = self._busy_since_s.get(traffic_class), self._expired_s.get(traffic_class)
        if since_s is None or expired_s is None or traffic_class == "batch":
            return False
        return now_s - since_s > ttft_slo_s >= now_s - expired_s
