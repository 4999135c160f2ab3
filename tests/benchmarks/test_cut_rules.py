import random
from itertools import pairwise, product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.cut_rules import PRICES, Cache, Cost, Sizes, best_possible, cheapest_cuts, cost_of, sticky_cuts
from server.policy.context import Window, plan_fit
from server.policy.turns import lay_out, view

WARM, COLD = Cache(block_size=1, answers=True), Cache(block_size=1, answers=False)

exchanges = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 60)), min_size=1, max_size=12)


def even(count: int) -> Sizes:
    """Exchanges of 100 tokens under a system prompt of 20."""
    return Sizes.of(15, [(25, 65)] * count)


@given(exchanges, st.integers(60, 400), st.sampled_from([0.5, 0.8, 1.0]))
def test_the_rule_cuts_as_the_server_does(texts: list[tuple[int, int]], room: int, ratio: float) -> None:
    sizes = Sizes.of(15, texts)
    cuts = sticky_cuts(sizes, room, ratio)
    for turn, cut in enumerate(cuts):
        said = [count for pair in zip(sizes.questions, sizes.answers, strict=True) for count in pair]
        tokens = [sizes.head, *said[: 2 * turn + 1]]
        roles = ["system", *(("user", "assistant")[i % 2] for i in range(len(tokens) - 1))]
        layout = lay_out([view({"role": role}) for role in roles])
        # Room is what a prompt may take; the marks that open an answer are no message's.
        window = Window(room + 100, reserve_tokens=100, fixed_tokens=3)
        assert plan_fit(layout, tokens, window, ratio).cut_turn == cut


def test_a_prompt_is_all_from_the_cut_on() -> None:
    sizes = even(4)
    assert sizes.prompt(turn=3, cut=0) == 20 + 300 + 30 + 3
    assert sizes.prompt(turn=3, cut=2) == 20 + 100 + 30 + 3
    assert sizes.past(252) == 2
    assert sizes.past(253) == 3


def test_while_the_cut_stays_only_what_was_added_is_computed() -> None:
    sizes = even(4)
    assert WARM.prefill(sizes, turn=3, cut=1, last_cut=1) == 2 + 30 + 3  # the answer's end mark, and the question
    assert COLD.prefill(sizes, turn=3, cut=1, last_cut=1) == 100
    assert Cache(32, answers=False).prefill(sizes, turn=3, cut=1, last_cut=1) == 253 - 128


def test_when_the_cut_moves_only_the_system_prompt_is_found() -> None:
    assert WARM.prefill(even(4), turn=3, cut=2, last_cut=1) == 153 - 20
    assert Cache(32, answers=True).prefill(even(4), turn=3, cut=2, last_cut=1) == 153


def test_a_cost_is_summed_over_the_turns_after_the_first() -> None:
    sizes, cuts = even(4), [0, 0, 1, 1]
    cost = cost_of(cuts, sizes, range(1, 4), COLD)
    assert cost == Cost(turns=2, prompt=153 + 253, prefill=133 + 100, cuts=1)
    assert cost.hit_ratio == pytest.approx(1 - 233 / 406)
    assert cost.of_one_turn() == Cost(turns=1, prompt=203, prefill=116.5, cuts=0.5)


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(0, 60)), min_size=5, max_size=6), st.sampled_from(PRICES))
def test_no_cuts_are_cheaper_than_the_cheapest(texts: list[tuple[int, int]], price: float) -> None:
    sizes, room, turns = Sizes.of(15, texts), 160, range(2, len(texts))

    def value(cuts: list[int]) -> float:
        cost = cost_of(cuts, sizes, turns, WARM)
        return cost.prefill - price * cost.prompt

    def allowed(cuts: tuple[int, ...]) -> bool:
        keeps_room = all(sizes.prompt(t, c) <= room or c == t for t, c in zip(turns, cuts, strict=True))
        return keeps_room and all(before <= after for before, after in pairwise(cuts))

    every = (cuts for cuts in product(*(range(turn + 1) for turn in turns)) if allowed(cuts))
    cheapest = cheapest_cuts(sizes, room, turns, WARM, price)
    assert allowed(tuple(cheapest[turns.start :]))
    assert value(cheapest) == pytest.approx(min(value([0, 0, *cuts]) for cuts in every))


@pytest.mark.parametrize("seed", range(3))
def test_no_rule_does_better_than_the_best_possible(seed: int) -> None:
    chance = random.Random(seed)
    sizes = Sizes.of(15, [(chance.randint(5, 60), chance.randint(5, 200)) for _ in range(60)])
    room, turns = 900, range(sizes.past(900) - 1, 60)
    most = cost_of(sticky_cuts(sizes, room, 1.0), sizes, turns, WARM)
    by_price = [cost_of(cheapest_cuts(sizes, room, turns, WARM, price), sizes, turns, WARM) for price in PRICES]
    for ratio in (0.6, 0.7, 0.8, 0.9):
        cost = cost_of(sticky_cuts(sizes, room, ratio), sizes, turns, WARM)
        best = best_possible(by_price, cost.prompt)
        if cost.prompt < most.prompt and best is not None:
            assert best.hit_ratio >= cost.hit_ratio - 1e-9


def test_between_two_prices_the_best_lies_on_the_line() -> None:
    by_price = [Cost(10, 1000, 200, 1), Cost(10, 2000, 1000, 5)]
    assert best_possible(by_price, 900) == Cost(10, 1000, 200)
    assert best_possible(by_price, 1500) == Cost(10, 1500, 600)
    assert best_possible(by_price, 2001) is None
