"""Whatever comes in whatever order: nothing is lost, nothing is counted twice, nobody waits for ever."""

from unittest.mock import patch

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from server.policy.admission import Admission
from server.policy.backlog import Ticket
from server.policy.forecast import Step
from server.policy.ledger import Held
from server.policy.objectives import Objectives, Unloaded
from server.policy.reservations import Ask, Capacity
from server.policy.tenants import TrafficClass
from server.policy.terms import TRAFFIC_CLASSES, Terms
from server.policy.verdicts import Admit, Consumed, Enqueue, Shed

asks = st.builds(Ask, st.integers(0, 3000), st.integers(0, 3000), st.integers(1, 6))
names = st.sampled_from(TRAFFIC_CLASSES)


class AnyOrder(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.admission = Admission(Objectives({"default": 5.0}, {"default": 0.1}))
        self.admission.open(Capacity(4000, 16, 8), Unloaded(0.1, 0.03, 1000))
        self.now_s = 0.0
        self.waiting: set[Ticket] = set()
        self.held: list[Held] = []

    @rule(name=names, tenant=st.sampled_from("abc"), ask=asks, priority=st.integers(0, 2))
    def arrive(self, name: TrafficClass, tenant: str, ask: Ask, priority: int) -> None:
        terms = Terms(name, priority=priority, offline=name == "batch" and priority > 0)
        verdict = self.admission.arrive(terms, tenant, ask, self.now_s, self.now_s)
        if isinstance(verdict, Enqueue):
            self.waiting.add(verdict.ticket)
            assert verdict.position >= 1

    @rule(name=names, tenant=st.sampled_from("abc"), ask=asks)
    def a_calm_forecast_is_no_other(self, name: TrafficClass, tenant: str, ask: Ask) -> None:
        quick_s = self.admission.forecast(Terms(name), tenant, ask, self.now_s)
        with patch.object(Admission, "_is_calm", return_value=False):
            assert self.admission.forecast(Terms(name), tenant, ask, self.now_s) == quick_s

    @rule(tenant=st.sampled_from("abc"), ask=asks)
    def rush(self, tenant: str, ask: Ask) -> None:
        self.held.append(self.admission.rush(tenant, Terms(), ask, self.now_s))

    @rule()
    def let_in(self) -> None:
        while (verdict := self.admission.next(self.now_s)) is not None:
            match verdict:
                case Admit(held):
                    self.waiting.remove(held.ticket)
                    self.held.append(held)
                case Shed(ticket=ticket):
                    assert ticket is not None
                    assert self.now_s > ticket.deadline_s
                    self.waiting.remove(ticket)
        for victim in self.admission.victims():
            assert victim.ticket.traffic_class == "batch"
            assert not victim.streamed
            self.held.remove(victim)
            self.admission.release(victim, Consumed(), self.now_s)
            self.waiting.add(self.admission.put_back(victim, self.now_s))

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def leave_the_queue(self, data: st.DataObject) -> None:
        ticket = data.draw(st.sampled_from(sorted(self.waiting, key=lambda ticket: ticket.number)))
        self.waiting.remove(ticket)
        self.admission.leave(ticket)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def prefill(self, data: st.DataObject) -> None:
        self.admission.prefilled(data.draw(st.sampled_from(self.held)))

    @precondition(lambda self: self.held)
    @rule(data=st.data(), tokens=st.integers(0, 3000), finished=st.booleans())
    def release(self, data: st.DataObject, tokens: int, finished: bool) -> None:
        held = data.draw(st.sampled_from(self.held))
        self.held.remove(held)
        self.admission.release(held, Consumed(tokens, 0, finished), self.now_s)
        self.admission.release(held, Consumed(tokens, 0, finished), self.now_s)  # a second time changes nothing

    @rule(
        waiting=st.integers(0, 9), usage=st.floats(0, 1), preemptions=st.integers(0, 1), itl_s=st.floats(0, 1),
    )  # fmt: skip
    def step(self, waiting: int, usage: float, preemptions: int, itl_s: float) -> None:
        self.admission.stepped(Step(len(self.held), waiting, usage, preemptions, itl_s, duration_s=itl_s))

    @rule(seconds=st.one_of(st.floats(0, 4), st.just(60.0)))
    def pass_time(self, seconds: float) -> None:
        self.now_s += seconds

    @rule()
    def replace_the_engine(self) -> None:
        self.admission.close()
        self.admission.open(Capacity(2000, 32, 4), None)

    @invariant()
    def sums_are_those_of_what_is_held(self) -> None:
        ledger = self.admission.ledger
        assert ledger.reserved == sum(held.reserved for held in self.held) >= 0
        assert ledger.sequences == sum(held.sequences for held in self.held)
        lines = [held for held in self.held if held.ticket.offline]
        assert ledger.offline_sequences == sum(held.sequences for held in lines)
        critical = [held for held in self.held if held.ticket.traffic_class == "critical"]
        assert ledger.critical_sequences == sum(held.sequences for held in critical)
        assert ledger.offline_reserved == sum(held.reserved for held in lines)
        assert ledger.prefilling == sum(held.sequences for held in self.held if not held.prefilled)
        assert ledger.promised(0) == sum(held.unfilled for held in self.held) >= 0
        assert len(ledger) == len(self.held)
        if not self.held:
            assert ledger.mean_age_s(self.now_s) == 0

    @invariant()
    def everybody_who_waits_is_in_the_queue_once(self) -> None:
        queued = list(self.admission.backlog)
        assert len(queued) == len(self.admission.backlog) == len(self.waiting)
        assert set(queued) == self.waiting

    def teardown(self) -> None:
        """When arrivals end, everything that waits is served or shed, and nothing stays."""
        for _ in range(2 * (len(self.waiting) + len(self.held)) + 2):
            self.let_in()
            if self.held:
                self.admission.release(self.held.pop(0), Consumed(), self.now_s)
            self.step(0, 0.0, 0, 0.05)
        assert not self.waiting
        assert not self.held
        assert self.admission.ledger.reserved == self.admission.ledger.sequences == 0


AnyOrder.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestAnyOrder = pytest.mark.filterwarnings("default")(AnyOrder.TestCase)
