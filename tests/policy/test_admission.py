from dataclasses import replace

import pytest

from server.policy.admission import Admission
from server.policy.backlog import Ticket
from server.policy.forecast import Step
from server.policy.ledger import Held
from server.policy.objectives import Objectives, Unloaded
from server.policy.reservations import Ask, Capacity
from server.policy.running_cap import RunningCap
from server.policy.tenants import TrafficClass
from server.policy.terms import Terms
from server.policy.verdicts import Admit, Consumed, Enqueue, Shed

UNLOADED = Unloaded(ttft_s=0.1, tpot_s=0.03, prefill_tokens_per_s=1000)
DONE = Consumed(50, 0, finished=True)
USUAL = Ask(100, 100)


class Door:
    """A gate's decisions, with a clock that the test turns."""

    def __init__(self, kv_tokens: int = 10_000, max_running: int = 16, ttft_slo_s: float = 5.0) -> None:
        self.admission = Admission(Objectives({"default": ttft_slo_s, "critical": ttft_slo_s}, {"default": 0.1}))
        self.admission.open(Capacity(kv_tokens, 16, max_running), UNLOADED)
        self.admission.cap = replace(self.admission.cap, starting=False)  # its size is known to be right
        self.now_s = 100.0
        self.kv_tokens = kv_tokens
        self.running: list[Held] = []

    def arrive(
        self, tenant: str = "a", name: TrafficClass = "default", ask: Ask = USUAL, timeout_s: float | None = None
    ) -> Enqueue | Shed:
        return self.admission.arrive(Terms(name, timeout_s), tenant, ask, self.now_s, self.now_s)

    def ticket(self, tenant: str = "a", name: TrafficClass = "default", ask: Ask = USUAL) -> Ticket:
        verdict = self.arrive(tenant, name, ask)
        assert isinstance(verdict, Enqueue)
        return verdict.ticket

    def let_in(self) -> list[Held]:
        """Everything that may go in now; the engine takes each of them up at once."""
        held = []
        while (verdict := self.admission.next(self.now_s)) is not None:
            assert isinstance(verdict, Admit)
            held.append(verdict.held)
            self.running.append(verdict.held)
            self.admission.prefilled(verdict.held)
            self.admission.kv_usage_ratio = sum(each.prompt_tokens for each in self.running) / self.kv_tokens
        return held

    def fill(self, tenant: str = "a", name: TrafficClass = "default") -> list[Held]:
        """Arrivals of one tenant until one has to wait."""
        held: list[Held] = []
        while isinstance(verdict := self.arrive(tenant, name), Enqueue):
            new = self.let_in()
            if not new:
                self.admission.leave(verdict.ticket)
                break
            held += new
        return held

    def finish(self, held: Held, after_s: float = 2.0) -> None:
        self.now_s += after_s
        self.running.remove(held)
        self.admission.release(held, DONE, self.now_s)


def test_a_request_goes_in_at_once_where_there_is_room() -> None:
    door = Door()
    verdict = door.arrive()
    assert isinstance(verdict, Enqueue)
    assert verdict.position == 1
    assert [held.ticket for held in door.let_in()] == [verdict.ticket]


def test_classes_leave_room_for_the_classes_above() -> None:
    counts = {}
    for name in ("critical", "default", "batch"):
        door = Door()
        door.fill("a", "batch")
        door.fill("a", name)
        counts[name] = len(door.admission.ledger)
    assert counts == {"critical": 11, "default": 8, "batch": 4}


def test_critical_requests_are_served_first_whenever_they_come() -> None:
    door = Door()
    running = door.fill()
    waiting = [door.ticket("a", name) for name in ("batch", "default", "critical")]
    door.finish(running[0])
    door.finish(running[1])
    assert [held.ticket for held in door.let_in()][:2] == [waiting[2], waiting[1]]


def test_a_tenant_with_nothing_running_may_use_the_room_kept_for_critical_ones() -> None:
    door = Door()
    assert len(door.fill("heavy")) == 8
    light = door.ticket("light")
    assert [held.ticket for held in door.let_in()] == [light]


def test_the_light_tenant_passes_a_heavy_one_that_has_to_wait() -> None:
    door = Door()
    door.fill("heavy")
    heavy, light = door.ticket("heavy"), door.ticket("light")
    door.admission.counters.charge("light", 1e9)  # even if it is not its turn
    assert [held.ticket for held in door.let_in()] == [light]
    assert heavy in list(door.admission.backlog)


def test_turns_are_fair_by_tokens_and_not_by_requests() -> None:
    door = Door(max_running=1, ttft_slo_s=1000)
    for _ in range(12):
        door.ticket("short", ask=Ask(10, 10))
        door.ticket("long", ask=Ask(100, 100))
    served: list[str] = []
    for _ in range(11):
        (running,) = door.let_in()
        served.append(running.ticket.tenant)
        door.admission.release(running, Consumed(running.ticket.ask.max_tokens, 0, finished=True), door.now_s)
    assert (served.count("short"), served.count("long")) == (10, 1)


def test_the_wait_of_a_light_tenant_does_not_depend_on_a_heavy_ones_backlog() -> None:
    waits_s = []
    for backlog in (1, 40):
        door = Door(ttft_slo_s=500)
        door.fill("heavy")
        for name in ("one", "two"):
            door.ticket(name)
        assert len(door.let_in()) == 2  # the last places, so that the light tenant has to wait too
        door.now_s += 3
        for _ in range(backlog):
            door.ticket("heavy")
        door.admission.backlog.welcome("light")
        waits_s.append(door.admission.forecast(Terms(), "light", Ask(100, 100), door.now_s))
    assert waits_s[0] == pytest.approx(waits_s[1])
    assert waits_s[0] > 0.3


def test_the_wait_of_a_heavy_tenant_grows_with_its_backlog() -> None:
    door = Door(ttft_slo_s=500)
    door.fill("heavy")
    door.now_s += 4
    before_s = door.admission.forecast(Terms(), "heavy", Ask(100, 100), door.now_s)
    for _ in range(14):
        door.ticket("heavy")
    after_s = door.admission.forecast(Terms(), "heavy", Ask(100, 100), door.now_s)
    assert after_s - before_s == pytest.approx(14 / 8 * 4)


def test_a_request_that_would_wait_too_long_is_refused_on_arrival() -> None:
    door = Door(ttft_slo_s=5)
    for held in door.fill():
        door.finish(held)
    door.fill()
    verdicts = [door.arrive() for _ in range(60)]
    waits_s = [verdict.wait_s for verdict in verdicts]
    assert isinstance(verdicts[0], Enqueue)
    assert isinstance(verdicts[-1], Shed)
    assert all(isinstance(v, Enqueue) == (v.wait_s <= 4.0) for v in verdicts)
    assert waits_s == sorted(waits_s)


def test_a_refusal_says_when_the_wait_is_hopeless() -> None:
    door = Door(ttft_slo_s=1)
    for held in door.fill():
        door.finish(held, after_s=30)
    door.fill()
    verdict = door.arrive()
    assert isinstance(verdict, Shed)
    assert verdict.hopeless


def test_a_burst_at_the_start_is_not_refused_for_a_cap_that_still_grows() -> None:
    verdicts = []
    for starting in (True, False):
        door = Door(kv_tokens=100_000, max_running=64, ttft_slo_s=2)
        door.fill()
        door.now_s += 3
        door.admission.cap = replace(door.admission.cap, starting=starting)
        verdicts.append([type(door.arrive()) for _ in range(16)])
    assert set(verdicts[0]) == {Enqueue}
    assert Shed in verdicts[1]


def test_a_client_with_less_patience_is_refused_earlier_and_with_more_later() -> None:
    door = Door(ttft_slo_s=5)
    for held in door.fill():
        door.finish(held)
    door.fill()
    for _ in range(10):
        door.arrive()
    assert isinstance(door.arrive(timeout_s=0.5), Shed)
    assert isinstance(door.arrive(timeout_s=100), Enqueue)


def test_a_prompt_that_takes_longer_than_the_objective_is_welcome_where_nothing_waits() -> None:
    door = Door(kv_tokens=100_000, ttft_slo_s=1)
    assert isinstance(door.arrive(ask=Ask(50_000, 10)), Enqueue)
    assert isinstance(door.arrive("b", ask=Ask(50_000, 10), timeout_s=2), Shed)


def test_what_expires_in_the_queue_is_shed_instead_of_started() -> None:
    door = Door(ttft_slo_s=5)
    running = door.fill()
    ticket = door.ticket()
    door.finish(running[0], after_s=6)
    verdict = door.admission.next(door.now_s)
    assert isinstance(verdict, Shed)
    assert verdict.ticket is ticket


def test_under_standing_overload_with_expiries_the_newest_goes_first() -> None:
    door = Door(ttft_slo_s=5)
    running = door.fill()
    tickets = [door.ticket() for _ in range(2)]
    door.now_s += 4.9
    older = door.ticket()
    assert not door.admission.newest_first("default", door.now_s)
    door.now_s += 0.2
    for ticket in tickets:
        door.admission.leave(ticket)
    newer = door.ticket()
    door.admission.expired(tickets[0], door.now_s)
    assert newer.number > older.number
    door.finish(running[0], after_s=0)
    assert door.admission.newest_first("default", door.now_s)
    assert [held.ticket for held in door.let_in()] == [newer]


def test_the_order_turns_back_once_the_queue_was_empty() -> None:
    door = Door(ttft_slo_s=5)
    door.fill()
    ticket = door.ticket()
    door.now_s += 6
    door.admission.leave(ticket)
    door.admission.expired(ticket, door.now_s)
    door.ticket()
    assert not door.admission.newest_first("default", door.now_s)


def test_a_request_larger_than_its_class_may_hold_runs_when_nothing_else_does() -> None:
    door = Door(kv_tokens=1000)
    door.ticket("small", ask=Ask(100, 10))
    running = door.let_in()
    large = door.ticket("large", ask=Ask(2000, 500))
    door.ticket("small", ask=Ask(10, 10))
    door.admission.counters.charge("small", 1e6)
    assert door.let_in() == []
    door.finish(running[0], after_s=0.1)
    assert [held.ticket for held in door.let_in()] == [large]
    assert door.admission.ledger.reserved <= 950


def test_more_sequences_than_may_run_at_once_run_alone() -> None:
    door = Door(max_running=4)
    ticket = door.ticket(ask=Ask(10, 10, sequences=16))
    assert [held.ticket for held in door.let_in()] == [ticket]
    door.ticket("b")
    assert door.let_in() == []


def test_a_critical_request_takes_the_place_of_the_newest_batch_work() -> None:
    door = Door(max_running=1)
    old = door.ticket("jobs", "batch")
    verdict = door.admission.next(door.now_s)
    assert isinstance(verdict, Admit)
    assert verdict.held.ticket is old
    door.ticket("vip", "critical")
    assert door.admission.next(door.now_s) is None
    assert door.admission.victims() == [verdict.held]
    assert door.admission.victims() == []  # its place is on its way
    door.admission.release(verdict.held, Consumed(), door.now_s)
    back = door.admission.put_back(verdict.held, door.now_s)
    assert [held.ticket.tenant for held in door.let_in()] == ["vip"]
    assert list(door.admission.backlog) == [back]


def test_batch_work_that_has_streamed_is_left_alone() -> None:
    door = Door(max_running=1)
    (running,) = door.fill("jobs", "batch")
    running.streamed = True
    door.ticket("vip", "critical")
    assert door.admission.victims() == []


def test_default_requests_do_not_drive_out_batch_work() -> None:
    door = Door(max_running=1)
    door.ticket("jobs", "batch")
    door.admission.next(door.now_s)
    door.ticket("person", "default")
    assert door.admission.next(door.now_s) is None
    assert door.admission.victims() == []


def test_nothing_is_driven_out_where_it_would_not_be_enough() -> None:
    door = Door(max_running=2)
    door.ticket("person", "default")
    door.let_in()
    door.ticket("vip", "critical", Ask(10, 10, sequences=2))
    assert door.admission.next(door.now_s) is None
    assert door.admission.victims() == []


def test_the_engines_own_queue_is_kept_short() -> None:
    door = Door()
    for _ in range(6):
        door.ticket()
    started = []
    while (verdict := door.admission.next(door.now_s)) is not None:
        started.append(verdict)
    assert len(started) == 2
    door.admission.stepped(Step(running=2, waiting=0, kv_usage_ratio=0.0))
    assert door.admission.next(door.now_s) is None  # both prompts are still being worked on
    assert isinstance(started[0], Admit)
    door.admission.prefilled(started[0].held)
    assert door.admission.next(door.now_s) is not None


def test_a_long_prompt_goes_to_the_engine_alone() -> None:
    door = Door(ttft_slo_s=100)
    for _ in range(2):
        door.ticket(ask=Ask(3000, 10))
    first = door.admission.next(door.now_s)
    assert isinstance(first, Admit)
    assert door.admission.next(door.now_s) is None
    door.admission.prefilled(first.held)
    assert isinstance(door.admission.next(door.now_s), Admit)


def test_requests_that_vanish_before_the_engine_ever_stepped_leave_the_way_free() -> None:
    door = Door()
    for _ in range(2):
        door.ticket()
        verdict = door.admission.next(door.now_s)
        assert isinstance(verdict, Admit)
        door.admission.release(verdict.held, Consumed(), door.now_s)
    door.ticket()
    assert isinstance(door.admission.next(door.now_s), Admit)


def test_a_prompt_that_requests_share_is_counted_once_where_the_engine_says_so() -> None:
    door = Door(kv_tokens=3000, max_running=64)
    door.admission.cap = RunningCap(limit=64, most=64)
    door.admission.kv_usage_ratio = 1.0
    held: list[Held] = []
    for _ in range(20):
        door.arrive()
    while isinstance(verdict := door.admission.next(door.now_s), Admit):
        held.append(verdict.held)
        door.admission.prefilled(verdict.held)
    assert sum(each.reserved for each in held) > 2300
    door.admission.stepped(Step(running=len(held), waiting=0, kv_usage_ratio=0.2))
    assert door.fill()


def test_a_step_with_a_preemption_makes_reservations_careful_again() -> None:
    door = Door()
    for _ in range(700):
        door.admission.stepped(Step(1, 0, 0.1))
    bold = door.admission.growth.expected
    door.admission.stepped(Step(1, 0, 0.9, preemptions=1))
    assert bold == pytest.approx(0.1)
    assert door.admission.growth.expected == 0.7


def test_without_an_engine_everything_waits() -> None:
    door = Door()
    door.admission.close()
    assert isinstance(door.arrive(), Enqueue)
    assert door.admission.next(door.now_s) is None
    door.admission.open(Capacity(10_000, 16, 8), UNLOADED)
    assert isinstance(door.admission.next(door.now_s), Admit)


def test_pressure_is_the_wait_in_units_of_the_objective() -> None:
    door = Door(ttft_slo_s=5)
    assert door.admission.pressure(door.now_s) == 0
    for held in door.fill():
        door.finish(held)
    door.fill()
    while isinstance(door.arrive(), Enqueue):
        pass
    assert 0.6 < door.admission.pressure(door.now_s) < 1.2


def test_before_anything_has_ended_answers_without_a_cap_do_not_look_endless() -> None:
    """A chat that names no cap gets the whole window, and a first crowd of them is not to be turned away for it."""
    door = Door(kv_tokens=200_000, ttft_slo_s=5)
    for _ in range(10):
        door.ticket(ask=Ask(50, 8000))
        door.let_in()
    assert isinstance(door.arrive(ask=Ask(50, 8000)), Enqueue)


def test_a_critical_request_is_not_refused_for_batch_work_that_it_may_drive_out() -> None:
    door = Door(max_running=1, ttft_slo_s=1)
    door.ticket("jobs", "batch")
    door.let_in()
    door.now_s += 50
    assert isinstance(door.arrive("person"), Shed)
    assert isinstance(door.arrive("vip", "critical"), Enqueue)
