"""What the engine's running requests hold: KV tokens promised to them, and places."""

from collections.abc import Iterable, Set
from dataclasses import dataclass
from typing import Final

from server.policy.backlog import Ticket
from server.policy.room import Room
from server.policy.tenants import TrafficClass

MAX_EVICTIONS: Final = 3


@dataclass(eq=False, slots=True)
class Held:
    """A request that was let in. `prompt_tokens` of the `reserved` ones are filled once it is `prefilled`.

    `streamed`: its client has seen some of the answer. `evicted`: it was told to give its place up.
    """

    ticket: Ticket
    reserved: int
    sequences: int
    prompt_tokens: int
    admitted_s: float
    prefilled: bool = False
    streamed: bool = False
    evicted: bool = False

    @property
    def unfilled(self) -> int:
        """KV tokens promised and surely not in use yet."""
        return self.reserved - (min(self.prompt_tokens, self.reserved) if self.prefilled else 0)

    @property
    def evictable(self) -> bool:
        """Batch work that has streamed nothing loses only time. A few times, so that it ends one day."""
        batch = self.ticket.traffic_class == "batch"
        return batch and not self.streamed and not self.evicted and self.ticket.returned < MAX_EVICTIONS


class Ledger:
    """Sums over all that is held; each is exactly 0 when nothing is."""

    def __init__(self) -> None:
        self._held: dict[int, Held] = {}
        self.reserved = 0
        self.sequences = 0
        self.prefilling = 0  # sequences whose prompt is not in the KV cache yet
        self.prefilling_tokens = 0  # and the tokens of these prompts
        self.critical_sequences = 0
        self.offline_sequences = 0  # lines of batches
        self.offline_reserved = 0
        self._unfilled = 0
        self.busy_since_s = 0.0  # since when something has been held without a break
        self._admitted_s = 0.0
        self._by_tenant: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._held)

    def running(self, traffic_class: TrafficClass) -> int:
        """How many requests of a class run."""
        return sum(held.ticket.traffic_class == traffic_class for held in self._held.values())

    def equal_part(self, tenant: str, waiting: Set[str], limit: int) -> int:
        """An equal part of `limit` places for a tenant among all that run or wait; 0 where there is no other."""
        tenants = len(self._by_tenant.keys() | waiting | {tenant})
        return max(1, limit // tenants) if tenants > 1 else 0

    def places_of(self, tenant: str) -> int:
        """How many sequences of a tenant run."""
        return self._by_tenant.get(tenant, 0)

    def admit(self, held: Held) -> None:
        if not self._held:
            self.busy_since_s = held.admitted_s
        self._held[held.ticket.number] = held
        self._hold(held, 1)
        self._prefilling(held, 1)
        self._unfilled += held.unfilled
        self._admitted_s += held.admitted_s
        tenant = held.ticket.tenant
        self._by_tenant[tenant] = self._by_tenant.get(tenant, 0) + held.sequences

    def prefilled(self, held: Held) -> None:
        """Its prompt is in the KV cache."""
        if held.prefilled or held.ticket.number not in self._held:
            return
        self._unfilled -= held.unfilled
        held.prefilled = True
        self._unfilled += held.unfilled
        self._prefilling(held, -1)

    def release(self, held: Held) -> bool:
        """Give back what it holds. Returns False when that was done before."""
        if self._held.pop(held.ticket.number, None) is None:
            return False
        self._hold(held, -1)
        self._unfilled -= held.unfilled
        if not held.prefilled:
            self._prefilling(held, -1)
        tenant = held.ticket.tenant
        self._by_tenant[tenant] -= held.sequences
        if not self._by_tenant[tenant]:
            del self._by_tenant[tenant]
        self._admitted_s = self._admitted_s - held.admitted_s if self._held else 0.0
        return True

    def _hold(self, held: Held, sign: int) -> None:
        self.reserved += sign * held.reserved
        self.sequences += sign * held.sequences
        if held.ticket.traffic_class == "critical":
            self.critical_sequences += sign * held.sequences
        if held.ticket.offline:
            self.offline_reserved += sign * held.reserved
            self.offline_sequences += sign * held.sequences

    def _prefilling(self, held: Held, sign: int) -> None:
        self.prefilling += sign * held.sequences
        self.prefilling_tokens += sign * held.ticket.ask.prompt_tokens

    def promised(self, used_tokens: float) -> float:
        """KV tokens that are spoken for, where `used_tokens` are in use by the engine's own count.

        Both the sum of all reservations and what is in use plus what is still to be filled are upper bounds. The
        second counts a prompt prefix once that several requests share; the first does not lag a step behind. Answers
        that became longer than was expected are counted as they are.
        """
        if not self._held:
            return 0.0
        return max(used_tokens, min(self.reserved, used_tokens + self._unfilled))

    def mean_age_s(self, now_s: float) -> float:
        """How long the requests that run have been running, on average."""
        return now_s - self._admitted_s / len(self._held) if self._held else 0.0

    def victims(self) -> list[Held]:
        """What can be given up for a critical request, the least work first."""
        return sorted(
            (held for held in self._held.values() if held.evictable),
            key=lambda held: (held.admitted_s, held.ticket.number),
            reverse=True,
        )

    def overhang(self, share: Room) -> list[Held]:
        """Of the batches' lines, what they hold beyond their share and can give up, the least work first."""
        places, tokens = self.offline_sequences - share.places, self.offline_reserved - share.kv_tokens
        if max(places, tokens) <= 0:
            return []
        going = self.given_up(())
        places, tokens = places - going.places, tokens - going.kv_tokens
        beyond: list[Held] = []
        for held in self.victims():
            if max(places, tokens) <= 0:
                break
            if held.ticket.offline:
                beyond.append(held)
                places, tokens = places - held.sequences, tokens - held.reserved
        return beyond

    def given_up(self, victims: Iterable[Held]) -> Room:
        """What is free once these are gone, and those that were told before."""
        going = [*(held for held in self._held.values() if held.evicted), *victims]
        return Room(sum(held.sequences for held in going), sum(held.reserved for held in going))


def spared(chosen: list[Held]) -> list[Held]:
    """Nothing is given up where that would not be enough."""
    for held in chosen:
        held.evicted = False
    return []
