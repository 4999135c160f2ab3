"""On which terms a request waits: its class, its patience, its place among its tenant's own requests."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from server.policy.refusals import InvalidRequest
from server.policy.tenants import TrafficClass

# Highest first; a class is served before every class after it.
TRAFFIC_CLASSES: Final[tuple[TrafficClass, ...]] = ("critical", "default", "batch")
TIMEOUT_HEADER: Final = "x-request-timeout"

# OpenAI's `service_tier`, and the best class that it asks for. `auto` and no tier are the tenant's own class.
_TIER_CLASSES: Final[Mapping[str, TrafficClass]] = {
    "priority": "critical",
    "scale": "critical",
    "default": "default",
    "flex": "batch",
}
_MAX_TIMEOUT_S: Final = 24 * 3600.0
# vLLM serves the lower number first. Between two classes lie this many steps, for a client's own order.
_CLASS_STEP: Final = 1000


@dataclass(frozen=True, slots=True)
class Terms:
    """`timeout_s`: how long the client will wait for its first token; None: as long as its class does.

    `priority`: 0, or how far the client put this request behind its other ones. `offline`: nobody waits for its first
    token, as for a line of a batch.
    """

    traffic_class: TrafficClass = "default"
    timeout_s: float | None = None
    priority: int = 0
    offline: bool = False

    def engine_priority(self, asked: int) -> int:
        """The number for vLLM's scheduler. A client can only raise it, which is to wait longer."""
        behind = max(self.priority, _lowered(asked))
        return TRAFFIC_CLASSES.index(self.traffic_class) * _CLASS_STEP + behind


DEFAULT_TERMS: Final = Terms()


def terms_of(body: Mapping[str, Any], timeout: str | None, tenant_class: TrafficClass) -> Terms:
    """The terms that a body and the header `x-request-timeout` ask for, within what the tenant may have.

    Values that vLLM will refuse for their type are left for it to name. Raises `InvalidRequest`.
    """
    priority = body.get("priority")
    asked = priority if isinstance(priority, int) and not isinstance(priority, bool) else 0
    return Terms(
        traffic_class=_class_for(body.get("service_tier"), tenant_class),
        timeout_s=None if timeout is None else _timeout_s(timeout),
        priority=_lowered(asked),
    )


def _lowered(priority: int) -> int:
    return min(max(priority, 0), _CLASS_STEP - 1)


def _class_for(tier: Any, tenant_class: TrafficClass) -> TrafficClass:
    asked = _TIER_CLASSES.get(tier, tenant_class) if isinstance(tier, str) else tenant_class
    return max(asked, tenant_class, key=TRAFFIC_CLASSES.index)


def _timeout_s(value: str) -> float:
    try:
        seconds = float(value)
    except ValueError:
        seconds = float("nan")
    if not 0 < seconds <= _MAX_TIMEOUT_S:  # "nan" is not, either
        message = f"The header {TIMEOUT_HEADER} is the seconds to wait for the first token: 2.5, and at most 86400."
        raise InvalidRequest(message, param=TIMEOUT_HEADER)
    return seconds
