"""The routes that exist. They are an allow-list: an endpoint of vLLM that is not named here cannot be reached."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Final

from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import JSONResponse

from server.api.answer import OwnedResponse, WireLimits
from server.api.auth import Callers
from server.api.direct import DirectRoute
from server.api.edge import Edge
from server.api.errors import Dialect
from server.policy.refusals import ModelNotFound, OperatorsOnly
from server.policy.tenants import ANYONE, OPERATOR
from server.serving.elsewhere import Elsewhere
from server.serving.service import MODELS_ROUTE, Service


@dataclass(frozen=True, slots=True)
class Route:
    """One endpoint that is answered by an engine operation of the same method and path.

    `operators`: it changes what the server does for everyone, so tenants may not call it.
    """

    method: str
    path: str
    dialect: Dialect = "openai"
    operators: bool = False


OPERATION_ROUTES: Final = (
    Route("POST", "/v1/chat/completions"),
    Route("POST", "/v1/chat/completions/batch"),
    Route("POST", "/v1/completions"),
    Route("POST", "/v1/responses", "responses"),
    Route("GET", "/v1/responses/{response_id}", "responses"),
    Route("POST", "/v1/responses/{response_id}/cancel", "responses"),
    Route("POST", "/v1/messages", "anthropic"),
    Route("POST", "/v1/messages/count_tokens", "anthropic"),
    Route("GET", "/v1/models"),
    Route("POST", "/v1/context/fit"),
    Route("POST", "/tokenize"),
    Route("POST", "/detokenize"),
    Route("GET", "/tokenizer_info"),
    Route("POST", "/v1/embeddings"),
    Route("POST", "/v2/embed"),
    Route("POST", "/pooling"),
    Route("POST", "/classify"),
    Route("POST", "/score"),
    Route("POST", "/v1/score"),
    Route("POST", "/rerank"),
    Route("POST", "/v1/rerank"),
    Route("POST", "/v2/rerank"),
    Route("POST", "/v1/load_lora_adapter", operators=True),
    Route("POST", "/v1/unload_lora_adapter", operators=True),
)

# Reach into the engine's process or its cluster; mounted only when the operator asks for them.
DEVELOPER_ROUTES: Final = (
    Route("POST", "/start_profile", operators=True),
    Route("POST", "/stop_profile", operators=True),
    Route("POST", "/collective_rpc", operators=True),
    Route("POST", "/reset_prefix_cache", operators=True),
    Route("POST", "/reset_mm_cache", operators=True),
    Route("POST", "/reset_encoder_cache", operators=True),
    Route("POST", "/sleep", operators=True),
    Route("POST", "/wake_up", operators=True),
    Route("GET", "/is_sleeping", operators=True),
    Route("GET", "/server_info", operators=True),
    Route("POST", "/scale_elastic_ep", operators=True),
    Route("POST", "/is_scaling_elastic_ep", operators=True),
)


def operations_router(
    service: Service, limits: WireLimits, callers: Callers, edge: Edge, *, developer_routes: bool
) -> APIRouter:
    """Routes answered by the engine."""
    router = APIRouter()

    def endpoint(route: Route) -> Callable[[Request], Awaitable[Response]]:
        async def answer(request: Request) -> Response:
            if route.path == MODELS_ROUTE:
                await edge.model_list(request)
            await callers(request)
            if route.operators and request.state.tenant not in (ANYONE, OPERATOR):
                raise OperatorsOnly(f"{route.method} {route.path} is for the operator of this server.")
            return OwnedResponse(service, limits, request, route.path, route.dialect)

        return answer

    for route in OPERATION_ROUTES + (DEVELOPER_ROUTES if developer_routes else ()):
        router.add_api_route(
            route.path,
            endpoint(route),
            methods=[route.method],
            response_class=Response,
            name=f"{route.method} {route.path}",
            route_class_override=DirectRoute,
        )

    @router.get("/v1/models/{model_id:path}", dependencies=[Depends(edge.model_list), Depends(callers)])
    async def model(model_id: str, request: Request) -> Any:
        """One model's card, as in the list."""
        cards = await service.model_cards(request.state.tenant)
        for card in cards:
            if card["id"] == model_id:
                return JSONResponse(card)
        names = ", ".join(card["id"] for card in cards)
        raise ModelNotFound(f"The model `{model_id}` does not exist. Served here: {names}.", param="model")

    return router


def status_router(
    service: Service, versions: dict[str, str], metrics_page: Callable[[], Awaitable[Response]], elsewhere: Elsewhere
) -> APIRouter:
    """Routes that need no key: health, version, metrics."""
    router = APIRouter()

    @router.get("/health/live")
    async def live() -> dict[str, str]:
        """The process answers."""
        return {"status": "live"}

    @router.get("/health")
    @router.get("/health/ready")
    @router.get("/ping")
    @router.post("/ping")
    async def ready() -> Response:
        """200 when requests are served, else 503 with what the server is doing.

        `limits` says whether Redis keeps them, or each replica alone because it does not answer.
        """
        if service.ready:
            return JSONResponse({"status": "ready", "limits": service.limits_mode})
        return JSONResponse({"status": "not ready", "stage": service.stage}, status_code=503)

    @router.get("/version")
    async def version() -> dict[str, str]:
        return versions

    @router.get("/load")
    async def load() -> dict[str, int]:
        """Open requests, under the name that vLLM gives them."""
        return {"server_load": len(service.requests) + await elsewhere.gather()}

    @router.get("/metrics")
    async def metrics() -> Response:
        return await metrics_page()

    return router
