"""Who a request belongs to, and what its owner may use."""

from dataclasses import dataclass
from typing import Final, Literal

TrafficClass = Literal["critical", "default", "batch"]


@dataclass(frozen=True, slots=True)
class Limits:
    """How much one tenant, or one end user of it, may use. None: no limit in that dimension."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    tokens_per_day: int | None = None
    concurrency: int | None = None


@dataclass(frozen=True, slots=True)
class Tenant:
    """One team behind one or more keys.

    `models` None allows every model. `end_user_limits` apply to each end user that a `trusted` tenant names.
    """

    name: str
    traffic_class: TrafficClass = "default"
    limits: Limits = Limits()
    models: frozenset[str] | None = None
    trusted: bool = False
    end_user_limits: Limits | None = None


# Whoever calls a server that is open, or whose keys are given on the command line.
ANYONE: Final = Tenant("anyone")
