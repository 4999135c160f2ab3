"""A fleet of replicas behind a router, simulated: conversations come back turn by turn, and each replica has a cache.

Coarse on purpose. A replica works off prompts one after another at a fixed pace, generates for a fixed number of
sequences at once at a fixed pace, keeps the conversations that it saw last, and refuses what it could not begin in
time, as Tidegate's gate does. Nothing here is measured on an engine; what counts is how the routers differ.
"""

import heapq
import random
from bisect import bisect
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

_RING_POINTS: Final = 64
_BOUND: Final = 1.25


@dataclass(frozen=True, slots=True)
class Machine:
    """One replica. The defaults are the order of magnitude of an 8B model on one large GPU."""

    prefill_tokens_per_s: float = 12_000
    tpot_s: float = 0.025
    sequences: int = 64
    cache_tokens: int = 400_000
    ttft_slo_s: float = 5.0


@dataclass(frozen=True, slots=True)
class People:
    """Who chats. Lengths are means of exponential draws, but for the system prompt, which all share."""

    conversations_per_s: float = 0.8  # for each replica
    turns: float = 6
    system_tokens: int = 600
    first_tokens: float = 1_500
    message_tokens: float = 150
    answer_tokens: float = 250
    think_s: float = 20
    duration_s: float = 600
    counted_from_s: float = 120


@dataclass(slots=True)
class Replica:
    """`ends`: of what was taken and has not ended. `places`: when each place for a sequence is free again."""

    machine: Machine
    places: list[float] = field(init=False)
    ends: list[float] = field(default_factory=list)
    prefill_free_s: float = 0.0
    cached: "OrderedDict[int, int]" = field(default_factory=OrderedDict)
    cached_tokens: int = 0
    taken: int = 0

    def __post_init__(self) -> None:
        self.places = [0.0] * self.machine.sequences

    def open_requests(self, now_s: float) -> int:
        while self.ends and self.ends[0] <= now_s:
            heapq.heappop(self.ends)
        return len(self.ends)

    def serve(self, now_s: float, conversation: int, prompt: int, computed: int, answer: int) -> float | None:
        """When the first token comes, or None if that would be too late. `computed`: prompt tokens not in the cache."""
        m = self.machine
        begin_s = max(now_s, self.places[0], self.prefill_free_s)
        first_s = begin_s + computed / m.prefill_tokens_per_s
        if first_s - now_s > m.ttft_slo_s:
            return None
        self.prefill_free_s = first_s
        end_s = first_s + answer * m.tpot_s
        heapq.heapreplace(self.places, end_s)
        heapq.heappush(self.ends, end_s)
        self.taken += 1
        self._remember(conversation, prompt + answer)
        return first_s

    def _remember(self, conversation: int, tokens: int) -> None:
        self.cached_tokens += tokens - self.cached.pop(conversation, 0)
        self.cached[conversation] = tokens
        while self.cached_tokens > self.machine.cache_tokens:
            self.cached_tokens -= self.cached.popitem(last=False)[1]


Router = Callable[[Sequence[Replica], float, int], int]


def round_robin() -> Router:
    """Each request to the next replica: a plain Service of Kubernetes does about the same."""
    turn = iter(range(1 << 60))
    return lambda replicas, _now_s, _conversation: next(turn) % len(replicas)


def least_requests() -> Router:
    """To the replica with the fewest open requests."""
    return lambda replicas, now_s, _conversation: min(
        range(len(replicas)), key=lambda number: replicas[number].open_requests(now_s)
    )


def by_conversation() -> Router:
    """Every turn to the replica that its conversation hashes to."""
    ring = _Ring()
    return lambda replicas, _now_s, conversation: next(ring.order(len(replicas), conversation))


def by_conversation_bounded() -> Router:
    """The same, but to the next one on the ring where that replica has a quarter more open requests than the mean."""
    ring = _Ring()

    def route(replicas: Sequence[Replica], now_s: float, conversation: int) -> int:
        open_requests = [replica.open_requests(now_s) for replica in replicas]
        most = _BOUND * (sum(open_requests) + 1) / len(replicas)
        return next(number for number in ring.order(len(replicas), conversation) if open_requests[number] < most)

    return route


class _Ring:
    """Consistent hashing: when a replica comes or goes, the others keep their conversations."""

    def __init__(self) -> None:
        self._points: list[tuple[float, int]] = []
        self._replicas = 0

    def order(self, replicas: int, conversation: int) -> Iterator[int]:
        """The replicas in the order in which this conversation would try them; some come more than once."""
        if replicas != self._replicas:
            draw = random.Random(0)
            self._points = sorted((draw.random(), number) for number in range(replicas) for _ in range(_RING_POINTS))
            self._replicas = replicas
        start = bisect(self._points, (random.Random(conversation).random(),))
        for offset in range(len(self._points)):
            yield self._points[(start + offset) % len(self._points)][1]


ROUTERS: Final[dict[str, Callable[[], Router]]] = {
    "round robin": round_robin,
    "least requests": least_requests,
    "by conversation": by_conversation,
    "by conversation, bounded": by_conversation_bounded,
}


@dataclass(frozen=True, slots=True)
class Outcome:
    """Shares and seconds. `imbalance`: what the busiest replica took, over the mean."""

    hit_ratio: float
    refused_ratio: float
    ttft_p50_s: float
    ttft_p99_s: float
    imbalance: float


def simulate(replicas: int, router: Router, machine: Machine, people: People, seed: int = 0) -> Outcome:
    """So many replicas under a load that grows with their number."""
    fleet = [Replica(machine) for _ in range(replicas)]
    run = _Run(fleet, router, people, random.Random(seed))
    run.start_conversations(people.conversations_per_s * replicas)
    run.until_all_is_done()
    ttfts_s = sorted(run.ttfts_s)
    taken = [replica.taken for replica in fleet]
    return Outcome(
        hit_ratio=1 - run.computed / run.prompts,
        refused_ratio=run.refused / (run.refused + len(ttfts_s)),
        ttft_p50_s=ttfts_s[len(ttfts_s) // 2],
        ttft_p99_s=ttfts_s[int(len(ttfts_s) * 0.99)],
        imbalance=max(taken) * replicas / sum(taken),
    )


class _Run:
    """The turns that are still to come, and what was counted of those that came. A refused person leaves."""

    def __init__(self, fleet: Sequence[Replica], router: Router, people: People, draw: random.Random) -> None:
        self._fleet, self._router, self._people, self._draw = fleet, router, people, draw
        self._turns: list[tuple[float, int, int]] = []  # time, conversation, tokens of its history
        self.ttfts_s: list[float] = []
        self.refused = self.computed = self.prompts = 0

    def start_conversations(self, per_s: float) -> None:
        now_s, number = 0.0, 0
        while (now_s := now_s + self._draw.expovariate(per_s)) < self._people.duration_s:
            first = self._people.system_tokens + self._length(self._people.first_tokens)
            heapq.heappush(self._turns, (now_s, number, first))
            number += 1

    def until_all_is_done(self) -> None:
        while self._turns:
            now_s, conversation, history = heapq.heappop(self._turns)
            if now_s < self._people.duration_s:
                self._turn(now_s, conversation, history)

    def _turn(self, now_s: float, conversation: int, history: int) -> None:
        p = self._people
        prompt, answer = history + self._length(p.message_tokens), self._length(p.answer_tokens)
        replica = self._fleet[self._router(self._fleet, now_s, conversation)]
        computed = prompt - max(p.system_tokens, replica.cached.get(conversation, 0))
        first_s = replica.serve(now_s, conversation, prompt, computed, answer)
        if now_s >= p.counted_from_s:
            self._count(now_s, first_s, prompt, computed)
        if first_s is not None and self._draw.random() > 1 / p.turns:
            end_s = first_s + answer * replica.machine.tpot_s
            again_s = end_s + self._draw.expovariate(1 / p.think_s)
            heapq.heappush(self._turns, (again_s, conversation, prompt + answer))

    def _count(self, now_s: float, first_s: float | None, prompt: int, computed: int) -> None:
        if first_s is None:
            self.refused += 1
            return
        self.ttfts_s.append(first_s - now_s)
        self.prompts += prompt
        self.computed += computed

    def _length(self, mean: float) -> int:
        return 1 + int(self._draw.expovariate(1 / mean))
