"""The gate as a front-end sees it that is not the first process: it asks the gate there, and waits for the answer."""

from __future__ import annotations

import asyncio
import itertools
import math
import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import TYPE_CHECKING

from server.hub import messages
from server.policy.backlog import Ticket
from server.policy.forecast import Step
from server.policy.ledger import Held
from server.policy.refusals import Refusal
from server.serving.queue import POSITION_HEADER, WAIT_HEADER, Slot
from server.serving.requests import OpenRequest
from server.telemetry.traces import Traces

if TYPE_CHECKING:
    from server.engine.seams import Demand


class DistantGate:
    """Has the gate's ways of asking. `calm` is what the gate last said of itself."""

    def __init__(
        self, tell: Callable[[messages.Message], None], traces: Traces, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.traces, self.calm = traces, False
        self._tell = tell
        self._clock = clock
        self._numbers = itertools.count(1)
        self._slots: dict[int, DistantSlot] = {}
        self._prefilling: dict[int, DistantSlot] = {}
        self._knocking: dict[int, asyncio.Future[None]] = {}

    def stepped(self, step: Step) -> None:
        """The engine's steps are told to the gate itself."""

    def knock(self, request: OpenRequest, least_prompt_tokens: int) -> Awaitable[None] | None:
        """The cheap question; None where the gate is calm. Awaiting it raises `Overloaded`."""
        request.arrived_s, request.at_gate = self._clock(), 0
        return None if self.calm else self._knock(request, least_prompt_tokens)

    def slot(self, request: OpenRequest, demand: Demand) -> DistantSlot:
        """A place in the engine, for `async with`."""
        return DistantSlot(self, request, demand)

    def enter(self, slot: Slot) -> None:
        """Ask for a place."""
        assert isinstance(slot, DistantSlot)
        request, number = slot.request, next(self._numbers)
        if request.arrived_s is None:
            request.arrived_s = self._clock()
        slot.ticket = Ticket(
            request.tenant.name, request.terms.traffic_class, slot.ask, request.arrived_s, math.inf, number
        )
        slot.granted = asyncio.get_running_loop().create_future()
        slot.demand.progress.on_started = partial(self._started, number)
        self._slots[number] = slot
        self._tell(
            messages.Enter(
                number, request.tenant.name, request.terms, slot.ask, request.arrived_s, request.at_gate,
                request.producing, request.asked_max_tokens,
            )
        )  # fmt: skip
        request.at_gate += not request.producing

    def enter_again(self, slot: Slot, held: Held) -> None:
        """Ask for another place after one was given up."""
        slot.held, slot.granted = None, asyncio.get_running_loop().create_future()
        self._prefilling.pop(held.ticket.number, None)
        used = slot.consumed()
        self._tell(messages.Again(held.ticket.number, used.completion_tokens, used.cached_tokens))

    def leave(self, slot: Slot) -> None:
        """Give back whatever the slot has."""
        if slot.ticket is None or self._slots.pop(slot.ticket.number, None) is None:
            return
        self._prefilling.pop(slot.ticket.number, None)
        slot.held, used = None, slot.consumed()
        self._tell(
            messages.Leave(slot.ticket.number, used.completion_tokens, used.cached_tokens, used.finished)
        )  # fmt: skip

    def streamed(self, slot: DistantSlot) -> None:
        """Only batch work is ever put back, so nothing else is told of."""
        if slot.ticket is not None and slot.ticket.traffic_class == "batch":
            self._tell(messages.Streamed(slot.ticket.number))

    def take_prefilled(self) -> tuple[int, ...]:
        """The requests whose prompts the engine is through with, each of them once."""
        done = tuple(number for number, slot in self._prefilling.items() if slot.prefilled)
        for number in done:
            del self._prefilling[number]
        return done

    def hear(self, message: messages.Any) -> None:
        """Take in the gate's answers."""
        match message:
            case messages.Welcome(number) if number in self._knocking:
                _answer(self._knocking.pop(number))
            case messages.Refused(number) if number in self._knocking:
                _answer(self._knocking.pop(number), message.refusal())
            case messages.Refused(number) if number in self._slots:
                slot = self._slots.pop(number)
                assert slot.granted is not None
                _answer(slot.granted, message.refusal())
            case messages.Queued(number, position) if number in self._slots:
                headers = self._slots[number].request.headers
                headers[POSITION_HEADER] = str(max(position, int(headers.get(POSITION_HEADER, "0"))))
            case messages.Granted(number, waited_s) if number in self._slots:
                self._grant(self._slots[number], waited_s)
            case messages.Evicted(number) if number in self._slots:
                self._slots[number].evict()
            case _:
                pass

    async def _knock(self, request: OpenRequest, least_prompt_tokens: int) -> None:
        number = next(self._numbers)
        self._knocking[number] = answered = asyncio.get_running_loop().create_future()
        self._tell(messages.Knock(number, request.tenant.name, request.terms, least_prompt_tokens))
        try:
            await answered
        finally:
            self._knocking.pop(number, None)

    def _grant(self, slot: DistantSlot, waited_s: float) -> None:
        ticket, ask = slot.ticket, slot.ask
        assert ticket is not None
        assert slot.granted is not None
        slot.held = Held(ticket, 0, ask.sequences, ask.prompt_tokens, self._clock())
        self._prefilling[ticket.number] = slot
        slot.request.headers[WAIT_HEADER] = f"{waited_s:.3f}"
        slot.request.headers.setdefault(POSITION_HEADER, "0")
        slot.request.figures.waited(waited_s)
        _answer(slot.granted)

    def _started(self, number: int, engine_request_id: str) -> None:
        self._tell(messages.Started(number, engine_request_id))


class DistantSlot(Slot):
    """One engine request's place, which the gate in the first process holds for it."""

    def __init__(self, gate: DistantGate, request: OpenRequest, demand: Demand) -> None:
        super().__init__(gate, request, demand)
        self.demand = demand
        self._distant = gate

    def streamed(self) -> None:
        super().streamed()
        self._distant.streamed(self)

    def evict(self) -> None:
        """The gate wants the place back. What the client has seen some of stays, which the gate is about to hear."""
        if self.held is not None and not self.held.streamed:
            self.held.evicted = True
            self.give_up()

    def _enter_again(self) -> None:
        assert self.held is not None
        self._distant.enter_again(self, self.held)


def _answer(asked: asyncio.Future[None], refusal: Refusal | None = None) -> None:
    if asked.done():
        return
    if refusal is None:
        asked.set_result(None)
    else:
        asked.set_exception(refusal)
