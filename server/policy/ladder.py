"""The degradation ladder: which level the server stands on, as values. Times are seconds on any steady clock.

The rule: up one level when the pressure was above 1 for 2 s, down one when it was below 0.5 for 15 s, and at least
5 s on each level. Pressure is the predicted wait for a first token, divided by what was promised for it. An
operator's pin overrules it until it ends.
"""

import math
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Final


class Level(IntEnum):
    """Each level does what those below it do, and more."""

    NORMAL = 0
    ECONOMY = 1
    SHORT_CONTEXT = 2
    ESSENTIAL = 3
    FALLBACK = 4
    CLOSED = 5


DESCRIPTIONS: Final = {
    Level.NORMAL: "normal",
    Level.ECONOMY: "economy: shorter answers, one choice, no logprobs, no beam search",
    Level.SHORT_CONTEXT: "short context: half of the context window for the history",
    Level.ESSENTIAL: "essential: no batch work",
    Level.FALLBACK: "fallback: new requests go to the fallback upstream",
    Level.CLOSED: "closed: requests are refused",
}


@dataclass(frozen=True, slots=True)
class LadderRules:
    """`highest` is the highest level that pressure alone may reach. Pressures are ratios, the rest seconds.

    A sample counts for the time since the one before it, and for `longest_sample_s` at most: after a pause nobody knows
    how long the pressure was as it is now, and a moment must not count like a second.
    """

    highest: Level = Level.ESSENTIAL
    up_pressure: float = 1.0
    up_after_s: float = 2.0
    down_pressure: float = 0.5
    down_after_s: float = 15.0
    dwell_s: float = 5.0
    smoothing_s: float = 1.0
    longest_sample_s: float = 0.3


@dataclass(frozen=True, slots=True)
class Ladder:
    """Where pressure has led. `high_since_s` and `low_since_s` are since when it is above and below the thresholds."""

    level: Level = Level.NORMAL
    since_s: float = -math.inf
    seen_at_s: float | None = None
    pressure: float = 0.0
    high_since_s: float | None = None
    low_since_s: float | None = None


def at_rest(ladder: Ladder, rules: LadderRules) -> bool:
    """Whether the ladder stands at its foot, and nothing draws it up or is still to be forgotten."""
    return ladder.level == Level.NORMAL and ladder.pressure < rules.down_pressure


def step(ladder: Ladder, pressure: float, now_s: float, rules: LadderRules) -> Ladder:
    """The ladder after one more sample of the pressure; it moves by one level at most."""
    smooth = _smoothed(ladder, pressure, now_s, rules)
    high = _since(ladder.high_since_s, smooth > rules.up_pressure, now_s)
    low = _since(ladder.low_since_s, smooth < rules.down_pressure, now_s)
    seen = replace(ladder, seen_at_s=now_s, pressure=smooth, high_since_s=high, low_since_s=low)
    if now_s - ladder.since_s < rules.dwell_s:
        return seen
    if high is not None and now_s - high >= rules.up_after_s and ladder.level < rules.highest:
        return replace(seen, level=Level(ladder.level + 1), since_s=now_s, high_since_s=now_s)
    if low is not None and now_s - low >= rules.down_after_s and ladder.level > Level.NORMAL:
        return replace(seen, level=Level(ladder.level - 1), since_s=now_s, low_since_s=now_s)
    return seen


def _smoothed(ladder: Ladder, pressure: float, now_s: float, rules: LadderRules) -> float:
    """An exponential average whose weight follows the time that the sample counts for, whatever the rate of samples."""
    if ladder.seen_at_s is None:
        return pressure
    sample_s = min(max(now_s - ladder.seen_at_s, 0.0), rules.longest_sample_s)
    keep = math.exp(-sample_s / rules.smoothing_s)
    return keep * ladder.pressure + (1 - keep) * pressure


def _since(since_s: float | None, holds: bool, now_s: float) -> float | None:
    if not holds:
        return None
    return now_s if since_s is None else since_s


@dataclass(frozen=True, slots=True)
class Pin:
    """A level that an operator chose, why, who, and for how much longer."""

    level: Level
    reason: str
    by: str
    ttl_s: float


def effective(ladder: Ladder, pin: Pin | None) -> Level:
    """A pin overrules pressure."""
    return ladder.level if pin is None else pin.level


def with_engine_state(level: Level, *, engine_down: bool, has_fallback: bool) -> Level:
    """An engine that is down sends everything to the fallback; without a fallback, level 4 is no more than level 3."""
    if has_fallback:
        return max(level, Level.FALLBACK) if engine_down else level
    return Level.ESSENTIAL if level == Level.FALLBACK else level
