"""When an engine is taken for hung, and when a dead one is built again. Times are seconds on any steady clock."""

from dataclasses import dataclass, replace
from typing import Final

# A process that spends this share of a core is computing; one that waits or is stopped spends none.
_COMPUTING_SHARE: Final = 0.5
# A step of a large prompt on a small machine may be long, but not endless.
_PATIENCE_WITH_COMPUTING: Final = 10


@dataclass(frozen=True, slots=True)
class RestartRules:
    """A dead engine is built again at once; after a restart that failed, with growing pauses.

    `max_failures` failed restarts in a row end the process, so that a service manager acts. An engine that has
    requests and makes no step for `hang_timeout_s` is taken for hung.
    """

    hang_timeout_s: float = 30.0
    first_pause_s: float = 1.0
    longest_pause_s: float = 30.0
    max_failures: int = 5

    def pause_s(self, failures: int) -> float:
        """How long to wait before the next try after so many failures in a row."""
        return 0.0 if failures == 0 else min(self.first_pause_s * 2 ** (failures - 1), self.longest_pause_s)

    def gives_up(self, failures: int) -> bool:
        return failures >= self.max_failures


@dataclass(frozen=True, slots=True)
class Pulse:
    """What can be seen of an engine at one moment.

    `steps` counts the steps it has reported, `unfinished` the requests it has. `computing_s` is the processor time
    its processes have used, where that tells a long step from a hang (the CPU engine); None where it does not.
    """

    steps: int
    unfinished: int
    asleep: bool = False
    computing_s: float | None = None


@dataclass(frozen=True, slots=True)
class HangWatch:
    """How long an engine has had work and made no step, as seen by looking at it every `interval_s`.

    A look that comes late adds no more than two intervals: a machine that was suspended has not hung its engine.
    """

    timeout_s: float
    interval_s: float
    pulse: Pulse
    looked_at_s: float
    stalled_s: float = 0.0

    def look(self, pulse: Pulse, now_s: float) -> "HangWatch":
        """The watch after one more look; `pulse` of the last look that saw a sign of life is kept."""
        if pulse.steps != self.pulse.steps or pulse.unfinished == 0 or pulse.asleep:
            return replace(self, pulse=pulse, looked_at_s=now_s, stalled_s=0.0)
        passed_s = min(now_s - self.looked_at_s, 2 * self.interval_s)
        return replace(self, looked_at_s=now_s, stalled_s=self.stalled_s + passed_s)

    def is_hung(self, pulse: Pulse) -> bool:
        """Whether the engine is to be ended."""
        if self.stalled_s < self.timeout_s:
            return False
        if pulse.computing_s is None or self.pulse.computing_s is None:
            return True
        used_s = pulse.computing_s - self.pulse.computing_s
        return used_s < _COMPUTING_SHARE * self.stalled_s or self.stalled_s >= _PATIENCE_WITH_COMPUTING * self.timeout_s
