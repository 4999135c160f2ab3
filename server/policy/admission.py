"""The gate's decisions: who is let in to the engine, who waits, who is told to come back later.

A state machine without a clock: every method takes the time. `server/serving/queue.py` is asyncio around it.
"""

from dataclasses import dataclass, field
from typing import Final

from server.policy.backlog import Backlog, Ticket
from server.policy.fairness import TokenCounters, cost
from server.policy.forecast import Rates, Step, place_wait_s
from server.policy.ledger import MAX_EVICTIONS, Held, Ledger, spared
from server.policy.objectives import Alone, Objectives, Unloaded
from server.policy.reservations import Ask, Capacity, Growth, reservation
from server.policy.room import NOTHING, Room, room_for, whole_engine
from server.policy.running_cap import RunningCap
from server.policy.standing_overload import StandingOverload
from server.policy.tenants import TrafficClass
from server.policy.terms import DEFAULT_TERMS, Terms
from server.policy.trust import Trust
from server.policy.usual import Usual
from server.policy.verdicts import Admit, Consumed, Enqueue, Shed

# The backlog stays with us, where it has an order: in the engine's own queue stand at most this many, or an eighth of
# what may run if that is more.
_ENGINE_QUEUE: Final = 2
_ENGINE_QUEUE_SHARE: Final = 8
# Prompts in the engine take at most so many times the pace of a stream (the TPOT objective), or else one at a time.
_PREFILL_PACES: Final = 2.0
# And this many times as many where nobody asked for a pace: a crowd that comes at once is done sooner side by side.
_UNASKED: Final = 2
# Batches may fill the whole engine when nobody has been there for so long. What they took beyond their share is given
# up when somebody comes, and is lost: the longer the wait, the rarer that is.
_QUIET_S: Final = 60.0
# Clients that name no cap get what the window leaves, and use little of it.
_FIRST_ANSWER_TOKENS: Final = 256
# Where the SLO is missed by this factor, asking again at once is pointless.
_HOPELESS: Final = 3.0
# A prompt that needs long by itself may take twice its own time, whatever the objective is.
_OWN_FACTOR: Final = 2.0
_SMALL: Final = Ask(0, 0)


@dataclass(slots=True)
class Admission:
    """The state of the gate. `capacity` None: there is no engine, and nothing is let in."""

    objectives: Objectives
    capacity: Capacity | None = None
    unloaded: Unloaded | None = None
    cap: RunningCap = field(default_factory=lambda: RunningCap.up_to(1))
    gap_cap: RunningCap = field(default_factory=lambda: RunningCap.up_to(1))  # what batches look at, beside people
    growth: Growth = field(default_factory=Growth)
    rates: Rates = field(default_factory=Rates)
    ledger: Ledger = field(default_factory=Ledger)
    counters: TokenCounters = field(default_factory=TokenCounters)
    backlog: Backlog = field(init=False)
    kv_usage_ratio: float = 0.0
    _engine_waiting: int = 0
    _since_step: int = 0
    _short: set[TrafficClass] = field(default_factory=set)  # whose requests would have run but for their cap
    _numbers: int = 0
    _last_online_s: float = -_QUIET_S
    _usual: Usual = field(default_factory=Usual)
    _overload: StandingOverload = field(default_factory=StandingOverload)
    _trust: Trust = field(default_factory=Trust)
    _alone: Alone = field(default_factory=Alone)

    def __post_init__(self) -> None:
        self.backlog = Backlog(self.counters)

    def open(self, capacity: Capacity, unloaded: Unloaded | None) -> None:
        """A new engine serves. Nothing of the last one's figures holds for it."""
        self.capacity, self.unloaded = capacity, unloaded
        self.cap = RunningCap.up_to(capacity.max_running, asked=bool(self.objectives.tpot_s))
        self.gap_cap = RunningCap.up_to(capacity.max_running)
        self.growth, self.rates = Growth(), Rates()
        self.kv_usage_ratio, self._engine_waiting, self._since_step = 0.0, 0, 0

    def close(self) -> None:
        """The engine is gone; what waits goes on waiting."""
        self.capacity = None

    def postpone(self, seconds: float) -> None:
        """The time without an engine counts against nobody's deadline."""
        for ticket in self.backlog:
            ticket.deadline_s += seconds

    def stepped(self, step: Step) -> None:
        """Take in one engine step."""
        self.growth = self.growth.stepped(step.preemptions)
        self.rates = self.rates.stepped(step, self.unloaded)
        self.kv_usage_ratio = step.kv_usage_ratio
        self._engine_waiting, self._since_step = step.waiting, 0
        running, itl_s = self.ledger.sequences, step.itl_s
        self.unloaded = self._alone.stepped(self.unloaded, itl_s, alone=running == 1)
        slo_s = self.objectives.tpot(self.unloaded)
        wanted, careful = bool(self._short - {"batch"}), self.ledger.critical_sequences > 0
        self.cap = self.cap.stepped(itl_s, running, slo_s, wanted=wanted, careful=careful)
        gap_slo_s = self.objectives.tpot_beside_batches(self.unloaded)
        self.gap_cap = self.gap_cap.stepped(itl_s, running, gap_slo_s, wanted="batch" in self._short)
        self._short.clear()

    def forecast(self, terms: Terms, tenant: str, ask: Ask, now_s: float) -> float:
        """Seconds until a request that came now would have its first token."""
        if self.capacity is None:
            return 0.0
        traffic_class = terms.traffic_class
        if self._is_calm(traffic_class, ask):
            return self._own_s(ask)
        ahead = self.backlog.ahead_of(traffic_class, tenant, terms.priority)
        favoured = self._is_favoured(traffic_class, tenant)
        room = room_for(traffic_class, self._cap_for(traffic_class).soon, self.capacity, favoured=favoured)
        residence_s = self._residence_s(now_s)
        needed = ahead.sequences + min(ask.sequences, room.places) - (room.places - self.ledger.sequences)
        if needed > 0:
            self._short.add(traffic_class)
        tokens = ahead.prompt_tokens + self.growth.tokens(ahead.max_tokens, ahead.sequences)
        tokens += min(reservation(ask, self.growth, self.capacity), room.kv_tokens)
        tokens -= room.kv_tokens - self._promised()
        if max(needed, tokens) > 0:  # it need not wait for what it may drive out
            free = self.ledger.given_up(self._victims_for(traffic_class))
            needed, tokens = needed - free.places, tokens - free.kv_tokens
        wait_s = max(place_wait_s(needed, room.places, residence_s), place_wait_s(tokens, room.kv_tokens, residence_s))
        wait_s /= self._usual.share_left_to(traffic_class, favoured=favoured)
        rate = self.rates.prefill_tokens_per_s(self.unloaded)
        ahead_s = ahead.prompt_tokens / rate if rate else 0.0
        return max(wait_s, ahead_s) + self._own_s(ask)

    def _is_calm(self, traffic_class: TrafficClass, ask: Ask) -> bool:
        """Whether nobody waits, and half of every class's room is free beside this one: nothing is to be worked out."""
        if self.capacity is None or len(self.backlog) or traffic_class == "batch":
            return False
        tokens = self._promised() + (ask.prompt_tokens + ask.max_tokens + self.capacity.block_tokens) * ask.sequences
        return 2 * (self.ledger.sequences + ask.sequences) <= self.cap.soon and 2 * tokens <= self.capacity.kv_tokens

    @property
    def calm(self) -> bool:
        """Whether a small request would be let in without anything worked out."""
        return self._is_calm("default", _SMALL)

    def patience_s(self, terms: Terms, ask: Ask) -> float:
        """Seconds that a request may take to its first token."""
        if terms.timeout_s is not None:
            return terms.timeout_s
        slo_s = self.objectives.ttft(terms.traffic_class, self.unloaded)
        return max(slo_s, _OWN_FACTOR * self._own_s(ask))

    def pressure(self, now_s: float) -> float:
        """The longest predicted wait of a default request in units of its objective: above 1 it would be refused."""
        usual = Ask(0, int(self._usual.max_tokens))
        wait_s = self.forecast(DEFAULT_TERMS, self.backlog.longest("default"), usual, now_s)
        return wait_s / self.objectives.ttft("default", self.unloaded)

    def refuses(self, terms: Terms, tenant: str, ask: Ask, waited_s: float, now_s: float) -> Shed | None:
        """Whether a request that came `waited_s` ago would get its first token too late.

        One that nothing stands before is welcome, unless the client has less patience; so is one that nobody waits for.
        """
        return self._too_late(terms, ask, waited_s, self.forecast(terms, tenant, ask, now_s))

    def _too_late(self, terms: Terms, ask: Ask, waited_s: float, wait_s: float) -> Shed | None:
        if terms.offline:
            return None
        patience_s = self.patience_s(terms, ask)
        nothing_before = wait_s <= self._own_s(ask)
        trusted = self._trust.share(terms.traffic_class, first=not self.backlog.tenants(terms.traffic_class))
        in_time = waited_s + wait_s <= (1.0 if nothing_before else trusted) * patience_s
        if in_time or (nothing_before and terms.timeout_s is None):
            return None
        slo_s = self.objectives.ttft(terms.traffic_class, self.unloaded)
        return Shed(wait_s, patience_s, hopeless=wait_s > _HOPELESS * slo_s)

    def arrive(self, terms: Terms, tenant: str, ask: Ask, arrived_s: float, now_s: float) -> Enqueue | Shed:
        """Put a request into the queue unless it would wait too long there."""
        self._usual.asked(ask.max_tokens)
        if not terms.offline:
            self._last_online_s = now_s
        self.backlog.welcome(tenant)
        wait_s = self.forecast(terms, tenant, ask, now_s)
        if (shed := self._too_late(terms, ask, now_s - arrived_s, wait_s)) is not None:
            return shed
        ahead = self.backlog.ahead_of(terms.traffic_class, tenant, terms.priority)
        self._numbers += 1
        ticket = Ticket(
            tenant=tenant,
            traffic_class=terms.traffic_class,
            ask=ask,
            arrived_s=arrived_s,
            deadline_s=arrived_s + self.patience_s(terms, ask) - self._own_s(ask),
            number=self._numbers,
            priority=terms.priority,
            cost=cost(ask.prompt_tokens, self._expected_completion(ask)),
            offline=terms.offline,
        )
        self._enter(ticket, now_s)
        return Enqueue(ticket, round(ahead.requests) + 1, wait_s)

    def put_back(self, held: Held, now_s: float) -> Ticket:
        """A request that gave its place up waits again, before the others of its tenant."""
        ticket = held.ticket
        ticket.returned += 1
        self._enter(ticket, now_s)
        return ticket

    def leave(self, ticket: Ticket) -> None:
        """A request stopped waiting."""
        self.backlog.remove(ticket)
        if not self.backlog.tenants(ticket.traffic_class):
            self._overload.empty(ticket.traffic_class)

    def next(self, now_s: float) -> Admit | Shed | None:
        """The next decision about what waits; None when all of it has to go on waiting."""
        if self.capacity is None or (name := self.backlog.first_class()) is None:
            return None
        newest_first = self.newest_first(name, now_s)
        tenants = self.backlog.tenants(name)
        ticket = self.backlog.head(name, tenants, newest_first=newest_first)
        if now_s <= ticket.deadline_s and not self._fits(ticket, self._room(ticket, now_s)):
            light = self._light(name, tenants)
            if not light or ticket.tenant in light:
                return None
            ticket = self.backlog.head(name, light, newest_first=newest_first)
            if now_s <= ticket.deadline_s and not self._fits(ticket, self._room(ticket, now_s)):
                return None
        self.leave(ticket)
        return self._admit(ticket, now_s) if now_s <= ticket.deadline_s else self.expired(ticket, now_s)

    def expired(self, ticket: Ticket, now_s: float) -> Shed:
        """What a request is told whose time has run out in the queue."""
        patience_s = ticket.deadline_s - ticket.arrived_s + self._own_s(ticket.ask)
        if patience_s >= self.objectives.ttft(ticket.traffic_class, self.unloaded):
            self._overload.expired(ticket.traffic_class, now_s)
            self._trust.broken(ticket.traffic_class)
        terms = Terms(ticket.traffic_class, priority=ticket.priority)
        wait_s = self.forecast(terms, ticket.tenant, ticket.ask, now_s)
        slo_s = self.objectives.ttft(ticket.traffic_class, self.unloaded)
        return Shed(wait_s, patience_s, wait_s > _HOPELESS * slo_s, ticket)

    def rush(self, tenant: str, terms: Terms, ask: Ask, now_s: float) -> Held:
        """Let in at once what belongs to an answer that has begun: what is begun is finished."""
        self._numbers += 1
        expected = cost(ask.prompt_tokens, self._expected_completion(ask))
        ticket = Ticket(tenant, terms.traffic_class, ask, now_s, now_s, self._numbers, terms.priority, expected)
        return self._admit(ticket, now_s).held

    def prefilled(self, held: Held) -> None:
        """The engine is through with a request's prompt."""
        self.ledger.prefilled(held)

    def release(self, held: Held, consumed: Consumed, now_s: float) -> None:
        """A request is over, however it ended: its tenant is charged what it really used."""
        if not self.ledger.release(held):
            return
        if not self.ledger.sequences:
            self.rates = self.rates.paused()
        if not held.ticket.offline:
            self._last_online_s = now_s
        ask = held.ticket.ask
        used = cost(max(0, ask.prompt_tokens - consumed.cached_tokens), consumed.completion_tokens)
        self.counters.charge(held.ticket.tenant, used - held.ticket.cost)
        if consumed.finished:
            self.rates = self.rates.released(now_s - held.admitted_s)
            most = ask.max_tokens * ask.sequences
            self.growth = self.growth.finished(consumed.completion_tokens, most, self._usual.max_tokens)

    def victims(self) -> list[Held]:
        """Batch work to be aborted and put back, so that the request which waits first can run.

        The caller ends them; their places are free once they are released.
        """
        if self.capacity is None or (name := self.backlog.first_class()) is None:
            return []
        if not (candidates := self._victims_for(name)):
            return []
        ticket = self.backlog.head(name, self.backlog.tenants(name), newest_first=False)
        room, chosen = self._class_room(ticket), list[Held]()
        for held in candidates:
            if self._fits(ticket, room, self.ledger.given_up(())):
                break
            held.evicted = True
            chosen.append(held)
        return chosen if self._fits(ticket, room, self.ledger.given_up(())) else spared(chosen)

    def _victims_for(self, traffic_class: TrafficClass) -> list[Held]:
        """What a request may drive out: a critical one any batch work, other people's what it has beyond its share."""
        if self.capacity is None or traffic_class == "batch":
            return []
        if traffic_class == "critical":
            return self.ledger.victims()
        return self.ledger.overhang(room_for("batch", self.gap_cap.limit, self.capacity, favoured=False))

    def newest_first(self, traffic_class: TrafficClass, now_s: float) -> bool:
        """Whether the newest of a class come before the oldest now."""
        return self._overload.newest_first(traffic_class, self.objectives.ttft(traffic_class, self.unloaded), now_s)

    def _enter(self, ticket: Ticket, now_s: float) -> None:
        self.backlog.add(ticket)
        self._overload.waits(ticket.traffic_class, now_s)

    def _admit(self, ticket: Ticket, now_s: float) -> Admit:
        ask, sequences, reserved, prompt_tokens = ticket.ask, ticket.ask.sequences, 0, 0
        if self.capacity is not None:
            room = self._room(ticket, now_s)
            reserved = min(reservation(ask, self.growth, self.capacity), room.kv_tokens)
            prompt_tokens = self.capacity.in_blocks(ask.prompt_tokens) * sequences
        self._usual.admitted(ticket.traffic_class, favoured=self._is_favoured(ticket.traffic_class, ticket.tenant))
        used_up = (now_s - ticket.arrived_s) / self.objectives.ttft(ticket.traffic_class, self.unloaded)
        self._trust.kept(ticket.traffic_class, used_up, last=not self.backlog.tenants(ticket.traffic_class))
        held = Held(ticket, reserved, sequences, prompt_tokens, now_s)
        self.ledger.admit(held)
        self.counters.served(ticket.tenant, ticket.cost)
        self._since_step += sequences
        return Admit(held)

    def _room(self, ticket: Ticket, now_s: float) -> Room:
        """What may be taken while this one is let in."""
        assert self.capacity is not None
        if not ticket.offline:
            self._last_online_s = now_s  # somebody waits
        elif self._is_quiet(now_s) and ticket.returned < MAX_EVICTIONS:
            return whole_engine(self.capacity)
        return self._class_room(ticket)

    def _class_room(self, ticket: Ticket) -> Room:
        assert self.capacity is not None
        favoured = self._is_favoured(ticket.traffic_class, ticket.tenant)
        limit = self._cap_for(ticket.traffic_class).limit
        return room_for(ticket.traffic_class, limit, self.capacity, favoured=favoured)

    def _cap_for(self, traffic_class: TrafficClass) -> RunningCap:
        return self.gap_cap if traffic_class == "batch" else self.cap

    def _is_quiet(self, now_s: float) -> bool:
        """Whether nobody but batches has been there for a while."""
        return self.ledger.sequences == self.ledger.offline_sequences and now_s - self._last_online_s >= _QUIET_S

    def _fits(self, ticket: Ticket, room: Room, freed: Room = NOTHING) -> bool:
        assert self.capacity is not None
        taken = self.ledger.sequences - freed.places
        together = taken + ticket.ask.sequences
        if taken > 0:
            usual = self._class_room(ticket) if ticket.offline else room
            if together > usual.places:
                self._short.add(ticket.traffic_class)
            if together > room.places:  # more sequences than there are places run alone
                return False
        if not freed.places and not self._engine_takes(ticket, room):
            return False
        wanted = min(reservation(ticket.ask, self.growth, self.capacity), room.kv_tokens)
        return max(0.0, self._promised() - freed.kv_tokens) + wanted <= room.kv_tokens

    def _is_favoured(self, traffic_class: TrafficClass, tenant: str) -> bool:
        """Whether a tenant may use the room that its class leaves, since it uses little. Batch work never does."""
        return bool(self._light(traffic_class, [tenant]))

    def _light(self, traffic_class: TrafficClass, tenants: list[str]) -> list[str]:
        """Those of these tenants that hold less than an equal part of all places."""
        if traffic_class != "default":
            return []
        part = self.ledger.equal_part(tenants[0], self.backlog.all_tenants(), self.cap.limit)
        return [tenant for tenant in tenants if self.ledger.places_of(tenant) < part]

    def _engine_takes(self, ticket: Ticket, room: Room) -> bool:
        """Whether the engine is near enough to the end of the prompts it has.

        Prompts that come one by one slow the running streams down a little for a while; all at once they stop them. And
        what waits in the engine is served in its order, not in ours. Who is favoured may go in beside the others.
        """
        ledger, factor = self.ledger, room.favour
        if ticket.traffic_class == "batch" and not room.whole:
            cap, pace_s = self.gap_cap, self.objectives.tpot_beside_batches(self.unloaded)
        else:
            cap, pace_s = self.cap, self.objectives.tpot(self.unloaded)
            factor *= 1 if self.objectives.tpot_s else _UNASKED
        in_queue = min(self._engine_waiting + self._since_step, ledger.prefilling)
        if in_queue >= factor * max(_ENGINE_QUEUE, cap.limit // _ENGINE_QUEUE_SHARE):
            return False
        ahead, rate = ledger.prefilling_tokens, self.rates.prefill_tokens_per_s(self.unloaded)
        if not ahead or not rate:
            return True
        return ahead + ticket.ask.prompt_tokens <= factor * _PREFILL_PACES * pace_s * rate

    def _promised(self) -> float:
        assert self.capacity is not None
        return self.ledger.promised(self.kv_usage_ratio * self.capacity.kv_tokens)

    def _residence_s(self, now_s: float) -> float:
        """How long requests stay in the engine."""
        pace_s = self.cap.itl_s or (self.unloaded.tpot_s if self.unloaded else 0.0)
        expected_s = min(self.growth.usual * self._usual.max_tokens, _FIRST_ANSWER_TOKENS) * pace_s
        return max(self.rates.residence_with(expected_s), self.ledger.mean_age_s(now_s))

    def _own_s(self, ask: Ask) -> float:
        """Seconds that the prompt itself takes."""
        rate = self.unloaded.prefill_tokens_per_s if self.unloaded else self.rates.prefill_tokens_per_s(None)
        return ask.prompt_tokens / rate if rate else 0.0

    def _expected_completion(self, ask: Ask) -> float:
        return self.growth.usual * ask.max_tokens * ask.sequences
