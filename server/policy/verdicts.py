"""What the gate answers, and what it is told of a request that has left."""

from dataclasses import dataclass

from server.policy.backlog import Ticket
from server.policy.ledger import Held


@dataclass(frozen=True, slots=True)
class Enqueue:
    """It waits, with so many requests before it."""

    ticket: Ticket
    position: int
    wait_s: float


@dataclass(frozen=True, slots=True)
class Admit:
    """It may go to the engine now."""

    held: Held


@dataclass(frozen=True, slots=True)
class Shed:
    """It is not served: the first token would come after `wait_s`, and the deadline is `patience_s`."""

    wait_s: float
    patience_s: float
    hopeless: bool
    ticket: Ticket | None = None


@dataclass(frozen=True, slots=True)
class Consumed:
    """What the engine did for a request, in tokens. `finished`: it came to its own end."""

    completion_tokens: int = 0
    cached_tokens: int = 0
    finished: bool = False
