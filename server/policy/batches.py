"""What a batch is: its states and their legal moves, its counts, and what becomes of a line that was refused."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Final, Literal

from server.policy.refusals import (
    Draining,
    GenerationFailed,
    NotReady,
    Overloaded,
    RateLimited,
    Refusal,
    StoreUnavailable,
)

Status = Literal["validating", "failed", "in_progress", "finalizing", "completed", "expired", "cancelling", "cancelled"]
Ending = Literal["completed", "expired", "cancelled", "failed"]

# OpenAI's states. A batch that expires is finalized first: the lines that did not run are named in its error file.
MOVES: Final[Mapping[Status, frozenset[Status]]] = MappingProxyType(
    {
        "validating": frozenset({"failed", "in_progress", "cancelling"}),
        "in_progress": frozenset({"finalizing", "cancelling", "failed"}),
        "finalizing": frozenset({"completed", "expired", "failed"}),
        "cancelling": frozenset({"cancelled"}),
        "failed": frozenset(),
        "completed": frozenset(),
        "expired": frozenset(),
        "cancelled": frozenset(),
    }
)
ENDPOINTS: Final = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/embeddings")
COMPLETION_WINDOW_S: Final = 24 * 3600

# Lines that wait at the gate, so that a gap is filled at once. How many run is for the gate to say.
LINES_WAITING: Final = 8
# Bounds the memory that lines take where no gate holds them back; far more than an engine runs at a time.
MOST_LINES_IN_FLIGHT: Final = 1024

_FIRST_WAIT_S: Final = 1.0
_LONGEST_WAIT_S: Final = 60.0
_JITTER: Final = 0.25
# A line that was in the engine at two failures of it is not tried a third time.
_MOST_FAILURES: Final = 2
_WAITED_OUT: Final = (Draining, NotReady, Overloaded, RateLimited, StoreUnavailable)


class IllegalMove(Exception):
    """A batch cannot go from the one state to the other."""


@dataclass(frozen=True, slots=True)
class BatchError:
    """Why a batch failed, as OpenAI lists it. `line` counts from 1."""

    code: str
    message: str
    line: int | None = None
    param: str | None = None


@dataclass(frozen=True, slots=True)
class Counts:
    """Lines by what became of them. `failed` holds those that never ran, too, once a batch has ended."""

    total: int = 0
    completed: int = 0
    failed: int = 0


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of the answered lines."""

    input_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    reasoning_tokens: int = 0

    def __add__(self, other: "Usage") -> "Usage":
        return Usage(
            self.input_tokens + other.input_tokens,
            self.cached_tokens + other.cached_tokens,
            self.output_tokens + other.output_tokens,
            self.reasoning_tokens + other.reasoning_tokens,
        )


NO_USAGE: Final = Usage()


@dataclass(frozen=True, slots=True)
class Outputs:
    """The files that a batch writes. They are named before the first line runs, so that a restart finds them."""

    output_file_id: str
    error_file_id: str
    expire_after_s: int | None = None


@dataclass(frozen=True, slots=True)
class Batch:
    """One batch. Times are Unix seconds; `times` holds when each state was entered.

    `folder` is the data folder that holds its files. `end_user` is whom a trusted tenant sent it for.
    `output_file_id` and `error_file_id` are set when it has ended and the files hold something.
    """

    id: str
    tenant: str
    input_file_id: str
    endpoint: str
    created_at: int
    expires_at: int
    folder: str
    outputs: Outputs
    status: Status = "validating"
    ends_as: Ending | None = None
    end_user: str | None = None
    metadata: Mapping[str, str] | None = None
    model: str | None = None
    times: Mapping[str, int] = field(default_factory=dict)
    counts: Counts = Counts()
    usage: Usage = NO_USAGE
    errors: tuple[BatchError, ...] = ()
    output_file_id: str | None = None
    error_file_id: str | None = None

    @property
    def ended(self) -> bool:
        return not MOVES[self.status]


def moved(batch: Batch, status: Status, now_s: float) -> Batch:
    """The batch in its next state. Raises `IllegalMove`."""
    if status not in MOVES[batch.status]:
        raise IllegalMove(f"A batch that is {batch.status} cannot become {status}.")
    return replace(batch, status=status, times={**batch.times, status: int(now_s)})


@dataclass(frozen=True, slots=True)
class Record:
    """The refusal is the line's answer."""


@dataclass(frozen=True, slots=True)
class Retry:
    """The line, and every line after it, waits for so long."""

    wait_s: float


def after_refusal(refusal: Refusal, tries: int, jitter: float) -> Record | Retry:
    """What becomes of a line that was refused for the `tries`-th time. `jitter` is random, from 0 to 1.

    A full server and a used-up quota are waited out, however long: the batch has its window. A failure is tried once
    more. Anything else is the line's own fault. How long a server stays full is a forecast, and worth asking again.
    """
    patient = refusal.retry_after_s is not None or isinstance(refusal, _WAITED_OUT)
    failed = isinstance(refusal, GenerationFailed) and refusal.should_retry and tries < _MOST_FAILURES
    if not patient and not failed:
        return Record()
    backoff_s = min(_LONGEST_WAIT_S, _FIRST_WAIT_S * 2.0 ** (min(tries, 16) - 1))
    told_s = refusal.retry_after_s or 0.0
    if isinstance(refusal, Overloaded):
        told_s = min(told_s, _LONGEST_WAIT_S)
    return Retry(max(told_s, backoff_s) * (1 + _JITTER * jitter))


@dataclass(slots=True)
class Pace:
    """How many lines of one batch are with the server: as many as it lets in, and a few at its door."""

    waiting: int = 0
    in_engine: int = 0
    held_until_s: float = 0.0

    def may_offer(self, now_s: float) -> bool:
        """Whether one more line may go to the door."""
        room = self.waiting < LINES_WAITING and self.waiting + self.in_engine < MOST_LINES_IN_FLIGHT
        return room and now_s >= self.held_until_s

    def hold(self, until_s: float) -> None:
        """Offer nothing until then: what turned one line away would turn the next one away."""
        self.held_until_s = max(self.held_until_s, until_s)
