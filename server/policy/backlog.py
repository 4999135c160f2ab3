"""The requests that wait, in the order in which they are served: by class, by tenant in fair turns, then by age."""

from bisect import bisect_right, insort
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

from server.policy.fairness import TokenCounters
from server.policy.reservations import Ask
from server.policy.tenants import TrafficClass
from server.policy.terms import TRAFFIC_CLASSES

Place = tuple[bool, int, int]

_NO_LINES: Final[dict[str, "_Line"]] = {}


@dataclass(eq=False, slots=True)
class Ticket:
    """One engine request that waits or runs. `cost` are its expected weighted tokens, for its tenant's counter.

    `deadline_s` is the last moment at which starting it makes sense. `returned`: it ran already and was put back.
    `offline`: it is a line of a batch.
    """

    tenant: str
    traffic_class: TrafficClass
    ask: Ask
    arrived_s: float
    deadline_s: float
    number: int
    priority: int = 0
    cost: float = 0.0
    returned: int = 0
    offline: bool = False

    @property
    def place(self) -> Place:
        """Its place in its tenant's own line."""
        return (not self.returned, self.priority, self.number)


@dataclass(slots=True)
class Ahead:
    """What is served before a request: requests, their sequences, and their tokens."""

    requests: float = 0.0
    sequences: float = 0.0
    prompt_tokens: float = 0.0
    max_tokens: float = 0.0

    def add(self, line: "_Line", share: float) -> None:
        """Add this share of a line."""
        self.requests += share * len(line.tickets)
        self.sequences += share * line.sequences
        self.prompt_tokens += share * line.prompt_tokens
        self.max_tokens += share * line.max_tokens


@dataclass(slots=True)
class _Line:
    """One tenant's waiting requests of one class, and their sums."""

    tickets: list[Ticket] = field(default_factory=list)
    sequences: int = 0
    prompt_tokens: int = 0
    max_tokens: int = 0
    cost: float = 0.0

    def change(self, ticket: Ticket, sign: int) -> None:
        ask = ticket.ask
        self.sequences += sign * ask.sequences
        self.prompt_tokens += sign * ask.prompt_tokens
        self.max_tokens += sign * ask.max_tokens * ask.sequences
        self.cost += sign * ticket.cost

    def up_to(self, priority: int) -> "_Line":
        """The part of the line before a new request of this priority."""
        if not self.tickets or self.tickets[-1].priority <= priority:
            return self
        part = _Line([ticket for ticket in self.tickets if ticket.returned or ticket.priority <= priority])
        for ticket in part.tickets:
            part.change(ticket, 1)
        return part

    def head(self, *, newest_first: bool) -> Ticket:
        """What is next in this line. Put-back work stays in front, and a client's own order is kept."""
        first = self.tickets[0]
        if not newest_first or first.returned:
            return first
        same_priority = bisect_right(self.tickets, first.priority, key=lambda ticket: ticket.priority)
        return self.tickets[same_priority - 1]


class Backlog:
    """Everything that waits. The counters are shared with what runs."""

    def __init__(self, counters: TokenCounters) -> None:
        self._counters = counters
        self._lines: dict[TrafficClass, dict[str, _Line]] = {}
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[Ticket]:
        for lines in self._lines.values():
            for line in lines.values():
                yield from line.tickets

    def size(self, traffic_class: TrafficClass) -> int:
        """How many of a class wait."""
        return sum(len(line.tickets) for line in self._lines.get(traffic_class, _NO_LINES).values())

    def waiting_of(self, tenant: str) -> int:
        """How many of a tenant wait, in any class."""
        return sum(len(lines[tenant].tickets) for lines in self._lines.values() if tenant in lines)

    def all_tenants(self) -> set[str]:
        """Who waits, in any class."""
        return {name for lines in self._lines.values() for name in lines}

    def tenants(self, traffic_class: TrafficClass) -> list[str]:
        """Who waits in a class."""
        return list(self._lines.get(traffic_class, _NO_LINES))

    def longest(self, traffic_class: TrafficClass) -> str:
        """Who has most waiting in a class; an empty name where nobody waits."""
        lines = self._lines.get(traffic_class, _NO_LINES)
        return max(lines, key=lambda tenant: lines[tenant].cost, default="")

    def first_class(self) -> TrafficClass | None:
        """The highest class in which somebody waits."""
        return next((name for name in TRAFFIC_CLASSES if self._lines.get(name)), None)

    def add(self, ticket: Ticket) -> None:
        self.welcome(ticket.tenant)
        lines = self._lines.setdefault(ticket.traffic_class, {})
        line = lines.setdefault(ticket.tenant, _Line())
        insort(line.tickets, ticket, key=lambda waiting: waiting.place)
        line.change(ticket, 1)
        self._size += 1

    def remove(self, ticket: Ticket) -> None:
        """Take out a ticket that waits."""
        lines = self._lines[ticket.traffic_class]
        line = lines[ticket.tenant]
        line.tickets.remove(ticket)
        line.change(ticket, -1)
        if not line.tickets:
            del lines[ticket.tenant]
        self._size -= 1

    def welcome(self, tenant: str) -> None:
        """Lift the counter of a tenant that is about to wait and did not before."""
        if tenant not in (waiting := self.all_tenants()):
            self._counters.arrived(tenant, waiting)

    def head(self, traffic_class: TrafficClass, tenants: list[str], *, newest_first: bool) -> Ticket:
        """Who of these tenants, all of which wait in the class, is next."""
        line = self._lines[traffic_class][self._counters.next_of(tenants)]
        return line.head(newest_first=newest_first)

    def ahead_of(self, traffic_class: TrafficClass, tenant: str, priority: int = 0) -> Ahead:
        """What a new request of this tenant would have before it, served oldest first.

        Higher classes as a whole; of its own class what fair turns serve before its turn comes; of its own line what
        its client did not put behind it.
        """
        ahead = Ahead()
        for name in TRAFFIC_CLASSES[: TRAFFIC_CLASSES.index(traffic_class)]:
            for line in self._lines.get(name, _NO_LINES).values():
                ahead.add(line, 1.0)
        lines = self._lines.get(traffic_class, _NO_LINES)
        own = lines[tenant].up_to(priority) if tenant in lines else _Line()
        ahead.add(own, 1.0)
        own_turn = self._counters[tenant] + own.cost
        for other, line in lines.items():
            if other != tenant:
                gap = own_turn - self._counters[other]
                ahead.add(line, min(1.0, gap / line.cost) if line.cost > 0 < gap else float(gap > 0))
        return ahead
