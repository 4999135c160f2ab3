import pytest
from prometheus_client import CollectorRegistry

from server.policy.admission import Admission
from server.policy.objectives import Objectives, Unloaded
from server.policy.reservations import Capacity
from server.telemetry.requests import Ended, RequestFigures, RequestMetrics

CHAT = "/v1/chat/completions"


class Seen:
    """The metrics of requests, with objectives of 2 s to the first token and 0.1 s per token."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.admission = Admission(Objectives({"default": 2.0}, {"default": 0.1}))
        self.metrics = RequestMetrics(self.admission, self.registry)

    def ended(self, status: int = 200, ttft_s: float | None = None, tpot_s: float | None = None) -> None:
        self.metrics.ended(Ended(CHAT, "default", status, 3.0, ttft_s, tpot_s))

    def value(self, name: str, **labels: str) -> float:
        value = self.registry.get_sample_value(name, {"class": "default", **labels})
        assert value is not None, name
        return value

    def slo(self, objective: str) -> tuple[float, float]:
        """How many requests the objective held for, and how many missed it."""
        names = "tidegate_slo_requests_total", "tidegate_slo_missed_total"
        return self.value(names[0], objective=objective), self.value(names[1], objective=objective)


@pytest.fixture
def seen() -> Seen:
    return Seen()


def test_a_stream_is_observed_once_with_its_times(seen: Seen) -> None:
    seen.ended(ttft_s=0.5, tpot_s=0.02)
    assert seen.value("tidegate_requests_total", route=CHAT, status="200") == 1
    assert seen.value("tidegate_time_to_first_token_seconds_sum") == 0.5
    assert seen.value("tidegate_time_per_output_token_seconds_sum") == 0.02
    assert seen.value("tidegate_request_duration_seconds_sum") == 3.0
    assert [seen.slo(name) for name in ("answered", "ttft", "tpot")] == [(1, 0)] * 3


def test_what_is_too_slow_misses_its_objective_and_that_one_alone(seen: Seen) -> None:
    seen.ended(ttft_s=2.5, tpot_s=0.02)
    seen.ended(ttft_s=1.5, tpot_s=0.2)
    assert [seen.slo(name) for name in ("answered", "ttft", "tpot")] == [(2, 0), (2, 1), (2, 1)]


def test_an_answer_in_one_piece_says_nothing_about_tokens(seen: Seen) -> None:
    seen.ended()
    assert [seen.slo(name) for name in ("answered", "ttft", "tpot")] == [(1, 0), (0, 0), (0, 0)]


@pytest.mark.parametrize("status", [500, 502, 503])
def test_a_servers_error_is_a_miss_and_no_duration(seen: Seen, status: int) -> None:
    seen.ended(status, ttft_s=0.1)
    assert seen.slo("answered") == (1, 1)
    assert seen.value("tidegate_request_duration_seconds_count") == 0
    assert seen.value("tidegate_time_to_first_token_seconds_count") == 0


@pytest.mark.parametrize("status", [400, 404, 429, 499])
def test_a_clients_own_errors_and_leaving_are_counted_and_not_judged(seen: Seen, status: int) -> None:
    seen.ended(status, ttft_s=100.0)
    assert seen.value("tidegate_requests_total", route=CHAT, status=str(status)) == 1
    assert [seen.slo(name) for name in ("answered", "ttft", "tpot")] == [(0, 0)] * 3


def test_the_objectives_in_force_are_shown_also_when_an_engine_changes_them() -> None:
    registry = CollectorRegistry()
    admission = Admission(Objectives())
    RequestMetrics(admission, registry)

    def shown() -> tuple[float | None, float | None]:
        ttft = registry.get_sample_value("tidegate_objective_ttft_seconds", {"class": "default"})
        return ttft, registry.get_sample_value("tidegate_objective_tpot_seconds")

    assert shown() == (60.0, 1.0)
    admission.open(Capacity(1000, 16, 4), Unloaded(ttft_s=10.0, tpot_s=0.8, prefill_tokens_per_s=100.0))
    assert shown() == (50.0, 1.6)


def test_the_pace_is_that_of_the_tokens_after_the_first() -> None:
    figures = RequestFigures(first_frame_s=10.0, last_frame_s=12.0)
    figures.used(cached_tokens=0, completion_tokens=21, sequences=1)
    assert figures.tpot_s == pytest.approx(0.1)


def test_answers_side_by_side_each_have_their_own_pace() -> None:
    figures = RequestFigures(first_frame_s=10.0, last_frame_s=12.0)
    figures.used(cached_tokens=0, completion_tokens=42, sequences=2)
    assert figures.tpot_s == pytest.approx(0.1)


@pytest.mark.parametrize("tokens", [0, 1])
def test_a_stream_of_one_token_has_no_pace(tokens: int) -> None:
    figures = RequestFigures(first_frame_s=10.0, last_frame_s=12.0)
    figures.used(cached_tokens=0, completion_tokens=tokens, sequences=1)
    assert figures.tpot_s is None


def test_the_longest_wait_in_the_queue_counts() -> None:
    figures = RequestFigures()
    assert figures.queue_wait_s is None
    for wait_s in (0.0, 2.0, 1.0):
        figures.waited(wait_s)
    assert figures.queue_wait_s == 2.0
