"""Who a request belongs to, and what its owner may use."""

import re
from dataclasses import dataclass
from typing import Final, Literal

TrafficClass = Literal["critical", "default", "batch"]

# A name is part of keys in Redis, of labels in metrics and of paths in the operator API.
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_END_USER: Final = re.compile(r"[A-Za-z0-9._@+:-]{1,128}")


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

    def may_use(self, model: str) -> bool:
        return self.models is None or model in self.models


# Whoever calls a server that is open, or whose keys are given on the command line.
ANYONE: Final = Tenant("anyone")
# Whoever holds the operator key.
OPERATOR: Final = Tenant("operator")
_RESERVED: Final = frozenset({ANYONE.name, OPERATOR.name})


@dataclass(frozen=True, slots=True)
class Key:
    """One key of a tenant, as the operator sees it. The key itself is known to its holder alone.

    Times are seconds since 1970; `expires_s` None: it works until it is revoked.
    """

    key_id: str
    tenant: str
    created_s: float
    expires_s: float | None = None
    last_used_s: float | None = None

    def expired(self, now_s: float) -> bool:
        return self.expires_s is not None and now_s >= self.expires_s


def name_problem(name: str) -> str | None:
    """What is wrong with a tenant's name, as a sentence; None if it can be used."""
    if _NAME.fullmatch(name) is None:
        return (
            f"`{name}` cannot be a tenant's name: use up to 64 letters, digits, dots, dashes and underscores, "
            "and begin with a letter or a digit."
        )
    return f"`{name}` cannot be a tenant's name: the server uses it itself." if name in _RESERVED else None


def is_plain_end_user(name: str) -> bool:
    """Whether an end user's name can stand in keys and logs as it is."""
    return _END_USER.fullmatch(name) is not None
