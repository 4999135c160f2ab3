"""What is remembered of refusals and cuts."""

from dataclasses import replace

from server.telemetry.recent import Happening, RecentHappenings

FULL = Happening("refusal", "server_overloaded", "/v1/chat/completions", "search", 503, "busy", "r-1")


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def test_what_repeats_is_one_entry_with_a_count_and_its_last_words() -> None:
    clock = Clock()
    recent = RecentHappenings(clock=clock)
    recent.note(FULL)
    clock.now_s = 160.0
    recent.note(replace(FULL, detail="still busy", request_id="r-2"))
    (entry,) = recent.latest("refusal")
    assert (entry.count, entry.first_s, entry.last_s) == (2, 100.0, 160.0)
    assert (entry.last.detail, entry.last.request_id) == ("still busy", "r-2")


def test_the_latest_comes_first_and_the_oldest_goes() -> None:
    recent = RecentHappenings(capacity=3)
    for tenant in "abcd":
        recent.note(replace(FULL, tenant=tenant))
    recent.note(replace(FULL, tenant="b"))
    assert [entry.last.tenant for entry in recent.latest("refusal")] == ["b", "d", "c"]


def test_a_flood_of_one_kind_pushes_out_nothing_else() -> None:
    recent = RecentHappenings(capacity=2)
    recent.note(replace(FULL, kind="truncation", code="drop_turns"))
    recent.note(replace(FULL, code="rate_limit_exceeded"))
    for number in range(1000):
        recent.note(replace(FULL, request_id=str(number)))
    assert [(entry.last.code, entry.count) for entry in recent.latest("refusal")] == [
        ("server_overloaded", 1000),
        ("rate_limit_exceeded", 1),
    ]
    assert len(recent.latest("truncation")) == 1


def test_a_long_detail_is_cut() -> None:
    recent = RecentHappenings()
    recent.note(replace(FULL, detail="x" * 10_000))
    assert len(recent.latest("refusal")[0].last.detail) == 300
