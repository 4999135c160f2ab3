"""One client call from its validated envelope to the engine's reply: the rules before, the operation, the notes."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final, Protocol

import structlog

from server.engine.calls import Call, Reply, StreamReply
from server.policy.bodies import (
    CLOSED_HEADERS,
    MaxTokensDefaults,
    is_tool_call_forced,
    least_prompt_tokens,
    refuse_closed_fields,
    with_default_max_tokens,
    with_possible_max_tokens,
    with_strict_forced_tools,
    without_tools,
)
from server.policy.context import parse_truncation
from server.policy.refusals import InvalidRequest, ModelNotFound, Overloaded, Unsupported
from server.policy.tenants import Tenant
from server.policy.terms import TIMEOUT_HEADER, terms_of
from server.serving.charging import Charging
from server.serving.degradation import Degradation
from server.serving.engine_slot import EngineSlot
from server.serving.fallback import Fallback
from server.serving.fitting import HistoryFitter, described
from server.serving.recovery import Recovery
from server.serving.requests import DryRun, OpenRequest, OpenRequests
from server.serving.several import OneByOne
from server.serving.turnstile import Turnstile

if TYPE_CHECKING:
    from server.engine.stack import Stack

log = structlog.get_logger(__name__)

_FALLBACK_RETRY_AFTER_S: Final = 10.0
CONTEXT_FIT_ROUTE: Final = "/v1/context/fit"
CHAT_ROUTE: Final = "/v1/chat/completions"
RESPONSES_ROUTE: Final = "/v1/responses"
MODELS_ROUTE: Final = "/v1/models"
# Where a request may leave its cap open, and the field that holds it.
_CAP_FIELDS: Final[Mapping[str, str]] = {CHAT_ROUTE: "max_completion_tokens", RESPONSES_ROUTE: "max_output_tokens"}
_CANCEL_ROUTE: Final = f"{RESPONSES_ROUTE}/{{response_id}}/cancel"
_TOKENIZER_ROUTE: Final = "/tokenizer_info"
_COUNT_ROUTE: Final = "/v1/messages/count_tokens"
# These use nothing that a limit counts.
_FREE_ROUTES: Final = frozenset({"/tokenize", "/detokenize", _COUNT_ROUTE})
_FITTED_ROUTES: Final = frozenset(
    {CHAT_ROUTE, f"{CHAT_ROUTE}/batch", RESPONSES_ROUTE, "/v1/messages", "/v1/completions", "/tokenize"}
)
# Whose work goes through the engine.
GATED_ROUTES: Final = frozenset(
    {CHAT_ROUTE, f"{CHAT_ROUTE}/batch", RESPONSES_ROUTE, "/v1/messages", "/v1/completions", "/v1/embeddings",
     "/v2/embed", "/pooling", "/classify", "/score", "/v1/score", "/rerank", "/v1/rerank", "/v2/rerank"}
)  # fmt: skip
_TIMEOUT_HEADER: Final = TIMEOUT_HEADER.encode()
# What of a chat request decides its prompt.
_RENDERED_FIELDS: Final = frozenset(
    {"model", "messages", "tools", "truncation", "chat_template", "chat_template_kwargs", "add_generation_prompt",
     "continue_final_message", "add_special_tokens", "media_io_kwargs", "mm_processor_kwargs"}
)  # fmt: skip
_TOOL_ROUTES: Final = frozenset(
    {CHAT_ROUTE, f"{CHAT_ROUTE}/batch", RESPONSES_ROUTE, "/v1/messages", "/v1/messages/count_tokens"}
)


@dataclass(frozen=True, slots=True)
class BodyRules:
    """The operator's choices about bodies and headers."""

    opened_fields: frozenset[str]
    max_tokens: MaxTokensDefaults


class Knockable(Protocol):
    """A gate, as far as requests ask it before anything is tokenized."""

    def knock(self, request: OpenRequest, least_prompt_tokens: int) -> Awaitable[None] | None:
        """Raise `Overloaded` for what would surely be refused, at once or when the answer is awaited."""
        ...


@dataclass(frozen=True, slots=True)
class Guards:
    """What stands around the engine. `restart_wait_s`: how long a request waits while a dead one is replaced.
    `one_by_one` answers calls of several prompts of which one is bad."""

    gate: Knockable
    charging: Charging
    recovery: Recovery
    degradation: Degradation
    fallback: Fallback
    restart_wait_s: float
    one_by_one: OneByOne


class Service:
    """Answers calls on whichever stack serves now."""

    def __init__(
        self, slot: EngineSlot, requests: OpenRequests, rules: BodyRules, fitter: HistoryFitter, guards: Guards
    ) -> None:
        self._charging = guards.charging
        self._one_by_one = guards.one_by_one
        self.slot = slot
        self._gate = guards.gate
        self.requests = requests
        self.turnstile = Turnstile()
        self.recovery = guards.recovery
        self._rules = rules
        self._fitter = fitter
        self._degradation = guards.degradation
        self._fallback = guards.fallback
        self._restart_wait_s = guards.restart_wait_s
        closed = () if "headers" in rules.opened_fields else CLOSED_HEADERS
        self._closed_headers = frozenset(name.encode() for name in closed)

    @property
    def ready(self) -> bool:
        """Whether a new request would be served."""
        return self.slot.ready and not self.requests.leaving

    @property
    def stage(self) -> str:
        """What the server is doing, for a person who asks."""
        return "draining" if self.requests.leaving else self.slot.stage

    @property
    def limits_mode(self) -> str:
        """Where limits are kept now: `redis` or `local`."""
        return self._charging.mode

    async def model_cards(self, tenant: Tenant) -> list[dict[str, Any]]:
        """The served models and adapters as `/v1/models` lists them to a tenant."""
        asked = OpenRequest(request_id="", path=MODELS_ROUTE, tenant=tenant)
        reply = await self.answer(Call("GET", MODELS_ROUTE), asked)
        assert isinstance(reply, Reply)
        cards: list[dict[str, Any]] = json.loads(reply.body)["data"]
        return cards

    def body_schemas(self) -> dict[tuple[str, str], dict[str, Any]]:
        """The JSON schemas of request bodies by method and path; none while no engine serves."""
        return self.slot.stack.body_schemas() if self.slot.ready else {}

    async def answer(self, call: Call, request: OpenRequest) -> Reply | StreamReply:
        """Apply the level, the body rules and run the operation. Raises `Refusal`."""
        if call.route == CONTEXT_FIT_ROUTE:
            return await self._context_fit(call, request)
        if (canned := self._degradation.canned(call, request)) is not None:
            return canned
        call = self._degradation.apply(call, request)
        if self._fallback and (reply := await self._elsewhere(call, request)) is not None:
            return reply
        await self.slot.wait(self._restart_wait_s)
        return await self._on_engine(call, request)

    async def _on_engine(self, call: Call, request: OpenRequest) -> Reply | StreamReply:
        request.stack = stack = self.slot.stack
        operation = stack.operation(call.method, call.route)
        if operation is None:
            default = stack.model_names[0]
            who = f"The model `{default}`" if request.tenant.may_use(default) else "This server"
            raise Unsupported(f"{who} does not support {call.method} {call.route}.")
        if (call.method == "POST" and call.route != _CANCEL_ROUTE) or call.route == _TOKENIZER_ROUTE:
            _refuse_foreign_models(call.body or {}, stack.model_names[0], request.tenant)
        if call.route in GATED_ROUTES and (asked := self._knock(call, stack, request)) is not None:
            await asked
        body = None if call.body is None else self._ruled(call, call.body, stack, request)
        if call.method == "POST" and call.route not in _FREE_ROUTES:
            request.model_name = request.model or stack.model_names[0]
            self._charging.check(request)
        ruled = replace(call, body=body, headers=self._headers(call, request))
        try:
            reply = await operation(ruled)
        except ModelNotFound as absent:
            raise _told_to(request.tenant, request.model, absent) from absent
        except InvalidRequest as refusal:
            reply = await self._one_by_one.answer(operation, ruled, refusal, request)
        return _own_models(reply, request.tenant) if call.route == MODELS_ROUTE else reply

    async def engine_for(self, call: Call, request: OpenRequest) -> None:
        """Wait while a dead engine is replaced, unless the call has somewhere else to go."""
        if not (self._fallback and self._fallback.knows(call) and self._degradation.goes_to_fallback(request)):
            await self.slot.wait(self._restart_wait_s)

    async def _elsewhere(self, call: Call, request: OpenRequest) -> Reply | StreamReply | None:
        """A fallback upstream's answer, or None where the engine is to give it. Raises `Overloaded`."""
        if not self._fallback.knows(call):
            return None
        refuse_closed_fields(call.body or {}, self._rules.opened_fields)
        _refuse_foreign_models(call.body or {}, self.slot.default_model, request.tenant)
        self._charging.check(request)
        if not self._degradation.goes_to_fallback(request):
            if self.slot.down or not self._degradation.may_be_a_canary(call):
                return None
            return await self._fallback.canary(call, request)
        reply = await self._fallback.answer(call, request)
        if reply is None and self._degradation.ladder.chosen_by_hand and not self.slot.down:
            raise Overloaded(
                "The server is short of capacity, and no fallback answers. Please try again later.",
                retry_after_s=_FALLBACK_RETRY_AFTER_S,
            )
        return reply

    async def _context_fit(self, call: Call, request: OpenRequest) -> Reply:
        """What fitting a chat would keep and drop, without generating anything."""
        request.dry_run = dry_run = DryRun()
        wanted = {key: value for key, value in (call.body or {}).items() if key in _RENDERED_FIELDS}
        await self.answer(replace(call, route="/tokenize", body=wanted), request)
        if dry_run.report is None:
            raise Unsupported("This model's histories are not fitted.")
        return Reply(json.dumps(described(dry_run.report)).encode(), "application/json")

    def _knock(self, call: Call, stack: Stack, request: OpenRequest) -> Awaitable[None] | None:
        """Settle how the request waits, and refuse it before any work on it if it would wait too long."""
        if (body := call.body) is None:
            return None
        timeout = next((value for name, value in call.headers if name == _TIMEOUT_HEADER), None)
        asked = terms_of(body, None if timeout is None else timeout.decode("latin-1"), request.tenant.traffic_class)
        request.terms = replace(asked, offline=True) if request.of_batch else asked
        return self._gate.knock(request, least_prompt_tokens(body, stack.max_model_len))

    def _ruled(self, call: Call, body: dict[str, Any], stack: Stack, request: OpenRequest) -> dict[str, Any]:
        refuse_closed_fields(body, self._rules.opened_fields)
        model = body.get("model")
        request.model = model if isinstance(model, str) else None
        request.detached = call.route == RESPONSES_ROUTE and body.get("background") is True
        body = self._with_truncation(call.route, body, request)
        if (field := _CAP_FIELDS.get(call.route)) is not None:
            body = with_default_max_tokens(body, field, self._rules.max_tokens)
        body, request.asked_max_tokens = with_possible_max_tokens(body, stack.max_model_len)
        return self._with_tool_rules(body, stack, request) if call.route in _TOOL_ROUTES else body

    def _with_truncation(self, route: str, body: dict[str, Any], request: OpenRequest) -> dict[str, Any]:
        """Take `truncation` for seam 1; only responses have a field of that name in vLLM."""
        default = self._fitter.policy_of(request.model).truncation
        asked = body.get("truncation")
        if asked is not None and (route in _FITTED_ROUTES):
            request.truncation = parse_truncation(asked, default)
        elif route == _COUNT_ROUTE:
            request.truncation = replace(default, enabled=False)
        if asked is None or (route == RESPONSES_ROUTE and isinstance(asked, str)):
            return body
        return {key: value for key, value in body.items() if key != "truncation"}

    def _with_tool_rules(self, body: dict[str, Any], stack: Stack, request: OpenRequest) -> dict[str, Any]:
        if stack.uses_tools or is_tool_call_forced(body):
            return with_strict_forced_tools(body)
        body, ignored = without_tools(body)
        if ignored:
            request.headers["x-tools-ignored"] = str(ignored)
            log.info("tools ignored: the model has no tool template or parser", tools=ignored)
        return body

    def _headers(self, call: Call, request: OpenRequest) -> tuple[tuple[bytes, bytes], ...]:
        """The client's headers without the closed ones, and with the request id that every log line carries."""
        dropped = self._closed_headers | {b"x-request-id"}
        kept = tuple(pair for pair in call.headers if pair[0] not in dropped)
        return (*kept, (b"x-request-id", request.request_id.encode()))


def _refuse_foreign_models(body: Mapping[str, Any], default_model: str, tenant: Tenant) -> None:
    """Raise `ModelNotFound` for every model that is not among the tenant's.

    Whether it is there plays no part, so the answer does not tell. A body that names none means the default model.
    """
    model = body.get("model")
    if isinstance(model, str) and model:
        if not tenant.may_use(model):
            raise _absent(model, tenant)
    elif not tenant.may_use(default_model):
        raise ModelNotFound(f"Name a model in `model`. {_aliases(tenant)}", param="model")


def _absent(model: str, tenant: Tenant) -> ModelNotFound:
    """In vLLM's words, but with the tenant's own models for all that are served."""
    return ModelNotFound(f"The model `{model}` does not exist. {_aliases(tenant)}", param="model")


def _aliases(tenant: Tenant) -> str:
    return f"Valid aliases: {', '.join(sorted(tenant.models or ()))}."


def _told_to(tenant: Tenant, model: str | None, absent: ModelNotFound) -> ModelNotFound:
    """vLLM's refusal names all models that are served; a tenant with its own hears of those."""
    return absent if tenant.models is None or model is None else _absent(model, tenant)


def _shown_parent(parent: str | None, tenant: Tenant) -> str | None:
    return parent if parent is not None and tenant.may_use(parent) else None


def _own_models(reply: Reply | StreamReply, tenant: Tenant) -> Reply | StreamReply:
    """The list of models without those that a tenant may not use."""
    if tenant.models is None or not isinstance(reply, Reply):
        return reply
    listed = json.loads(reply.body)
    own = [card for card in listed["data"] if tenant.may_use(card["id"])]
    listed["data"] = [
        card if tenant.may_use(card.get("parent") or card["id"]) else {**card, "parent": None} for card in own
    ]
    return replace(reply, body=json.dumps(listed).encode())
