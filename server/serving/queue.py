"""The gate in front of the engine: asyncio around the decisions of `server/policy/admission.py`.

Everything that is held or waits is known to one `Admission`, and changes in single steps between two awaits, so a
request that is cancelled anywhere leaves nothing behind.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from types import TracebackType
from typing import TYPE_CHECKING, Final, Protocol

import structlog

from server.policy.admission import Admission
from server.policy.backlog import Ticket
from server.policy.forecast import Step, retry_after_s
from server.policy.ledger import Held
from server.policy.objectives import Unloaded
from server.policy.refusals import InvalidRequest, Overloaded
from server.policy.reservations import Ask, Capacity, exceeds_cache
from server.policy.terms import Terms
from server.policy.verdicts import Consumed, Shed
from server.serving.requests import OpenRequest
from server.telemetry.admission import AdmissionMetrics
from server.telemetry.traces import Traces

if TYPE_CHECKING:
    from server.engine.seams import Demand

log = structlog.get_logger(__name__)

POSITION_HEADER: Final = "x-queue-position"
WAIT_HEADER: Final = "x-queue-wait"
_LOOK_AGAIN_S: Final = 0.5
_TIMER_RESOLUTION_S: Final = 0.01  # an event loop's timer may be early by some milliseconds
# A call of many prompts is taken or refused by its first one. The others may take their time, and let other calls of
# the same tenant pass.
_PATIENCE_OF_THE_REST_S: Final = 3600.0


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What the gate takes from outside: a clock in seconds that never jumps, random numbers from 0 to 1, traces."""

    clock: Callable[[], float] = time.monotonic
    jitter: Callable[[], float] = random.random
    traces: Traces = field(default_factory=Traces)


class Spent(Protocol):
    """What an engine request has consumed so far."""

    @property
    def prefilled(self) -> bool: ...

    @property
    def completion_tokens(self) -> int: ...

    @property
    def cached_tokens(self) -> int: ...


class Wanted(Protocol):
    """What an engine request asks for."""

    @property
    def prompt_tokens(self) -> int: ...

    @property
    def max_tokens(self) -> int: ...

    @property
    def n(self) -> int: ...

    @property
    def progress(self) -> Spent: ...


class Places(Protocol):
    """Where slots come from, and what they tell."""

    @property
    def traces(self) -> Traces: ...

    def enter(self, slot: Slot) -> None:
        """Begin to wait, or go in at once."""
        ...

    def enter_again(self, slot: Slot, held: Held) -> None:
        """Wait again, in front, after a place was given up."""
        ...

    def leave(self, slot: Slot) -> None:
        """Give back whatever the slot has."""
        ...


class Gate:
    """Lets requests in to the engine, in fair order and no more than it can serve in time."""

    def __init__(
        self, admission: Admission, metrics: AdmissionMetrics, surroundings: Surroundings | None = None
    ) -> None:
        self.admission = admission
        self._metrics = metrics
        around = surroundings or Surroundings()
        self.clock, self._jitter, self.traces = around.clock, around.jitter, around.traces
        self._waiting: dict[int, Slot] = {}
        self._running: dict[int, Slot] = {}
        self._prefilling: dict[int, Slot] = {}
        self._closed_s: float | None = None
        metrics.watch(admission, self.clock)

    def open(self, capacity: Capacity, unloaded: Unloaded | None) -> None:
        """An engine of this capacity serves from now on."""
        if self._closed_s is not None:
            self.admission.postpone(self.clock() - self._closed_s)
            self._closed_s = None
        self.admission.open(capacity, unloaded)
        log.info(
            "gate open",
            kv_tokens=capacity.kv_tokens,
            max_running=capacity.max_running,
            ttft_slo_s=round(self.admission.objectives.ttft("default", unloaded), 3),
            tpot_slo_s=round(self.admission.objectives.tpot(unloaded), 4),
            unloaded=None if unloaded is None else asdict(unloaded),
        )
        self._let_in()

    def close(self) -> None:
        """The engine is gone: what waits goes on waiting until the next `open`, and its deadline waits as well."""
        self.admission.close()
        self._closed_s = self.clock()

    def stepped(self, step: Step) -> None:
        """Take in the figures of one engine step."""
        for slot in tuple(self._prefilling.values()):
            if slot.held is not None and slot.prefilled:
                self.admission.prefilled(slot.held)
                del self._prefilling[slot.held.ticket.number]
        # The engine does not tell of a pause that began with a client leaving: its next step seems to have taken it.
        busy_s = self.clock() - self.admission.ledger.busy_since_s
        self.admission.stepped(step if step.duration_s <= busy_s else replace(step, duration_s=busy_s))
        self._metrics.stepped(step)
        if self._waiting:
            self._let_in()

    @property
    def pressure(self) -> float:
        """The predicted wait for a first token in units of its objective."""
        return self.admission.pressure(self.clock())

    @property
    def calm(self) -> bool:
        """Whether the cheap question need not be asked."""
        return self.admission.calm

    def knock(self, request: OpenRequest, least_prompt_tokens: int) -> None:
        """The cheap question before anything is tokenized. Raises `Overloaded` for what would surely be refused."""
        request.arrived_s, request.at_gate = (now_s := self.clock()), 0
        ask, tenant = Ask(least_prompt_tokens, 0), request.tenant.name
        self.admission.backlog.welcome(tenant)
        if (shed := self.admission.refuses(request.terms, tenant, ask, 0.0, now_s)) is not None:
            raise self._refusal(shed, request, "door")

    def slot(self, request: OpenRequest, demand: Demand) -> Slot:
        """A place in the engine, for `async with`: entering waits for it. Raises `Overloaded` and `InvalidRequest`."""
        return Slot(self, request, demand)

    def enter(self, slot: Slot) -> None:
        """Begin to wait, or go in at once."""
        request, ask, now_s = slot.request, slot.ask, self.clock()
        self._refuse_impossible(request, ask)
        if request.arrived_s is None:
            request.arrived_s = now_s
        if request.producing:
            self._put_in(slot, self.admission.rush(request.tenant.name, request.terms, ask, now_s))
            return
        verdict = self.admission.arrive(_terms(request), request.tenant.name, ask, request.arrived_s, now_s)
        if isinstance(verdict, Shed):
            raise self._refusal(verdict, request, "arrival")
        self._queue(slot, verdict.ticket)
        self._let_in()
        if slot.held is None:
            position = max(verdict.position, int(request.headers.get(POSITION_HEADER, "0")))
            request.headers[POSITION_HEADER] = str(position)

    def enter_again(self, slot: Slot, held: Held) -> None:
        """Wait again, in front, after a place was given up."""
        self._queue(slot, self.admission.put_back(held, self.clock()))
        self._let_in()

    def leave(self, slot: Slot) -> None:
        """Give back whatever the slot has: its place in the queue, or in the engine."""
        if slot.timer is not None:
            slot.timer.cancel()
        if slot.ticket is not None and self._waiting.pop(slot.ticket.number, None) is not None:
            self.admission.leave(slot.ticket)
        if slot.held is not None:
            self._running.pop(slot.held.ticket.number, None)
            self._prefilling.pop(slot.held.ticket.number, None)
            self.admission.release(slot.held, slot.consumed(), self.clock())
            slot.held = None
        if self._waiting:
            self._let_in()

    def expire(self, slot: Slot) -> None:
        """The last moment at which starting this one made sense has passed, or was postponed."""
        early = slot.ticket is not None and slot.ticket.deadline_s > self.clock() + _TIMER_RESOLUTION_S
        if self._closed_s is not None or early:
            slot.timer = asyncio.get_running_loop().call_later(_LOOK_AGAIN_S, self.expire, slot)
        elif slot.ticket is not None and self._waiting.pop(slot.ticket.number, None) is not None:
            self.admission.leave(slot.ticket)
            self._turn_away(slot, self.admission.expired(slot.ticket, self.clock()))

    def _queue(self, slot: Slot, ticket: Ticket) -> None:
        loop = asyncio.get_running_loop()
        slot.ticket, slot.granted = ticket, loop.create_future()
        self._waiting[ticket.number] = slot
        slot.timer = loop.call_later(max(0.0, ticket.deadline_s - self.clock()), self.expire, slot)

    def _let_in(self) -> None:
        while (verdict := self.admission.next(self.clock())) is not None:
            if isinstance(verdict, Shed):
                assert verdict.ticket is not None
                self._turn_away(self._waiting.pop(verdict.ticket.number), verdict)
            else:
                self._put_in(self._waiting.pop(verdict.held.ticket.number), verdict.held)
        for held in self.admission.victims():
            self._metrics.evicted()
            self._running[held.ticket.number].give_up()

    def _put_in(self, slot: Slot, held: Held) -> None:
        slot.held = held
        self._running[held.ticket.number] = self._prefilling[held.ticket.number] = slot
        waited_s = max(0.0, held.admitted_s - (slot.request.arrived_s or held.admitted_s))
        slot.request.headers[WAIT_HEADER] = f"{waited_s:.3f}"
        slot.request.headers.setdefault(POSITION_HEADER, "0")
        slot.request.figures.waited(waited_s)
        self._metrics.admitted(held.ticket.traffic_class, waited_s)
        if slot.timer is not None:
            slot.timer.cancel()
        if slot.granted is not None and not slot.granted.done():
            slot.granted.set_result(None)

    def _turn_away(self, slot: Slot, shed: Shed) -> None:
        if slot.timer is not None:
            slot.timer.cancel()
        if slot.granted is not None and not slot.granted.done():
            slot.granted.set_exception(self._refusal(shed, slot.request, "queue"))

    def _refuse_impossible(self, request: OpenRequest, ask: Ask) -> None:
        capacity = self.admission.capacity
        if capacity is None or request.asked_max_tokens is None or not exceeds_cache(ask, capacity):
            return
        raise InvalidRequest(
            f"n times max_tokens is more than this server's memory holds: {ask.prompt_tokens} prompt tokens and "
            f"{ask.sequences} answers of {ask.max_tokens} tokens each, of at most {capacity.kv_tokens} tokens. "
            "Ask for fewer or shorter answers.",
            param="n",
        )

    def _refusal(self, shed: Shed, request: OpenRequest, where: str) -> Overloaded:
        after_s = retry_after_s(shed.wait_s, self._jitter())
        self._metrics.refused(request.terms.traffic_class, where)
        return Overloaded(
            f"The server is busy: an answer would begin in about {max(1, round(shed.wait_s))} s, and requests like "
            f"this one wait at most {shed.patience_s:.3g} s. Please try again in {max(1, round(after_s))} s.",
            retry_after_s=after_s,
            should_retry=not shed.hopeless,
        )


def _terms(request: OpenRequest) -> Terms:
    """The terms of the next engine request of a call."""
    request.at_gate += 1
    if request.at_gate == 1:
        return request.terms
    return replace(request.terms, timeout_s=_PATIENCE_OF_THE_REST_S, priority=request.terms.priority + 1)


class Slot:
    """One engine request's place, from the queue into the engine and out.

    `finished` is set by whoever saw the engine's last output.
    """

    def __init__(self, gate: Places, request: OpenRequest, demand: Wanted) -> None:
        self.request = request
        self.ask = Ask(demand.prompt_tokens, demand.max_tokens, demand.n)
        self.ticket: Ticket | None = None
        self.held: Held | None = None
        self.granted: asyncio.Future[None] | None = None
        self.timer: asyncio.TimerHandle | None = None
        self.finished = False
        self._gate = gate
        self._progress = demand.progress
        self._consumer: asyncio.Task[object] | None = None

    async def __aenter__(self) -> Slot:
        with self._gate.traces.part("queue"):
            self._gate.enter(self)
            await self._until_granted()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._gate.leave(self)

    async def release(self) -> None:
        """Stop waiting, told from outside: vLLM leaves the tasks of several prompts behind."""
        if self.granted is not None and not self.granted.done():
            self._gate.leave(self)
            self.granted.cancel()

    def consumed(self) -> Consumed:
        """What the engine did for it."""
        return Consumed(self._progress.completion_tokens, self._progress.cached_tokens, self.finished)

    @property
    def prefilled(self) -> bool:
        """Whether the engine is through with the prompt."""
        return self._progress.prefilled

    def streamed(self) -> None:
        """The client gets the first of it: from now on it can no longer be put back."""
        if self.held is not None:
            self.held.streamed = True

    def give_up(self) -> None:
        """Interrupt whoever waits for this request's first output."""
        if self._consumer is not None:
            self._consumer.cancel()

    def gave_up(self) -> bool:
        """Whether a cancellation was `give_up`, and nobody else's; then it is taken back."""
        if self.held is None or not self.held.evicted or self._consumer is None:
            return False
        return self._consumer.uncancel() == 0

    async def wait_again(self) -> None:
        """After `gave_up`: give the place back, and wait for another one in front of the queue."""
        with self._gate.traces.part("queue"):
            self._enter_again()
            await self._until_granted()

    def _enter_again(self) -> None:
        held = self.held
        assert held is not None
        self._gate.leave(self)
        self._gate.enter_again(self, held)

    async def _until_granted(self) -> None:
        self._consumer = asyncio.current_task()
        if self.granted is None or self.granted.done():
            return
        self.request.running.add(self)
        try:
            await self._granted()
        except BaseException:
            self._gate.leave(self)
            raise
        finally:
            self.request.running.discard(self)

    async def _granted(self) -> None:
        """Wait for the place. It may be given up again in the moment between the grant and this task's turn."""
        while self.granted is not None:
            try:
                return await self.granted
            except asyncio.CancelledError:
                if not self.gave_up():
                    raise
                self._enter_again()
        return None
