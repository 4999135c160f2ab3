import itertools
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.policy.limits import (
    NEVER,
    RATES,
    Bucket,
    Cost,
    Moment,
    Refused,
    Scope,
    charge,
    duration,
    headers,
    is_limited,
    reserved_tokens,
    sentence,
    settle,
    standings,
    too_large,
    used_tokens,
)
from server.policy.tenants import Limits

NOW = 1_790_000_000_000_000
SECOND = 1_000_000
MINUTE = 60 * SECOND
DAY = 86_400 * SECOND


def scope(limits: Limits) -> Scope:
    return Scope("tenant", "{team}", limits)


def charged(bucket: Bucket, limits: Limits, cost: Cost, now_us: int, lease: str | None = None) -> Bucket | Refused:
    verdict = charge([bucket], [scope(limits)], cost, lease, now_us)
    return verdict if isinstance(verdict, Refused) else verdict[0]


def admitted(bucket: Bucket, limits: Limits, cost: Cost, now_us: int) -> Bucket:
    after = charged(bucket, limits, cost, now_us)
    assert isinstance(after, Bucket)
    return after


def refused(bucket: Bucket, limits: Limits, cost: Cost, now_us: int, lease: str | None = None) -> Refused:
    verdict = charged(bucket, limits, cost, now_us, lease)
    assert isinstance(verdict, Refused)
    return verdict


def test_a_whole_period_fits_at_once_and_not_a_token_more() -> None:
    limits = Limits(tokens_per_minute=1000)
    full = admitted(Bucket(), limits, Cost(tokens=1000), NOW)
    assert refused(full, limits, Cost(tokens=1), NOW) == Refused(scope(limits), "tokens_per_minute", MINUTE // 1000)


@pytest.mark.parametrize("limit", [1, 3, 7, 60, 999_983, 10**12])
def test_whoever_comes_back_when_told_is_let_in_and_nobody_sooner(limit: int) -> None:
    limits = Limits(tokens_per_day=limit)
    full = admitted(Bucket(), limits, Cost(tokens=limit), NOW)
    wait_us = refused(full, limits, Cost(tokens=1), NOW).wait_us
    assert isinstance(charged(full, limits, Cost(tokens=1), NOW + wait_us - 1), Refused)
    admitted(full, limits, Cost(tokens=1), NOW + wait_us)


def test_the_limit_with_the_longest_wait_is_the_one_that_is_told() -> None:
    limits = Limits(requests_per_minute=1, tokens_per_minute=100, tokens_per_day=100)
    used = admitted(Bucket(), limits, Cost(1, 100), NOW)
    assert refused(used, limits, Cost(1, 100), NOW) == Refused(scope(limits), "tokens_per_day", DAY)
    assert refused(used, limits, Cost(requests=1), NOW) == Refused(scope(limits), "requests_per_minute", MINUTE)


def test_a_refusal_in_one_scope_leaves_the_other_as_it_was() -> None:
    team, user = scope(Limits(tokens_per_minute=1000)), Scope("end_user", "{team}:user:a", Limits(tokens_per_minute=10))
    verdict = charge([Bucket(), Bucket()], [team, user], Cost(tokens=5), None, NOW)
    assert isinstance(verdict, tuple)
    assert charge(verdict, [team, user], Cost(tokens=6), None, NOW) == Refused(user, "tokens_per_minute", 6 * SECOND)
    assert isinstance(charge(verdict, [team, user], Cost(tokens=5), None, NOW), tuple)


def test_what_was_not_used_is_given_back_to_the_token() -> None:
    limits = Limits(tokens_per_minute=1000, tokens_per_day=5000)
    full = admitted(Bucket(), limits, Cost(tokens=1000), NOW)
    after = settle(full, limits, Cost(tokens=40) - Cost(tokens=1000), None, NOW)
    assert [one.remaining for one in standings(after.moments, limits, NOW)] == [960, 4960]


def test_what_was_used_beyond_the_reserve_is_made_up_for_before_the_next_is_let_in() -> None:
    limits = Limits(tokens_per_minute=600)
    after = settle(admitted(Bucket(), limits, Cost(tokens=500), NOW), limits, Cost(tokens=300), None, NOW)
    assert [one.remaining for one in standings(after.moments, limits, NOW)] == [0]
    assert refused(after, limits, Cost(tokens=1), NOW).wait_us == 201 * MINUTE // 600


def test_leases_bound_what_runs_at_once_and_end_by_themselves() -> None:
    limits = Limits(concurrency=2)
    both = admitted_lease(admitted_lease(Bucket(), limits, "a"), limits, "b")
    assert refused(both, limits, Cost(1), NOW, "c").name == "concurrency"
    assert isinstance(charged(both, limits, Cost(), NOW), Bucket)  # a part of a request that runs already
    freed = settle(both, limits, Cost(), "a", NOW)
    assert isinstance(charged(freed, limits, Cost(1), NOW, "c"), Bucket)
    assert isinstance(charged(both, limits, Cost(1), NOW + MINUTE, "c"), Bucket)


def admitted_lease(bucket: Bucket, limits: Limits, lease: str) -> Bucket:
    after = charged(bucket, limits, Cost(requests=1), NOW, lease)
    assert isinstance(after, Bucket)
    return after


STEPS = st.lists(
    st.tuples(
        st.integers(0, 2 * MINUTE), st.integers(1, 60), st.booleans(), st.integers(0, 60)
    ), min_size=1, max_size=60,
)  # fmt: skip


@given(limit=st.integers(60, 100), steps=STEPS)
def test_what_is_used_in_any_span_stays_within_rate_times_time_and_burst(
    limit: int, steps: list[tuple[int, int, bool, int]]
) -> None:
    """GCRA's promise, checked against exact fractions over every span that begins and ends with a charge."""
    limits, bucket, now_us = Limits(tokens_per_minute=limit), Bucket(), NOW
    used: list[tuple[int, int]] = []
    for pause_us, cost, gives_back, unused in steps:
        now_us += pause_us
        verdict = charged(bucket, limits, Cost(tokens=cost), now_us)
        if isinstance(verdict, Refused):
            assert isinstance(charged(bucket, limits, Cost(tokens=cost), now_us + verdict.wait_us), Bucket)
            continue
        bucket = verdict
        back = min(unused, cost) if gives_back else 0
        bucket = settle(bucket, limits, Cost(tokens=-back), None, now_us)
        used.append((now_us, cost - back))
    for first, last in itertools.combinations_with_replacement(range(len(used)), 2):
        span_us = used[last][0] - used[first][0]
        assert sum(tokens for _, tokens in used[first : last + 1]) <= limit + Fraction(span_us * limit, MINUTE)


@given(limit=st.integers(1, 10**12), amounts=st.lists(st.integers(1, 10**6), max_size=20))
def test_charging_and_giving_back_the_same_leaves_no_trace(limit: int, amounts: list[int]) -> None:
    limits = Limits(tokens_per_day=limit)
    bucket = Bucket((Moment(), Moment(), Moment(NOW + 1, 0)))
    for amount in amounts:
        bucket = settle(bucket, limits, Cost(tokens=amount), None, NOW)
    for amount in amounts:
        bucket = settle(bucket, limits, Cost(tokens=-amount), None, NOW)
    assert bucket.moments[2] == Moment(NOW + 1, 0)


def test_a_limit_that_is_changed_holds_from_the_next_charge() -> None:
    bucket = admitted(Bucket(), Limits(tokens_per_minute=7), Cost(tokens=3), NOW)
    lower = Limits(tokens_per_minute=2)
    assert bucket.moments[1].rest >= 2
    assert refused(bucket, lower, Cost(tokens=2), NOW).wait_us > 0
    assert isinstance(charged(bucket, lower, Cost(tokens=2), NOW + MINUTE), Bucket)


def test_a_cost_that_no_wait_would_fit_is_told_apart() -> None:
    limits = Limits(requests_per_minute=1, tokens_per_minute=100, tokens_per_day=50)
    assert too_large(limits, Cost(1, 50)) is None
    assert too_large(limits, Cost(1, 51)) is RATES[2]
    assert too_large(Limits(), Cost(1, 10**9)) is None


def test_headers_tell_of_each_unit_the_rate_with_least_left() -> None:
    limits = Limits(requests_per_minute=60, tokens_per_minute=1000, tokens_per_day=1200)
    moments = admitted(Bucket(), limits, Cost(1, 600), NOW).moments
    assert headers(standings(moments, limits, NOW)) == {
        "x-ratelimit-limit-requests": "60",
        "x-ratelimit-remaining-requests": "59",
        "x-ratelimit-reset-requests": "1s",
        "x-ratelimit-limit-tokens": "1000",
        "x-ratelimit-remaining-tokens": "400",
        "x-ratelimit-reset-tokens": "36s",
    }
    later = NOW + 30 * SECOND
    assert headers(standings(moments, limits, later))["x-ratelimit-limit-tokens"] == "1200"
    assert headers(standings(NEVER, Limits(concurrency=3), NOW)) == {}


@pytest.mark.parametrize(
    ("us", "text"),
    [
        (0, "0ms"), (1, "1ms"), (12_000, "12ms"), (999_001, "1s"), (1_500_000, "1.5s"), (59_999_999, "1m0s"),
        (6 * MINUTE, "6m0s"), (72_500_000, "1m12.5s"), (DAY - MINUTE, "23h59m0s"),
    ],
)  # fmt: skip
def test_durations_are_written_as_openai_writes_them(us: int, text: str) -> None:
    assert duration(us) == text


@pytest.mark.parametrize(
    ("limits", "name", "wait_us", "text"),
    [
        (Limits(tokens_per_minute=10_000), "tokens_per_minute", 12_300_000,
         "Your team has reached the limit of 10,000 tokens per minute. Please try again in 13 seconds."),
        (Limits(requests_per_minute=1), "requests_per_minute", 900_000,
         "Your team has reached the limit of 1 request per minute. Please try again in 1 second."),
        (Limits(tokens_per_day=5), "tokens_per_day", 3 * 3600 * SECOND + 1,
         "Your team has reached the limit of 5 tokens per day. Please try again in 4 hours."),
        (Limits(concurrency=4), "concurrency", SECOND,
         "Your team has reached the limit of 4 requests at the same time. Please try again in a moment."),
    ],
)  # fmt: skip
def test_a_refusal_says_which_limit_how_large_it_is_and_when_to_come_back(
    limits: Limits, name: str, wait_us: int, text: str
) -> None:
    (limit_name,) = [one for one in (*(rate.name for rate in RATES), "concurrency") if one == name]
    assert sentence(Refused(scope(limits), limit_name, wait_us)) == text


def test_an_end_user_is_told_of_their_own_limit() -> None:
    one = Scope("end_user", "{team}:user:a", Limits(tokens_per_minute=10))
    assert sentence(Refused(one, "tokens_per_minute", 1)).startswith("You have reached")


def test_a_request_reserves_its_prompt_and_every_choice_it_may_get() -> None:
    assert reserved_tokens(100, 50, 2, None) == 200
    assert reserved_tokens(100, 8000, 1, 1024) == 1124
    assert reserved_tokens(100, 50, 1, 1024) == 150
    assert reserved_tokens(100, 0, 1, None) == 100


def test_cached_prompt_tokens_count_what_the_operator_says() -> None:
    assert used_tokens(100, 40, 7, 1.0) == 107
    assert used_tokens(100, 40, 7, 0.25) == 77
    assert used_tokens(100, 41, 7, 0.5) == 87  # rounded up
    assert used_tokens(100, 400, 7, 0.0) == 7


def test_limits_are_limits_only_when_one_is_set() -> None:
    assert not is_limited(Limits())
    assert is_limited(Limits(concurrency=1))
