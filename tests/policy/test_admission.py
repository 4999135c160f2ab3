from dataclasses import replace

import pytest

from server.policy.admission import Admission
from server.policy.forecast import Step
from server.policy.ledger import Held
from server.policy.objectives import Objectives
from server.policy.reservations import Ask, Capacity
from server.policy.running_cap import RunningCap
from server.policy.tenants import TrafficClass
from server.policy.terms import Terms
from server.policy.verdicts import Admit, Consumed, Enqueue, Shed
from tests.policy.door import UNLOADED, USUAL, Door


def test_a_request_goes_in_at_once_where_there_is_room() -> None:
    door = Door()
    verdict = door.arrive()
    assert isinstance(verdict, Enqueue)
    assert verdict.position == 1
    assert [held.ticket for held in door.let_in()] == [verdict.ticket]


def test_a_request_that_would_wait_too_long_is_refused_on_arrival() -> None:
    door = Door(ttft_slo_s=5)
    for held in door.fill():
        door.finish(held)
    door.fill()
    verdicts = [door.arrive() for _ in range(60)]
    waits_s = [verdict.wait_s for verdict in verdicts]
    assert isinstance(verdicts[0], Enqueue)
    assert isinstance(verdicts[-1], Shed)
    assert all(isinstance(v, Enqueue) == (v.wait_s <= 3.5) for v in verdicts)
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
        door = Door(kv_tokens=100_000, max_running=64, ttft_slo_s=2.3)
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
    door.ticket("b", ask=Ask(10, 10))
    assert door.let_in() == []


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


def test_the_pace_leaves_room_for_a_critical_stream_while_there_is_one() -> None:
    limits = []
    classes: tuple[TrafficClass, ...] = ("default", "critical")
    for name in classes:
        door = Door(max_running=64)
        door.admission.cap = RunningCap(limit=8, most=64, starting=False)
        door.ticket(name=name)
        (held,) = door.let_in()
        for _ in range(7):
            door.ticket("b")
        door.let_in()
        for _ in range(40):
            door.admission.stepped(Step(8, 0, 0.1, itl_s=0.074))
        limits.append(door.admission.cap.limit)
        door.finish(held)
        assert door.admission.ledger.critical_sequences == 0
    assert limits[1] < limits[0] == 8


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
    door.admission.kv_usage_ratio = 0.7
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


def test_answers_that_became_longer_than_was_expected_are_counted_as_they_are() -> None:
    door = Door(kv_tokens=3000, max_running=64)
    door.ticket(ask=Ask(100, 100_000))
    (held,) = door.let_in()
    assert held.reserved == 1136
    door.admission.kv_usage_ratio = 0.8  # it has written 2,300 tokens so far
    door.ticket(ask=Ask(300, 100))
    assert door.let_in() == []
    door.finish(held)  # the last figure of the engine is older than its end
    assert len(door.let_in()) == 1


def test_a_crowd_goes_in_side_by_side_where_nobody_asked_for_a_pace() -> None:
    in_engine = {}
    for asked in (True, False):
        admission = Admission(Objectives({"default": 10.0}, {"default": 1.0} if asked else {}))
        admission.open(Capacity(100_000, 16, 64), UNLOADED)
        admission.cap = RunningCap(limit=64, most=64)
        for _ in range(32):
            admission.arrive(Terms(), "a", Ask(100, 100), 0.0, 0.0)
        while admission.next(0.0) is not None:
            pass
        in_engine[asked] = len(admission.ledger)
    assert in_engine == {True: 8, False: 16}


def test_who_waits_behind_light_tenants_expects_them_to_go_first() -> None:
    """Half of what was let in lately were others who used little: a heavy tenant's place takes twice as long."""
    doors = [Door(ttft_slo_s=20), Door(ttft_slo_s=20)]
    for door in doors:
        for held in door.fill():
            door.finish(held, after_s=2)
        door.fill()
    doors[1].admission._usual.favoured = 0.5
    first, second = (door.admission.forecast(Terms(), "a", USUAL, door.now_s) for door in doors)
    assert second == pytest.approx(2 * first, rel=0.2)


def test_who_comes_in_gives_forecasts_their_trust_back() -> None:
    door = Door(max_running=64)
    trust = door.admission._trust
    trust.broken("default")
    before = trust.share("default", first=False)
    door.ticket()
    door.let_in()
    assert trust.share("default", first=False) > before


def test_who_is_next_is_not_refused_for_what_happened_to_others() -> None:
    """Forecasts were wrong for the last of a queue; nobody waits now, and in three of five seconds a place is free."""
    door = Door(max_running=64, ttft_slo_s=5)
    for _ in range(20):
        door.admission._trust.broken("default")
    shed = door.admission._too_late(Terms(), USUAL, 0.0, 3.0)
    door.ticket()
    behind = door.admission._too_late(Terms(), USUAL, 0.0, 3.0)
    assert shed is None
    assert behind is not None


def test_a_prompt_that_is_given_up_leaves_no_time_behind() -> None:
    door = Door()
    door.ticket()
    (held,) = door.let_in()
    door.admission.stepped(Step(1, 0, 0.1, prefilling=True, duration_s=20.0))
    door.admission.release(held, Consumed(), door.now_s)
    assert door.admission.rates.pending_prefill_s == 0


def test_the_first_asks_count_alike() -> None:
    """One short answer at first would make the forecasts of a cold start short for a long time."""
    door = Door()
    for max_tokens in (10, 30):
        door.ticket(ask=Ask(10, max_tokens))
    assert door.admission._usual.max_tokens == 20


def test_the_engine_is_busy_since_the_first_of_those_that_follow_each_other() -> None:
    door = Door()
    for pause_s in (0.0, 3.0):
        door.now_s += pause_s
        door.ticket()
        door.let_in()
    assert door.admission.ledger.busy_since_s == 100.0
