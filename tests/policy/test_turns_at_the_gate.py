"""Whose turn it is: classes, tenants, and who gives way."""

import pytest

from server.policy.reservations import Ask
from server.policy.terms import Terms
from server.policy.verdicts import Admit, Consumed, Enqueue, Shed
from tests.policy.door import Door


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


def test_a_critical_request_is_not_refused_for_batch_work_that_it_may_drive_out() -> None:
    door = Door(max_running=1, ttft_slo_s=1)
    door.ticket("jobs", "batch")
    door.let_in()
    door.now_s += 50
    assert isinstance(door.arrive("person"), Shed)
    assert isinstance(door.arrive("vip", "critical"), Enqueue)
