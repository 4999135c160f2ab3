"""When to look again, for whatever looks now and then.

All of it looks on the same beats of the clock, so that an idle process wakes up a few times a second and not once for
each: a wake-up costs more than what is done in it.
"""

import asyncio
from typing import Final

# A timer may be early by a moment; the beat it was for is over then.
_EARLY: Final = 0.1


def until_beat(interval_s: float) -> float:
    """Seconds until the next multiple of `interval_s` on the loop's clock, but for one that is all but there."""
    left_s = interval_s - asyncio.get_running_loop().time() % interval_s
    return left_s if left_s > _EARLY * interval_s else left_s + interval_s
