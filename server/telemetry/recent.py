"""What was refused and what was shortened lately, in memory and bounded, for the operator who asks why.

Nothing of a prompt or an answer is kept.
"""

import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final, Literal, Protocol

Kind = Literal["refusal", "truncation"]

_LONGEST_DETAIL: Final = 300


@dataclass(frozen=True, slots=True)
class Happening:
    """What happened to a request. `code` is the error's code or the kind of edit, `tenant` empty if unknown."""

    kind: Kind
    code: str
    route: str
    tenant: str
    status: int
    detail: str
    request_id: str


@dataclass(frozen=True, slots=True)
class Entry:
    """The last of what happened `count` times. Times are Unix seconds."""

    last: Happening
    count: int
    first_s: float
    last_s: float


class Notes(Protocol):
    """Where happenings are noted."""

    def note(self, happening: Happening) -> None: ...


class RecentHappenings:
    """The latest of each kind. What repeats is one entry with a count, so that a flood pushes out nothing else."""

    def __init__(self, capacity: int = 100, clock: Callable[[], float] = time.time) -> None:
        self._capacity = capacity
        self._clock = clock
        self._kept: dict[Kind, OrderedDict[tuple[str, str, str], Entry]] = {
            "refusal": OrderedDict(),
            "truncation": OrderedDict(),
        }

    def note(self, happening: Happening) -> None:
        """Keep it; the oldest goes when there are too many."""
        kept, now_s = self._kept[happening.kind], self._clock()
        what = (happening.code, happening.tenant, happening.route)
        happening = replace(happening, detail=happening.detail[:_LONGEST_DETAIL])
        known = kept.pop(what, None)
        kept[what] = Entry(
            happening, 1 if known is None else known.count + 1, now_s if known is None else known.first_s, now_s
        )
        if len(kept) > self._capacity:
            kept.popitem(last=False)

    def latest(self, kind: Kind) -> list[Entry]:
        """Newest first."""
        return list(reversed(self._kept[kind].values()))
