"""What the front-ends of one server tell one another. `number` is the front-end's own for one engine request."""

import msgspec

from server.policy.forecast import StepPart
from server.policy.refusals import InvalidRequest, Overloaded, Refusal
from server.policy.reservations import Ask
from server.policy.terms import Terms


class Message(msgspec.Struct, array_like=True, tag=True, gc=False):
    """One message, in either direction."""


class Hello(Message):
    """A front-end's first word; `index` counts from 1, the first process being 0."""

    index: int
    pid: int


class Serving(Message):
    """A front-end has begun to accept connections."""


class Knock(Message):
    """Would such a request surely be refused? Answered by `Welcome` or `Refused`."""

    number: int
    tenant: str
    terms: Terms
    least_prompt_tokens: int


class Enter(Message):
    """A request wants a place in the engine. Times are moments of the machine's monotonic clock."""

    number: int
    tenant: str
    terms: Terms
    ask: Ask
    arrived_s: float
    at_gate: int
    producing: bool
    asked_max_tokens: int | None


class Started(Message):
    """The engine is given a part of a request, under this name."""

    number: int
    engine_request_id: str


class Streamed(Message):
    """The client has the first of it: it can no longer be put back."""

    number: int


class Again(Message):
    """A request has given its place up, and waits for another one; what the engine did for it is lost, and was done."""

    number: int
    completion_tokens: int = 0
    cached_tokens: int = 0


class Leave(Message):
    """A request is over, or waits no longer; what the engine did for it."""

    number: int
    completion_tokens: int = 0
    cached_tokens: int = 0
    finished: bool = False


class Stepped(Message):
    """What one engine step was for this front-end's requests.

    `scheduled` is the engine's own account of the step, which it gives to one front-end; `prefilled` are the requests
    whose prompt it is through with.
    """

    part: StepPart
    scheduled: bytes | None = None
    engine_index: int = 0
    prefilled: tuple[int, ...] = ()


class Happened(Message):
    """A refusal or a cut, for the operator's console."""

    kind: str
    code: str
    route: str
    tenant: str
    status: int
    detail: str
    request_id: str


class Figures(Message):
    """A front-end's metrics, and how many requests it has open."""

    snapshot: bytes
    open_requests: int


class Adapter(msgspec.Struct, array_like=True):
    """A LoRA adapter under the number that the engine knows it by."""

    name: str
    path: str
    number: int


class State(Message):
    """What every request is treated by. `calm`: nobody waits and there is room, so that no request is refused early."""

    level: int = 0
    by_hand: bool = False
    calm: bool = False
    adapters: tuple[Adapter, ...] = ()


class Engine(Message):
    """An engine serves, and where it expects this front-end. `blueprint` is the engine room's own."""

    epoch: int
    input_address: str
    output_address: str
    blueprint: bytes


class EngineGone(Message):
    """The engine of this epoch is dead."""

    epoch: int


class Welcome(Message):
    """A `Knock` is not refused."""

    number: int


class Queued(Message):
    """A request waits, at this position."""

    number: int
    position: int


class Granted(Message):
    """A request has its place, after so long."""

    number: int
    waited_s: float


class Refused(Message):
    """A request has no place, and what its client is told."""

    number: int
    kind: str
    message: str
    param: str | None
    retry_after_s: float | None
    should_retry: bool

    def refusal(self) -> Refusal:
        """The refusal as it was raised."""
        kind = InvalidRequest if self.kind == InvalidRequest.__name__ else Overloaded
        return kind(
            self.message, param=self.param, retry_after_s=self.retry_after_s, should_retry=self.should_retry
        )  # fmt: skip


class Evicted(Message):
    """A request is to give its place up, unless its client has seen some of it."""

    number: int


class GiveFigures(Message):
    """Answered by `Figures`."""


class Reload(Message):
    """Read the declared tenants again."""


class Stop(Message):
    """Drain and end; sent again, end without waiting. `because` is told to requests that find no engine any more."""

    at_once: bool = False
    because: str | None = None


Any = (
    Hello | Serving | Knock | Enter | Started | Streamed | Again | Leave | Stepped | Happened | Figures | State
    | Engine | EngineGone | Welcome | Queued | Granted | Refused | Evicted | GiveFigures | Reload | Stop
)  # fmt: skip


def refused(number: int, refusal: Refusal) -> Refused:
    """A refusal for the front-end whose request it is."""
    return Refused(
        number, type(refusal).__name__, refusal.message, refusal.param, refusal.retry_after_s, refusal.should_retry
    )
