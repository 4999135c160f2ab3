"""How many sequences may run at once so that each still gets its tokens in time.

The time per output token (TPOT) grows with the number that share a step. Where the KV cache is large for the machine's
speed, as on a CPU, memory never says stop, so the step time has to: additive increase, multiplicative decrease
(Chiu and Jain, 1989), with a multiplicative start as in TCP.
"""

from dataclasses import dataclass, replace
from typing import Final

_FIRST_CAP: Final = 8
# A few streams share a step for hardly more than one takes, as it reads the weights once for all of them. Fewer places
# would not make anybody fast, but everybody wait.
_LEAST_CAP: Final = 3
# While it still grows by itself, this many times the limit will soon be allowed.
_HOPE: Final = 4
_ITL_WEIGHT: Final = 0.1
# One stalled step says nothing about how many streams fit: it counts as this many objectives at most.
_MOST_ITL: Final = 2.0
# Shares of the objective: above the first the cap is lowered, below the second there is room for one more. A cap whose
# mean lies at the objective itself would let half of the streams miss it; at 0.75 a few in a hundred do.
_HIGH_WATER: Final = 0.75
_LOW_WATER: Final = 0.65
# And this much of them while somebody runs whose pace is not to suffer at all.
_CAREFUL: Final = 0.93
_DECREASE: Final = 0.8
_FAR_BELOW: Final = 0.5  # of the objective: below it growth is multiplicative again
_GROWTH: Final = 1.5
# A limit that nobody reaches grows, and falls again as soon as a crowd comes: what a crowd had lately says more.
_USUAL_WEIGHT: Final = 0.02
_REACHED: Final = 0.7
# A change shows in the mean only after some steps; changing it again before would overshoot.
_SETTLE_STEPS: Final = 8


@dataclass(frozen=True, slots=True)
class RunningCap:
    """`limit` sequences at a time, `itl_s` the smoothed time between two tokens of a stream.

    It stays between `least` and `most`. `starting` until the objective was passed for the first time. `usual` is the
    limit that those had lately who came near it.
    """

    limit: int
    most: int
    least: int = 1
    itl_s: float = 0.0
    starting: bool = True
    steps_to_settle: int = 0
    usual: float = 0.0

    @classmethod
    def up_to(cls, most: int, *, asked: bool = True) -> "RunningCap":
        """For an engine that runs `most` at a time. A pace that was not `asked` for is no reason to begin with few, or
        to end with fewer than a few."""
        most = max(1, most)
        few = min(_FIRST_CAP, most)
        return (
            cls(limit=few, most=most, least=min(_LEAST_CAP, most))
            if asked
            else cls(limit=most, most=most, least=few, starting=False)
        )

    @property
    def soon(self) -> int:
        """What is to be expected within seconds, if the pace allows it."""
        if self.starting:
            return min(_HOPE * self.limit, self.most)
        return max(1, min(self.limit, round(self.usual))) if self.usual else self.limit

    def stepped(
        self, itl_s: float | None, running: int, tpot_slo_s: float, *, wanted: bool, careful: bool = False
    ) -> "RunningCap":
        """After one engine step whose streams waited `itl_s` for their tokens (None: it had no stream).

        `wanted`: somebody would have run but for the limit. One that stops nobody is not raised, and one that is not
        yet obeyed is not lowered again: what runs over it has to end first. Where fewer than half of it run, it is not
        what makes them slow. `careful`: a critical one is among them, and the aim is lower.
        """
        smoothed = self.itl_s
        if itl_s is not None:
            counted_s = min(itl_s, _MOST_ITL * tpot_slo_s)
            smoothed = smoothed + _ITL_WEIGHT * (counted_s - smoothed) if smoothed else counted_s
        usual = self.usual or float(self.limit)
        if running >= _REACHED * min(self.limit, usual):
            usual += _USUAL_WEIGHT * (self.limit - usual)
        to_settle = max(0, self.steps_to_settle - 1)
        # By its positions: `replace` looks at every field of it, in every step.
        cap = RunningCap(self.limit, self.most, self.least, smoothed, self.starting, to_settle, usual)
        if to_settle:
            return cap
        aim_s = (_CAREFUL if careful else 1.0) * tpot_slo_s
        if smoothed > _HIGH_WATER * aim_s and running <= self.limit <= 2 * running:
            return cap._limited(int(_DECREASE * min(self.limit, running)), starting=False)
        if smoothed < _LOW_WATER * aim_s and wanted:
            fast = self.starting or smoothed < _FAR_BELOW * aim_s
            raised = int(self.limit * _GROWTH) + 1 if fast else self.limit + 1
            return cap._limited(raised, starting=self.starting)
        return cap

    def _limited(self, limit: int, *, starting: bool) -> "RunningCap":
        limit = max(self.least, min(limit, self.most))
        return replace(self, limit=limit, starting=starting, steps_to_settle=_SETTLE_STEPS)
