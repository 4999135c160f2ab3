import copy
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.policy.degradation import GOVERNED_ROUTES, context_factor, economical, governs, parse_wish
from server.policy.ladder import Level

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
RESPONSES, MESSAGES = "/v1/responses", "/v1/messages"


@pytest.mark.parametrize(
    ("route", "body", "changed", "applied"),
    [
        (CHAT, {}, {"max_completion_tokens": 512}, ("max_tokens=512",)),
        (CHAT, {"max_tokens": 100}, {}, ()),
        (CHAT, {"max_tokens": 4000}, {"max_tokens": 512}, ("max_tokens=512",)),
        (CHAT, {"max_tokens": 4000, "max_completion_tokens": 600},
         {"max_tokens": 512, "max_completion_tokens": 512}, ("max_tokens=512",)),
        (CHAT, {"max_tokens": 2000, "min_tokens": 1000}, {"max_tokens": 512, "min_tokens": 512}, ("max_tokens=512",)),
        (CHAT, {"max_tokens": 9, "n": 4}, {"n": 1}, ("n=1",)),
        (CHAT, {"max_tokens": 9, "n": 4, "use_beam_search": True},
         {"n": 1, "use_beam_search": False}, ("beam_search=off", "n=1")),
        (COMPLETIONS, {}, {}, ()),
        (COMPLETIONS, {"best_of": 3}, {"best_of": 1}, ("n=1",)),
        (RESPONSES, {}, {"max_output_tokens": 512}, ("max_tokens=512",)),
        (RESPONSES, {"max_output_tokens": 9999}, {"max_output_tokens": 512}, ("max_tokens=512",)),
        (MESSAGES, {"max_tokens": 1024}, {"max_tokens": 512}, ("max_tokens=512",)),
        ("/v1/embeddings", {"max_tokens": 4000, "n": 3}, {}, ()),
    ],
)  # fmt: skip
def test_economy_shortens_answers_and_gives_one(
    route: str, body: dict[str, Any], changed: dict[str, Any], applied: tuple[str, ...]
) -> None:
    economy = economical(body, route)
    assert (economy.body, economy.applied) == ({**body, **changed}, applied)


@pytest.mark.parametrize(
    ("route", "body", "left"),
    [
        (CHAT, {"max_tokens": 9, "logprobs": True, "top_logprobs": 5}, {"max_tokens": 9}),
        (COMPLETIONS, {"logprobs": 0}, {}),
        (COMPLETIONS, {"prompt_logprobs": 1}, {}),
        (RESPONSES, {"max_output_tokens": 9, "include": ["message.output_text.logprobs", "other"]},
         {"max_output_tokens": 9, "include": ["other"]}),
    ],
)  # fmt: skip
def test_economy_leaves_out_logprobs(route: str, body: dict[str, Any], left: dict[str, Any]) -> None:
    economy = economical(body, route)
    assert (economy.body, economy.applied) == (left, ("logprobs=off",))


def test_logprobs_that_were_not_asked_for_are_no_loss() -> None:
    body = {"max_tokens": 9, "logprobs": False, "top_logprobs": None}
    assert economical(body, CHAT).applied == ()


BODIES = st.fixed_dictionaries(
    {},
    optional={
        "max_tokens": st.integers(1, 10_000),
        "max_completion_tokens": st.integers(1, 10_000),
        "min_tokens": st.integers(0, 10_000),
        "n": st.integers(1, 9),
        "logprobs": st.booleans(),
        "use_beam_search": st.booleans(),
        "messages": st.just([{"role": "user", "content": "hi"}]),
    },
)


@given(BODIES, st.sampled_from(sorted(GOVERNED_ROUTES)))
def test_economy_changes_nothing_twice_and_nothing_in_place(body: dict[str, Any], route: str) -> None:
    before = copy.deepcopy(body)
    once = economical(body, route)
    assert body == before
    assert bool(once.applied) == (once.body != body)
    assert economical(once.body, route).applied == ()


def test_the_context_halves_from_level_two_on() -> None:
    assert [context_factor(level) for level in Level] == [1.0, 1.0, 0.5, 0.5, 0.5, 0.5]


def test_the_ladder_governs_generating_and_pooling_alone() -> None:
    assert governs("POST", CHAT)
    assert governs("POST", "/v1/embeddings")
    assert not governs("GET", "/v1/models")
    assert not governs("POST", "/tokenize")
    assert not governs("POST", "/v1/load_lora_adapter")


@pytest.mark.parametrize(
    ("header", "wish"), [(None, "auto"), ("", "auto"), ("NONE", "none"), (" canned ", "canned"), ("whatever", "auto")]
)
def test_a_clients_wish_is_read_from_its_header(header: str | None, wish: str) -> None:
    assert parse_wish(header) == wish
