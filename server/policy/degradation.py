"""What each level of the ladder takes from a request, as rules on its body.

Bodies are JSON objects as the client sent them. Each rule returns a new body; none mutates its argument.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from server.policy.ladder import Level

Body = dict[str, Any]
# `none`: refuse me rather than degrade my answer. `canned`: at level 5 I take the operator's canned reply.
Wish = Literal["auto", "none", "canned"]

WISH_HEADER: Final = "x-degradation"
ECONOMY_MAX_TOKENS: Final = 512
SHORT_CONTEXT_FACTOR: Final = 0.5

_CAPS: Final = ("max_completion_tokens", "max_tokens", "max_output_tokens")
# Where a request may leave its cap open, and the field that sets one. Old completions default to 16 tokens.
_CAP_FIELD: Final[Mapping[str, str]] = {
    "/v1/chat/completions": "max_completion_tokens",
    "/v1/chat/completions/batch": "max_completion_tokens",
    "/v1/responses": "max_output_tokens",
}
_GENERATING: Final = frozenset({*_CAP_FIELD, "/v1/completions", "/v1/messages"})
_POOLING: Final = frozenset(
    {"/v1/embeddings", "/v2/embed", "/pooling", "/classify", "/score", "/v1/score", "/rerank", "/v1/rerank",
     "/v2/rerank"}
)  # fmt: skip
# The routes whose work the ladder governs; listing models or counting tokens costs next to nothing.
GOVERNED_ROUTES: Final = _GENERATING | _POOLING
_LOGPROBS: Final = ("logprobs", "top_logprobs", "prompt_logprobs")
_LOGPROBS_INCLUDED: Final = "message.output_text.logprobs"


@dataclass(frozen=True, slots=True)
class Economy:
    """A body after level 1, and what was taken from it, in the words of `x-degradation-applied`."""

    body: Body
    applied: tuple[str, ...]


def parse_wish(value: str | None) -> Wish:
    """The client's wish; words that are not known count as none given."""
    wish = (value or "").strip().lower()
    if wish == "none":
        return "none"
    return "canned" if wish == "canned" else "auto"


def governs(method: str, route: str) -> bool:
    """Whether the ladder has a say in a call."""
    return method == "POST" and route in GOVERNED_ROUTES


def context_factor(level: Level) -> float:
    """The share of the context budget that histories may fill."""
    return SHORT_CONTEXT_FACTOR if level >= Level.SHORT_CONTEXT else 1.0


def economical(body: Body, route: str, max_tokens: int = ECONOMY_MAX_TOKENS) -> Economy:
    """Level 1: at most `max_tokens` an answer, one choice, no logprobs, no beam search."""
    if route not in _GENERATING:
        return Economy(body, ())
    applied: list[str] = []
    for rule in _RULES:
        body, said = rule(body, route, max_tokens)
        applied += said
    return Economy(body, tuple(applied))


def _capped(body: Body, route: str, max_tokens: int) -> tuple[Body, list[str]]:
    caps = {field: max_tokens for field in _CAPS if _over(body.get(field), max_tokens)}
    if not any(body.get(field) is not None for field in _CAPS) and route in _CAP_FIELD:
        caps[_CAP_FIELD[route]] = max_tokens
    if not caps:
        return body, []
    if _over(body.get("min_tokens"), max_tokens):
        caps["min_tokens"] = max_tokens
    return {**body, **caps}, [f"max_tokens={max_tokens}"]


def _single(body: Body, route: str, max_tokens: int) -> tuple[Body, list[str]]:
    del route, max_tokens
    many = {field: 1 for field in ("n", "best_of") if _over(body.get(field), 1)}
    return ({**body, **many}, ["n=1"]) if many else (body, [])


def _without_logprobs(body: Body, route: str, max_tokens: int) -> tuple[Body, list[str]]:
    del route, max_tokens
    asked = [field for field in _LOGPROBS if body.get(field) is not None and body.get(field) is not False]
    included = body.get("include")
    listed = isinstance(included, list) and _LOGPROBS_INCLUDED in included
    if not asked and not listed:
        return body, []
    kept = {field: value for field, value in body.items() if field not in _LOGPROBS}
    if isinstance(included, list):
        kept["include"] = [item for item in included if item != _LOGPROBS_INCLUDED]
    return kept, ["logprobs=off"]


def _without_beams(body: Body, route: str, max_tokens: int) -> tuple[Body, list[str]]:
    del route, max_tokens
    if not body.get("use_beam_search"):
        return body, []
    return {**body, "use_beam_search": False}, ["beam_search=off"]


_RULES: Final[tuple[Callable[[Body, str, int], tuple[Body, list[str]]], ...]] = (
    _without_beams,  # first: a beam search takes its width from `n`
    _capped,
    _single,
    _without_logprobs,
)


def _over(value: Any, limit: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > limit
