"""What a rule that cuts chat histories costs, worked out from token counts alone: no server, no model.

An engine with a prefix cache computes of a prompt what does not stand, block by block, at the beginning of an earlier
one. Rules that drop the oldest exchanges whole differ only in when they move the cut, and how far. When it moves, all
but the system prompt has to be computed again; when it stays, only what was added.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Final

# What ChatML prints around a message: two marks, the role and two line breaks. The first three open an answer.
_AROUND_MESSAGE_TOKENS: Final = 5
_OPENING_TOKENS: Final = 3
# What a token of history may cost in tokens of prefill. The bar of 85% lies between these prices for exchanges of some
# thousandths to a third of the room: with a share x of it, a price p makes about sqrt(2 / (p x)) turns for each cut.
PRICES: Final = tuple(2 ** (step / 2) for step in range(-10, 5))


@dataclass(frozen=True, slots=True)
class Sizes:
    """A conversation in tokens: its system prompt, and its questions and answers with what stands around them."""

    head: int
    questions: Sequence[int]
    answers: Sequence[int]
    before: Sequence[int]  # for each exchange, the tokens of all earlier ones

    @classmethod
    def of(cls, head: int, exchanges: Iterable[tuple[int, int]]) -> "Sizes":
        """From the tokens of the bare texts."""
        pairs = [(asked + _AROUND_MESSAGE_TOKENS, said + _AROUND_MESSAGE_TOKENS) for asked, said in exchanges]
        before = [0, *accumulate(asked + said for asked, said in pairs)]
        return cls(head + _AROUND_MESSAGE_TOKENS, [a for a, _ in pairs], [s for _, s in pairs], before)

    def turns(self, turn: int, cut: int) -> int:
        """What the exchanges from `cut` on take when question `turn` is asked."""
        return self.before[turn] - self.before[cut] + self.questions[turn]

    def prompt(self, turn: int, cut: int) -> int:
        """The prompt's length; it ends with the marks that open the answer."""
        return self.head + self.turns(turn, cut) + _OPENING_TOKENS

    def past(self, tokens: int) -> int:
        """The first question whose whole history is longer than this, or the number of questions."""
        return bisect_right(range(len(self.questions)), tokens, key=lambda turn: self.prompt(turn, 0))


@dataclass(frozen=True, slots=True)
class Cache:
    """Which prefixes an engine finds again. `answers`: also what it generated itself, as in a real chat."""

    block_size: int
    answers: bool

    def prefill(self, sizes: Sizes, turn: int, cut: int, last_cut: int) -> int:
        """The tokens to compute for question `turn`, right after the one before it."""
        prompt, found = sizes.prompt(turn, cut), sizes.head
        if cut == last_cut:
            found = sizes.prompt(turn - 1, cut)
            if self.answers:
                found += sizes.answers[turn - 1] - _AROUND_MESSAGE_TOKENS
        return prompt - min(found, prompt - 1) // self.block_size * self.block_size


@dataclass(frozen=True, slots=True)
class Cost:
    """Tokens, summed over turns or of a mean one."""

    turns: float = 0
    prompt: float = 0
    prefill: float = 0
    cuts: float = 0  # turns in which the cut moved

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(
            self.turns + other.turns,
            self.prompt + other.prompt,
            self.prefill + other.prefill,
            self.cuts + other.cuts,
        )

    def of_one_turn(self) -> "Cost":
        return Cost(1, *(figure / self.turns for figure in (self.prompt, self.prefill, self.cuts)))

    @property
    def hit_ratio(self) -> float:
        return 1 - self.prefill / self.prompt


def sticky_cuts(sizes: Sizes, room: int, retention_ratio: float) -> list[int]:
    """Tidegate's rule, for every question; a ratio of 1 is the client that drops no more than it must.

    When the exchanges are over the room, less the system prompt, the oldest go until that share of it is left.
    """
    budget, cut, cuts = room - sizes.head - _OPENING_TOKENS, 0, list[int]()
    for turn in range(len(sizes.questions)):
        if sizes.turns(turn, cut) > budget:
            while cut < turn and sizes.turns(turn, cut) > int(budget * retention_ratio):
                cut += 1
        cuts.append(cut)
    return cuts


def cost_of(cuts: Sequence[int], sizes: Sizes, turns: range, cache: Cache) -> Cost:
    """What the questions after the first of `turns` cost; the first fills the cache."""
    total = Cost()
    for turn in turns[1:]:
        cut, last = cuts[turn], cuts[turn - 1]
        total += Cost(1, sizes.prompt(turn, cut), cache.prefill(sizes, turn, cut, last), int(cut != last))
    return total


def cheapest_cuts(sizes: Sizes, room: int, turns: range, cache: Cache, price: float) -> list[int]:
    """The cuts of a rule that knows the future: they minimize prefill - price * prompt, summed over `turns`.

    It too drops the oldest exchanges whole, never takes one back, and keeps the room. Dynamic programming over the
    questions; once the cut moves, it does not matter where it was.
    """
    value = dict.fromkeys(range(_least_cut(sizes, turns.start, room), turns.start + 1), 0.0)
    origins = list[dict[int, int]]()
    for turn in turns[1:]:
        reached, came_from, best = dict[int, float](), dict[int, int](), min(value)
        least = _least_cut(sizes, turn, room)
        for cut in range(best, turn + 1):
            ways = [(value[last] + cache.prefill(sizes, turn, cut, last), last) for last in {best, cut} & value.keys()]
            if cut >= least:
                total, came_from[cut] = min(ways)
                reached[cut] = total - price * sizes.prompt(turn, cut)
            if cut in value and value[cut] < value[best]:
                best = cut
        value = reached
        origins.append(came_from)
    path = [min(value, key=value.__getitem__)]
    for came_from in reversed(origins):
        path.append(came_from[path[-1]])
    return [0] * turns.start + path[::-1]


def _least_cut(sizes: Sizes, turn: int, room: int) -> int:
    """The lowest cut that keeps the room, or the question alone."""
    return bisect_left(range(turn), True, key=lambda cut: sizes.prompt(turn, cut) <= room)


def best_possible(by_price: Sequence[Cost], least_prompt: float) -> Cost | None:
    """The highest hit ratio that any rule can have which keeps so many tokens of history; None if none does.

    `by_price` are the costs of `cheapest_cuts` at several prices. Each is the least prefill for the history that it
    keeps, and between two of them no rule gets below the straight line.
    """
    points = sorted((cost.prompt, cost.prefill) for cost in by_price)
    feasible = [point for point in points if point[0] >= least_prompt]
    for (low, low_prefill), (high, high_prefill) in pairwise(points):
        if low < least_prompt <= high:
            share = (least_prompt - low) / (high - low)
            feasible.append((least_prompt, low_prefill + share * (high_prefill - low_prefill)))
    if not feasible:
        return None
    prompt, prefill = min(feasible, key=lambda point: point[1] / point[0])
    return Cost(by_price[0].turns, prompt, prefill)
