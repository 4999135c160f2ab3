"""The requests of another front-end at the gate of the first process.

Each is a slot of the real gate, so order, shares, deadlines and eviction are the same as for the gate's own requests.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field

from server.hub import messages
from server.policy.refusals import Refusal
from server.policy.tenants import Tenant
from server.serving.queue import Gate, Slot
from server.serving.requests import OpenRequest
from server.telemetry.recent import Happening

Tell = Callable[[messages.Message], None]


class ToldHappenings:
    """Notes in the first process what happens to requests in this one."""

    def __init__(self, tell: Tell) -> None:
        self._tell = tell

    def note(self, happening: Happening) -> None:
        """Tell the first process."""
        self._tell(messages.Happened(**asdict(happening)))


@dataclass(slots=True)
class _Spent:
    """What an engine request has consumed, as far as its front-end has said."""

    prefilled: bool = False
    completion_tokens: int = 0
    cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class _Wanted:
    """What an engine request asks for."""

    prompt_tokens: int
    max_tokens: int
    n: int
    progress: _Spent = field(default_factory=_Spent)


class Guests:
    """One front-end's requests. When its connection ends, `leave_all` gives back whatever they hold."""

    def __init__(self, gate: Gate, tell: Tell) -> None:
        self._gate = gate
        self._tell = tell
        self._slots: dict[int, _GuestSlot] = {}

    @property
    def running(self) -> int:
        """How many of them the engine may be working on."""
        return sum(slot.held is not None for slot in self._slots.values())

    def hear(self, message: messages.Any) -> None:
        """Take in what concerns the gate; a request that is gone by now, refused perhaps, is no mistake."""
        match message:
            case messages.Knock():
                self._knock(message)
            case messages.Enter():
                self._enter(message)
            case messages.Started(number, engine_request_id) if number in self._slots:
                self._slots[number].engine_requests.add(engine_request_id)
            case messages.Streamed(number) if number in self._slots:
                self._slots[number].seen_by_client()
            case messages.Again(number) if number in self._slots:
                self._slots[number].come_again(message)
            case messages.Leave(number) if number in self._slots:
                self._leave(message)
            case _:
                pass

    def prefilled(self, numbers: Iterable[int]) -> None:
        """The engine is through with these requests' prompts."""
        for number in numbers:
            if number in self._slots:
                self._slots[number].spent.prefilled = True

    def leave_all(self) -> list[str]:
        """Give back all that is held, and return the engine's names of what it may still be working on."""
        left, self._slots = self._slots, {}
        for slot in left.values():
            slot.forget()
        for slot in left.values():
            self._gate.leave(slot)
        return [name for slot in left.values() for name in slot.engine_requests]

    def _knock(self, asked: messages.Knock) -> None:
        request = OpenRequest(request_id="", path="", tenant=Tenant(asked.tenant), terms=asked.terms)
        try:
            self._gate.knock(request, asked.least_prompt_tokens)
        except Refusal as refusal:
            self._tell(messages.refused(asked.number, refusal))
        else:
            self._tell(messages.Welcome(asked.number))

    def _enter(self, asked: messages.Enter) -> None:
        request = OpenRequest(
            request_id="",
            path="",
            tenant=Tenant(asked.tenant),
            terms=asked.terms,
            asked_max_tokens=asked.asked_max_tokens,
            producing=asked.producing,
            arrived_s=asked.arrived_s,
            at_gate=asked.at_gate,
        )
        wanted = _Wanted(asked.ask.prompt_tokens, asked.ask.max_tokens, asked.ask.sequences)
        slot = _GuestSlot(self._gate, request, wanted, _Line(asked.number, self._tell, self._slots))
        self._slots[asked.number] = slot
        slot.come()

    def _leave(self, message: messages.Leave) -> None:
        slot = self._slots.pop(message.number)
        slot.forget()
        slot.spent.completion_tokens, slot.spent.cached_tokens = message.completion_tokens, message.cached_tokens
        slot.finished = message.finished
        self._gate.leave(slot)


@dataclass(frozen=True, slots=True)
class _Line:
    """One request's way to the front-end that it came from."""

    number: int
    tell: Tell
    slots: dict[int, _GuestSlot]


class _GuestSlot(Slot):
    """A slot that nobody in this process waits in: what happens to it is told to its front-end."""

    def __init__(self, gate: Gate, request: OpenRequest, wanted: _Wanted, line: _Line) -> None:
        super().__init__(gate, request, wanted)
        self.spent = wanted.progress
        self.engine_requests: set[str] = set()
        self._at = gate
        self._line = line
        self._told = False

    def come(self) -> None:
        """Enter the gate."""
        try:
            self._at.enter(self)
        except Refusal as refusal:
            self._refuse(refusal)
        else:
            self._follow()

    def come_again(self, message: messages.Again) -> None:
        """Its front-end has taken it out of the engine: wait for another place, in front."""
        held = self.held
        if held is None:
            return
        self.spent.completion_tokens, self.spent.cached_tokens = message.completion_tokens, message.cached_tokens
        self._at.leave(self)
        self.engine_requests.clear()
        self.spent.completion_tokens, self.spent.cached_tokens, self.spent.prefilled = 0, 0, False
        self._at.enter_again(self, held)
        self._follow()

    def seen_by_client(self) -> None:
        """It stays where it is, also if it was told to go while its first output was on the way."""
        if self.held is not None:
            self.held.streamed, self.held.evicted = True, False

    def give_up(self) -> None:
        """Told to its front-end, after the grant if that has not been told yet."""
        self._tell_grant()
        self._line.tell(messages.Evicted(self._line.number))

    def forget(self) -> None:
        """Whatever comes of its wait is nothing to anybody any more."""
        if self.granted is not None and not self.granted.done():
            self.granted.cancel()
        self._told = True

    def _follow(self) -> None:
        self._told = False
        if self.granted is None:
            self._tell_grant()
            return
        self.granted.add_done_callback(self._settled)
        if self.held is None:
            self._line.tell(messages.Queued(self._line.number, int(self.request.headers["x-queue-position"])))

    def _settled(self, granted: asyncio.Future[None]) -> None:
        if granted.cancelled() or granted is not self.granted:
            return
        error = granted.exception()
        if isinstance(error, Refusal):
            self._refuse(error)
        else:
            self._tell_grant()

    def _tell_grant(self) -> None:
        if not self._told and self.held is not None:
            self._told = True
            waited_s = max(0.0, self.held.admitted_s - (self.request.arrived_s or self.held.admitted_s))
            self._line.tell(messages.Granted(self._line.number, waited_s))

    def _refuse(self, refusal: Refusal) -> None:
        if self._line.slots.pop(self._line.number, None) is not None:
            self._line.tell(messages.refused(self._line.number, refusal))
