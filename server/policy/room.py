"""How much of the engine may be taken, in all, while a request is let in."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil
from typing import Final

from server.policy.reservations import CLASS_SHARES, Capacity
from server.policy.tenants import TrafficClass

# Shares of the running cap, as `CLASS_SHARES` are of the KV cache.
_PLACES: Final[Mapping[TrafficClass, float]] = {**CLASS_SHARES, "critical": 1.3}
_FAVOURED_PLACES: Final = 1.15
_FAVOUR: Final = 2


@dataclass(frozen=True, slots=True)
class Room:
    """Sequences, and KV tokens. `favour`: how many times the usual number of prompts may be in the engine with it.

    `whole`: nobody else is there.
    """

    places: int
    kv_tokens: int
    favour: int = 1
    whole: bool = False


NOTHING: Final = Room(0, 0)


def room_for(traffic_class: TrafficClass, limit: int, capacity: Capacity, *, favoured: bool) -> Room:
    """What a class may fill, if `limit` sequences keep the pace.

    The limit is about speed and not about memory: who goes first may pass it by a little, and it falls for the others
    until the pace is right again.
    """
    if traffic_class == "batch":
        return Room(max(1, int(_PLACES["batch"] * limit)), capacity.kv_limit("batch"))
    favoured = favoured and traffic_class == "default"
    share = _FAVOURED_PLACES if favoured else _PLACES[traffic_class]
    tokens = capacity.kv_limit("critical" if favoured else traffic_class)
    # Rounded up: two places are two places for people.
    return Room(
        min(ceil(share * limit), capacity.max_running),
        tokens,
        favour=_FAVOUR if favoured or traffic_class == "critical" else 1,
    )


def whole_engine(capacity: Capacity) -> Room:
    """What batches may fill while nobody else is there: no share is kept, and no pace."""
    return Room(capacity.max_running, capacity.kv_limit("critical"), favour=_FAVOUR, whole=True)
