from benchmarks.load import percentile
from benchmarks.load_profiles import PROFILES
from benchmarks.load_report import write_report
from benchmarks.load_test import _figures

MEASURED = {
    "completed": 2, "output_throughput": 4.0, "request_throughput": 1.0, "duration": 2.0,
    "ttfts": [0.1, 0.0, 0.3], "itls": [[0.01, 0.03], [], [0.02]], "latencies": [0.5, 0.0, 0.7],
    "errors": ["", "Service Unavailable", ""],
}  # fmt: skip


def test_a_percentile_is_one_of_the_values() -> None:
    assert [percentile([3.0, 1.0, 2.0], percent) for percent in (1, 50, 67, 99)] == [1.0, 2.0, 3.0, 3.0]


def test_what_was_refused_is_not_among_the_times() -> None:
    figures = _figures(MEASURED)
    assert figures["errors"] == {"Service Unavailable": 1}
    assert (figures["ttft_p50_ms"], figures["itl_p50_ms"], figures["total_p99_ms"]) == (100.0, 20.0, 700.0)


def test_another_seed_asks_something_else_and_the_same_one_the_same() -> None:
    profile = PROFILES["long-chat"]
    assert profile.chats(1) == profile.chats(1)
    assert profile.chats(1)[0] != profile.chats(2)[0]
    assert len(profile.chats(1)[0]) == 1 + 2 * profile.turns + 1


def test_what_a_server_says_stays_text_in_the_report() -> None:
    hostile = "<script>alert(1)</script>"
    figures = _figures({**MEASURED, "errors": ["", hostile, ""]})
    samples = {"ttft": [100.0, 300.0], "itl": [], "total": [500.0, 700.0]}
    said = {
        "profile": "chat", "says": "people", "requests": 3, "concurrency": None, "rate_per_s": 2.0,
        "answer_tokens": 4, "machine": {"cores": 2},
    }  # fmt: skip
    page = write_report(said, [{"http://a": figures | {"samples": samples}}])
    assert hostile not in page
    assert "&lt;script&gt;" in page
    assert page.count("<polyline") == 2  # no curve of gaps where there are none
