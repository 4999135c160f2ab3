import itertools
from dataclasses import replace
from typing import get_args

import pytest

from server.policy.batches import (
    LINES_WAITING,
    MOST_LINES_IN_FLIGHT,
    MOVES,
    Batch,
    IllegalMove,
    Outputs,
    Pace,
    Record,
    Retry,
    Status,
    after_refusal,
    moved,
)
from server.policy.refusals import (
    ContextLengthExceeded,
    Draining,
    GenerationFailed,
    InvalidRequest,
    ModelNotFound,
    NotReady,
    Overloaded,
    RateLimited,
    Refusal,
    StoreUnavailable,
    Unsupported,
)

STATUSES: tuple[Status, ...] = get_args(Status)


def batch(status: Status) -> Batch:
    return Batch(
        "batch_1", "a-tenant", "file-1", "/v1/chat/completions", 100, 200, "f", Outputs("file-2", "file-3"), status
    )


@pytest.mark.parametrize(("before", "after"), list(itertools.product(STATUSES, STATUSES)))
def test_a_batch_moves_as_the_table_says_and_no_other_way(before: Status, after: Status) -> None:
    if after in MOVES[before]:
        assert moved(batch(before), after, 123.9).status == after
    else:
        with pytest.raises(IllegalMove):
            moved(batch(before), after, 123.9)


def test_every_state_is_reached_and_every_way_ends() -> None:
    reached, frontier = {"validating"}, ["validating"]
    while frontier:
        for status in MOVES[frontier.pop()]:  # type: ignore[index]
            if status not in reached:
                reached.add(status)
                frontier.append(status)
    assert reached == set(STATUSES)
    for status in STATUSES:
        ends: set[str] = {status}
        for _ in STATUSES:
            ends |= {after for end in ends for after in MOVES[end]}  # type: ignore[index]
        assert any(batch(end).ended for end in ends)  # type: ignore[arg-type]


def test_a_move_notes_its_time_and_keeps_the_ones_before() -> None:
    begun = moved(batch("validating"), "in_progress", 123.9)
    ending = moved(begun, "finalizing", 150.0)
    assert ending.times == {"in_progress": 123, "finalizing": 150}


def test_only_a_batch_without_a_next_state_has_ended() -> None:
    ended = {status for status in STATUSES if batch(status).ended}
    assert ended == {"failed", "completed", "expired", "cancelled"}


@pytest.mark.parametrize("kind", [RateLimited, Overloaded, NotReady, Draining, StoreUnavailable])
@pytest.mark.parametrize("tries", [1, 2, 50])
def test_a_full_server_is_waited_out_however_often(kind: type[Refusal], tries: int) -> None:
    decision = after_refusal(kind("busy"), tries, 0.0)
    assert isinstance(decision, Retry)
    assert 0 < decision.wait_s <= 60


def test_whoever_says_when_to_come_back_is_taken_at_its_word() -> None:
    decision = after_refusal(RateLimited("quota", retry_after_s=3600.0), 1, 0.5)
    assert decision == Retry(3600.0 * 1.125)


def test_a_forecast_of_a_long_wait_does_not_hold_a_batch_up_for_as_long() -> None:
    assert after_refusal(Overloaded("busy", retry_after_s=3000.0), 1, 0.0) == Retry(60.0)


@pytest.mark.parametrize("kind", [InvalidRequest, ContextLengthExceeded, ModelNotFound, Unsupported])
def test_a_fault_of_the_line_itself_is_its_answer(kind: type[Refusal]) -> None:
    assert after_refusal(kind("bad"), 1, 0.0) == Record()


def test_a_line_that_was_in_two_failures_is_not_tried_again() -> None:
    assert isinstance(after_refusal(GenerationFailed("died"), 1, 0.0), Retry)
    assert after_refusal(GenerationFailed("died"), 2, 0.0) == Record()
    assert after_refusal(GenerationFailed("quarantined", should_retry=False), 1, 0.0) == Record()


def test_waits_grow_and_are_spread() -> None:
    waits = [after_refusal(Overloaded("busy"), tries, 0.0) for tries in range(1, 9)]
    seconds = [wait.wait_s for wait in waits if isinstance(wait, Retry)]
    assert seconds == sorted(seconds)
    assert (seconds[0], seconds[-1]) == (1.0, 60.0)
    assert after_refusal(Overloaded("busy"), 1, 1.0) == Retry(1.25)


def test_the_pace_follows_what_the_gate_lets_in() -> None:
    pace = Pace(waiting=LINES_WAITING)
    assert not pace.may_offer(0.0)
    pace.waiting, pace.in_engine = LINES_WAITING - 1, 500
    assert pace.may_offer(0.0)
    pace.in_engine = MOST_LINES_IN_FLIGHT
    assert not pace.may_offer(0.0)


def test_a_refusal_holds_back_the_lines_after_it_and_a_shorter_one_does_not_hasten_them() -> None:
    pace = Pace()
    pace.hold(10.0)
    pace.hold(5.0)
    assert not pace.may_offer(9.9)
    assert pace.may_offer(10.0)


def test_a_record_that_differs_is_another_batch() -> None:
    assert batch("validating") == batch("validating")
    assert replace(batch("validating"), model="m") != batch("validating")
