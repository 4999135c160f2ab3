"""What the level of the ladder does to one call, before the call reaches an engine."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final, Protocol

from server.engine.calls import Call, Reply, StreamReply
from server.policy.degradation import WISH_HEADER, context_factor, economical, governs, parse_wish
from server.policy.ladder import Level
from server.policy.refusals import Closed, NotDegraded, Overloaded
from server.serving.canned import canned_reply
from server.serving.requests import OpenRequest
from server.telemetry.resilience import ResilienceMetrics

# The ladder steps down after 15 s of low pressure at the earliest; the refused should not all come back at once.
_RETRY_AFTER_S: Final = 20.0
_BATCH_RETRY_AFTER_S: Final = 60.0
_WISH_HEADER: Final = WISH_HEADER.encode()


@dataclass(frozen=True, slots=True)
class DegradationRules:
    """`canned_reply` is what clients that opted in are told at level 5; None refuses them like all others."""

    economy_max_tokens: int
    canned_reply: str | None


class Levels(Protocol):
    """Who knows the level."""

    @property
    def level(self) -> Level: ...

    @property
    def chosen(self) -> Level: ...

    @property
    def chosen_by_hand(self) -> bool: ...


class Degradation:
    """Applies the level that counts now."""

    def __init__(self, ladder: Levels, rules: DegradationRules, metrics: ResilienceMetrics) -> None:
        self.ladder = ladder
        self._rules = rules
        self._metrics = metrics

    def apply(self, call: Call, request: OpenRequest) -> Call:
        """The call with what its level takes from it; the client is told in the answer's head. Raises `Refusal`."""
        level = self.ladder.level
        if level == Level.NORMAL or not governs(call.method, call.route):
            return call
        request.wish = parse_wish(_header(call, _WISH_HEADER))
        request.headers["x-degradation-level"] = str(int(level))
        request.figures.level = int(level)
        self._metrics.degraded(level)
        self._refuse(level, request)
        economy = economical(call.body or {}, call.route, self._rules.economy_max_tokens)
        if economy.applied:
            if request.wish == "none" and self.ladder.chosen > Level.NORMAL:
                raise _not_degraded()
            request.degraded(*economy.applied)
        request.context_factor = context_factor(level)
        return replace(call, body=economy.body)

    def goes_to_fallback(self, request: OpenRequest) -> bool:
        """Whether a call is to be answered by a fallback upstream. Raises `NotDegraded`.

        While the engine is down a client that wants no degraded answer waits for the next engine instead.
        """
        if self.ladder.level < Level.FALLBACK:
            return False
        if request.wish != "none":
            return True
        if self.ladder.chosen >= Level.FALLBACK:
            raise _not_degraded()
        return False

    def may_be_a_canary(self, call: Call) -> bool:
        """Whether a client takes another server's answer although all is well."""
        return parse_wish(_header(call, _WISH_HEADER)) != "none"

    def canned(self, call: Call, request: OpenRequest) -> Reply | StreamReply | None:
        """The operator's canned reply, where the server is closed and the client takes one."""
        text = self._rules.canned_reply
        if text is None or self.ladder.level < Level.CLOSED or not governs(call.method, call.route):
            return None
        if parse_wish(_header(call, _WISH_HEADER)) != "canned":
            return None
        reply = canned_reply(call.route, call.body or {}, text, request)
        if reply is not None:
            request.headers["x-degradation-level"] = str(int(Level.CLOSED))
            request.figures.level = int(Level.CLOSED)
            request.degraded("canned_reply")
        return reply

    def _refuse(self, level: Level, request: OpenRequest) -> None:
        if level >= Level.CLOSED:
            raise Closed(
                "The server is closed for requests at the moment. Please try again later.",
                retry_after_s=_BATCH_RETRY_AFTER_S,
            )
        if level >= Level.ESSENTIAL and request.tenant.traffic_class == "batch":
            raise Overloaded(
                "The server takes no batch work at the moment. Please try again later.",
                retry_after_s=_BATCH_RETRY_AFTER_S,
            )


def _not_degraded() -> NotDegraded:
    return NotDegraded(
        "The server is short of capacity and could give only a shortened answer. Please try again later.",
        retry_after_s=_RETRY_AFTER_S,
    )


def _header(call: Call, name: bytes) -> str | None:
    headers: Mapping[bytes, bytes] = dict(call.headers)
    value = headers.get(name)
    return None if value is None else value.decode("latin-1")
