"""Ollama's API: a translation onto the routes that are there, with the same keys, limits, fit and queue."""

import hashlib
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import JSONResponse
from starlette.types import Receive

from server.api.answer import OwnedResponse, WireLimits
from server.api.auth import Callers
from server.api.body import ClientLeft, parse_json_object, read_body
from server.api.edge import Edge
from server.api.ollama_answers import LINES_TYPE, Lines, Saying
from server.api.ollama_bodies import (
    Asked,
    ShowBody,
    chat_asked,
    embed_asked,
    embeddings_asked,
    generate_asked,
    parsed,
)
from server.engine.calls import Call, Reply, StreamReply
from server.policy.refusals import InvalidRequest, ModelNotFound, Unsupported
from server.policy.tenants import Tenant
from server.serving.requests import OpenRequest
from server.serving.service import CHAT_ROUTE, Service

OLLAMA_PREFIX: Final = "/api/"
# The release of Ollama whose API this follows. Some clients refuse a server that says less than what they know.
_SPOKEN_VERSION: Final = "0.12.6"
_LATEST: Final = ":latest"
_STAYS_LOADED: Final = timedelta(days=365)
_MAX_SHOW_BYTES: Final = 64 << 10
Reader = Callable[[dict[str, Any]], Asked]
_READERS: Final[Mapping[str, Reader]] = {
    "/api/chat": chat_asked,
    "/api/generate": generate_asked,
    "/api/embed": embed_asked,
    "/api/embeddings": embeddings_asked,
}
# Models come and go with the server's command line, never by a client's call.
_KEEPING_ROUTES: Final = (
    ("POST", "/api/pull"), ("POST", "/api/push"), ("POST", "/api/create"), ("POST", "/api/copy"),
    ("DELETE", "/api/delete"),
)  # fmt: skip


class OllamaResponse(OwnedResponse):
    """An answer that is asked for and said in Ollama's words."""

    def __init__(self, service: Service, limits: WireLimits, request: Request, read: Reader) -> None:
        super().__init__(service, limits, request, CHAT_ROUTE, "ollama")
        self._read_asked = read

    async def _read(self, receive: Receive) -> Call:
        call = await super()._read(receive)
        self._asked = asked = self._read_asked(call.body or {})
        self._saying = Saying(asked)
        return replace(call, route=asked.route, body=asked.body)

    def _expected_media_type(self, call: Call) -> str:
        del call
        return LINES_TYPE if self._asked.streams else ""

    async def _reply(self, call: Call, opened: OpenRequest) -> Reply | StreamReply:
        asked = self._asked
        served = await _served_name(self._service, opened.tenant, asked.model, must_exist=asked.loads)
        if asked.loads:
            return self._saying.nothing("unload" if asked.unloads else "load")
        reply = await super()._reply(replace(call, body={**asked.body, "model": served}), opened)
        if asked.ignored:
            opened.headers["x-options-ignored"] = ",".join(asked.ignored)
        if isinstance(reply, StreamReply):
            return StreamReply(Lines(reply, self._saying), LINES_TYPE, _refused_already)
        return self._saying.whole(reply)


def _refused_already(_: object) -> None:
    """`Lines` raises what it finds."""


def ollama_router(service: Service, limits: WireLimits, callers: Callers, edge: Edge) -> APIRouter:
    """`/api/chat` and its like."""
    router = APIRouter(tags=["ollama"])
    listing = [Depends(edge.model_list), Depends(callers)]
    for path, read in _READERS.items():
        router.add_api_route(
            path, _endpoint(service, limits, read), methods=["POST"], response_class=Response,
            name=f"POST {path}", dependencies=[Depends(callers)],
        )  # fmt: skip
    for method, path in _KEEPING_ROUTES:
        router.add_api_route(path, _no_keeping, methods=[method], include_in_schema=False)

    @router.get("/api/version")
    async def version() -> dict[str, str]:
        """The release of Ollama whose API this follows; the server's own is at /version."""
        return {"version": _SPOKEN_VERSION}

    _add_model_routes(router, service, listing)
    return router


def _add_model_routes(router: APIRouter, service: Service, listing: list[Any]) -> None:
    @router.get("/api/tags", dependencies=listing)
    async def tags(request: Request) -> dict[str, Any]:
        """The models that the caller may use."""
        cards = await service.model_cards(request.state.tenant)
        return {"models": [_listed(service, card) for card in cards]}

    @router.get("/api/ps", dependencies=listing)
    async def running(request: Request) -> dict[str, Any]:
        """The same models: all of them are loaded, and stay so."""
        cards = await service.model_cards(request.state.tenant)
        expires = (datetime.now(UTC) + _STAYS_LOADED).isoformat()
        window = service.slot.stack.max_model_len
        more = {"size_vram": 0, "expires_at": expires, "context_length": window}
        return {"models": [{**_listed(service, card), **more} for card in cards]}

    @router.post("/api/show", dependencies=listing)
    async def show(request: Request) -> Any:
        """What a model can do, and its window."""
        asked = parsed(await _body(request), ShowBody)
        name = asked.model or asked.name
        if not name:
            raise InvalidRequest("Name a model in `model`.", param="model")
        served = await _served_name(service, request.state.tenant, name, must_exist=True)
        cards = await service.model_cards(request.state.tenant)
        return _shown(service, next(card for card in cards if card["id"] == served))


def _endpoint(service: Service, limits: WireLimits, read: Reader) -> Callable[[Request], Awaitable[Response]]:
    async def endpoint(request: Request) -> Response:
        return OllamaResponse(service, limits, request, read)

    return endpoint


async def _no_keeping(request: Request) -> Response:
    raise Unsupported(
        f"{request.url.path} is not supported: the operator chooses the models when the server starts. "
        "GET /api/tags lists them."
    )


async def _body(request: Request) -> dict[str, Any]:
    try:
        raw = await read_body(request.receive, request.headers, _MAX_SHOW_BYTES)
    except ClientLeft:
        return {}
    return parse_json_object(raw, request.headers)


async def _served_name(service: Service, tenant: Tenant, name: str, *, must_exist: bool) -> str:
    """The name under which a model is served. Ollama's clients add `:latest` to a name without a tag.

    Raises `ModelNotFound` where the model has to be there.
    """
    if not must_exist and not name.endswith(_LATEST):
        return name
    cards = await service.model_cards(tenant)
    names = [card["id"] for card in cards]
    for candidate in (name, name.removesuffix(_LATEST)):
        if candidate in names:
            return candidate
    if must_exist:
        raise ModelNotFound(f"The model `{name}` does not exist. Served here: {', '.join(names)}.", param="model")
    return name


def _listed(service: Service, card: dict[str, Any]) -> dict[str, Any]:
    """A model as Ollama lists it. The digest tells names apart and says nothing about the weights."""
    created = datetime.fromtimestamp(card.get("created") or 0, UTC).isoformat()
    return {
        "name": card["id"],
        "model": card["id"],
        "modified_at": created,
        "size": 0,
        "digest": hashlib.sha256(card["id"].encode("utf-8", "surrogatepass")).hexdigest(),
        "details": _details(service, card),
    }


def _details(service: Service, card: dict[str, Any]) -> dict[str, Any]:
    family = service.slot.stack.traits.model_type
    return {
        "parent_model": card.get("parent") or "",
        "format": "safetensors",
        "family": family,
        "families": [family],
        "parameter_size": "",
        "quantization_level": "",
    }


def _shown(service: Service, card: dict[str, Any]) -> Response:
    stack = service.slot.stack
    traits, uses_tools = stack.traits, stack.uses_tools
    able = {
        "completion": traits.generates,
        "embedding": not traits.generates,
        "tools": traits.generates and uses_tools,
        "thinking": traits.reasons,
        "vision": traits.sees,
    }
    listed = _listed(service, card)
    return JSONResponse(
        {
            "modelfile": f"FROM {card['id']}\n",
            "parameters": "",
            "template": "",
            "details": listed["details"],
            "model_info": {
                "general.architecture": traits.model_type,
                f"{traits.model_type}.context_length": stack.max_model_len,
            },
            "capabilities": [name for name, has in able.items() if has],
            "modified_at": listed["modified_at"],
        }
    )
