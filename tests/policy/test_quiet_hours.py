"""Batches alone have the whole engine, and give it back to whoever comes."""

from dataclasses import replace

import pytest

from server.policy.admission import Admission
from server.policy.forecast import Step
from server.policy.ledger import MAX_EVICTIONS
from server.policy.objectives import Objectives
from server.policy.reservations import Ask, Capacity
from server.policy.tenants import TrafficClass
from server.policy.terms import Terms
from server.policy.verdicts import Admit, Enqueue
from tests.policy.door import UNLOADED, USUAL, Door

SHARE = 4  # of the places that keep the pace, which are 8 in these tests


def test_lines_fill_the_whole_engine_while_nobody_else_is_there() -> None:
    assert len(Door().fill_with_lines()) == 16


@pytest.mark.parametrize("name", ["critical", "default", "batch"])
def test_lines_keep_to_their_share_while_somebody_else_is_there(name: TrafficClass) -> None:
    door = Door()
    door.ticket("person", name)
    (person,) = door.let_in()
    assert len(door.fill_with_lines()) == SHARE - 1
    door.now_s += 1000  # an answer may be long
    assert door.let_in() == []
    door.finish(person)
    assert len(door.let_in()) == 1  # its place, within the share


def test_a_quiet_minute_has_to_pass_first() -> None:
    door = Door()
    door.ticket("person")
    (person,) = door.let_in()
    door.finish(person)
    assert len(door.fill_with_lines()) == SHARE
    door.now_s += 59
    assert door.let_in() == []
    door.now_s += 1
    assert len(door.let_in()) == 1
    assert len(door.fill_with_lines()) == 16 - SHARE - 1


@pytest.mark.parametrize("name", ["critical", "default"])
def test_whoever_comes_is_served_at_once(name: TrafficClass) -> None:
    door = Door()
    lines = door.fill_with_lines()
    verdict = door.arrive("person", name)
    assert isinstance(verdict, Enqueue)
    assert verdict.wait_s == pytest.approx(0.1)  # its own prompt
    assert door.let_in() == []
    gone = door.give_up()
    assert gone == lines[: -len(gone) - 1 : -1]  # the least work is lost
    assert [held.ticket for held in door.let_in()] == [verdict.ticket]
    assert door.give_up() == []
    assert len(door.admission.ledger) == (11 if name == "critical" else 10)  # who uses little is favoured


def test_a_crowd_after_a_quiet_hour_is_not_refused() -> None:
    door = Door()
    door.fill_with_lines()
    tickets = [door.ticket(f"person {n}") for n in range(SHARE)]
    served = []
    for _ in tickets:
        door.give_up()
        served += [held.ticket for held in door.let_in()]
    assert served == tickets


def test_other_people_take_only_what_lines_have_beyond_their_share() -> None:
    door = Door()
    door.fill_with_lines()
    for n in range(12):
        door.arrive(f"person {n}")
        door.give_up()
        door.let_in()
    lines = [held for held in door.running if held.ticket.offline]
    assert len(lines) == SHARE


def test_memory_beyond_the_share_is_given_back_as_well() -> None:
    door = Door(kv_tokens=4000, max_running=64)
    door.fill_with_lines(ask=Ask(400, 200))
    assert door.admission.ledger.reserved > 0.6 * 4000
    verdict = door.arrive("person", ask=Ask(1000, 100))
    assert isinstance(verdict, Enqueue)
    door.give_up()
    assert [held.ticket for held in door.let_in()] == [verdict.ticket]


def test_a_line_that_was_driven_out_often_keeps_to_the_share() -> None:
    door = Door()
    door.fill_with_lines()
    (waiting,) = door.admission.backlog
    waiting.returned = MAX_EVICTIONS
    door.finish(door.running[0])
    assert door.let_in() == []


def test_the_pace_is_still_learnt_while_lines_pass_it() -> None:
    door = Door()
    door.fill_with_lines()
    assert "batch" in door.admission._short


def test_beside_people_lines_keep_a_pace_that_nobody_asked_for() -> None:
    admission = Admission(Objectives())
    admission.open(Capacity(100_000, 16, 64), UNLOADED)  # 0.03 s per token alone
    slow = Step(running=40, waiting=0, kv_usage_ratio=0.1, itl_s=0.2, generated_tokens=40, duration_s=0.2)
    for number in range(40):
        admission.arrive(Terms(), f"person {number}", Ask(10, 100), 0.0, 0.0)
        while isinstance(verdict := admission.next(0.0), Admit):
            admission.prefilled(verdict.held)
        admission.stepped(slow)
    assert len(admission.ledger) == 40  # people are not held up for a pace of 0.06 s
    admission.arrive(Terms("batch", 3600, offline=True), "jobs", Ask(10, 100), 0.0, 0.0)
    assert admission.next(0.0) is None


def test_a_line_is_not_refused_for_the_lines_before_it() -> None:
    """Beside people there would be two places, and a hundred lines run in the whole engine."""
    door = Door(kv_tokens=1_000_000, max_running=128)
    assert len(door.fill_with_lines()) == 100
    door.admission.gap_cap = replace(door.admission.gap_cap, limit=2)
    terms = Terms("batch", timeout_s=60.0, offline=True)
    assert door.admission.refuses(terms, "a", USUAL, 0.0, door.now_s) is None
    assert door.admission.refuses(replace(terms, offline=False), "a", USUAL, 0.0, door.now_s) is not None
