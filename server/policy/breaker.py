"""A circuit breaker as values: after some failures in a row it opens, and lets one trial through now and then."""

from dataclasses import dataclass, replace
from typing import Final

_MOST_DOUBLINGS: Final = 16


@dataclass(frozen=True, slots=True)
class BreakerRules:
    """Opens after `failures` in a row; the pause before a trial doubles with every trial that fails."""

    failures: int = 3
    first_pause_s: float = 2.0
    longest_pause_s: float = 60.0


@dataclass(frozen=True, slots=True)
class Breaker:
    """`opened_at_s` None: closed. `trial` is true while one request tries whether things are well again."""

    rules: BreakerRules = BreakerRules()
    failures: int = 0
    opened_at_s: float | None = None
    trial: bool = False

    @property
    def closed(self) -> bool:
        return self.opened_at_s is None

    @property
    def pause_s(self) -> float:
        """From the last failure to the next trial."""
        doublings = min(max(self.failures - self.rules.failures, 0), _MOST_DOUBLINGS)
        return min(self.rules.first_pause_s * 2.0**doublings, self.rules.longest_pause_s)

    def allows(self, now_s: float) -> bool:
        """Whether a request may pass now."""
        if self.opened_at_s is None:
            return True
        return not self.trial and now_s - self.opened_at_s >= self.pause_s

    def passed(self) -> "Breaker":
        """After a request was let through: an open breaker waits for how it ends."""
        return self if self.closed else replace(self, trial=True)

    def succeeded(self) -> "Breaker":
        return Breaker(self.rules)

    def failed(self, now_s: float) -> "Breaker":
        failures = self.failures + 1
        opens = not self.closed or failures >= self.rules.failures
        return Breaker(self.rules, failures, now_s if opens else None)

    def abandoned(self) -> "Breaker":
        """After a request that was let through ended without telling anything, such as a client that left."""
        return replace(self, trial=False)
