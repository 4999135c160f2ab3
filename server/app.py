"""The composition: every room's parts behind their routes, as one ASGI application."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any, Final

from fastapi import Request, Response
from fastapi.middleware.cors import CORSMiddleware
from prometheus_client import REGISTRY, CollectorRegistry
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp

from server.api import errors
from server.api.answer import WireLimits
from server.api.batches import batches_router
from server.api.console import console_router, overview_router
from server.api.direct import DirectRoutes
from server.api.errors import Dialect
from server.api.files import files_router
from server.api.level import level_router
from server.api.middleware import Exchange, Reporting
from server.api.ollama import OLLAMA_PREFIX, ollama_router
from server.api.operators import operators_router
from server.api.passing_on import PassingOn, answered_here
from server.api.routes import operations_router, status_router
from server.api.schema import DocumentedApi
from server.api.usage import usage_router
from server.parts import Doors, Parts, build_front_end_parts, build_parts
from server.policy.admission import Admission
from server.policy.refusals import GenerationFailed, InvalidRequest, MethodNotAllowed, NotFound, Refusal
from server.serving.access import Access
from server.serving.batches import BatchRunner
from server.serving.distant_gate import DistantGate
from server.serving.elsewhere import Elsewhere
from server.serving.engine_slot import EngineSlot
from server.serving.fallback import Fallback
from server.serving.followed_level import FollowedLevel
from server.serving.generation import Generation
from server.serving.guests import Tell, ToldHappenings
from server.serving.ladder import LadderWatch
from server.serving.overview import COUNTERS, HISTOGRAMS, Overview, Sights
from server.serving.queue import Gate
from server.serving.requests import OpenRequests
from server.serving.service import Service
from server.serving.usage import UsageDesk
from server.settings import Settings
from server.store.home import Store
from server.telemetry import metrics
from server.telemetry.metrics import Metrics
from server.telemetry.readings import Readings
from server.telemetry.recent import RecentHappenings
from server.telemetry.requests import RequestMetrics
from server.telemetry.resilience import ResilienceMetrics
from server.telemetry.traces import Traces

_MIB: Final = 1 << 20
_KEEPS_RESPONSES: Final = "VLLM_ENABLE_RESPONSES_API_STORE"
_ANTHROPIC_PREFIX: Final = "/v1/messages"
_HTTP_REFUSALS: Final[Mapping[int, type[Refusal]]] = {
    HTTPStatus.NOT_FOUND: NotFound,
    HTTPStatus.METHOD_NOT_ALLOWED: MethodNotAllowed,
}


@dataclass(frozen=True, slots=True)
class Application:
    """The ASGI application and the parts that its life is steered by."""

    asgi: ASGIApp
    slot: EngineSlot
    requests: OpenRequests
    generation: Generation
    gate: Gate
    store: Store
    access: Access
    batches: BatchRunner
    ladder: LadderWatch
    fallback: Fallback
    resilience: ResilienceMetrics
    figures: Metrics
    traces: Traces
    recent: RecentHappenings
    elsewhere: Elsewhere


@dataclass(frozen=True, slots=True)
class FrontEndApplication:
    """The same for a front-end beside the first process, without what a server has once."""

    asgi: ASGIApp
    slot: EngineSlot
    requests: OpenRequests
    generation: Generation
    gate: DistantGate
    level: FollowedLevel
    store: Store
    access: Access
    fallback: Fallback
    objectives: Admission
    figures: Metrics
    traces: Traces
    passing_on: PassingOn


def build_application(
    settings: Settings,
    versions: Mapping[str, str],
    registry: CollectorRegistry = REGISTRY,
    operator_key: str | None = None,
) -> Application:
    """Everything but the engine, which is loaded while this already answers.

    Without an operator key nobody is the operator. Raises `BadRedisUrl` and `TenantsFileError`.
    """
    parts = build_parts(settings, versions, registry, operator_key)
    recent, elsewhere = RecentHappenings(), Elsewhere()
    api = _new_api(settings, versions, parts.service)
    _mount_model(api, settings, parts.service, parts.doors)
    api.include_router(_status(parts.service, versions, parts.figures, elsewhere))
    _mount_desks(api, settings, parts)
    _mount_overview(api, settings, parts, _sights(settings, parts, versions, recent, elsewhere))
    reporting = Reporting(
        parts.figures, RequestMetrics(parts.gate.admission, registry), parts.traces, recent, settings.access_log
    )
    return Application(
        asgi=_with_cors(Exchange(DirectRoutes(api, on_refusal, _on_error), reporting), settings),
        slot=parts.slot,
        requests=parts.requests,
        generation=Generation(parts.fitter, parts.gate, parts.charging, parts.traces),
        gate=parts.gate,
        store=parts.store,
        access=parts.doors.access,
        batches=parts.batching.runner,
        ladder=parts.ladder,
        fallback=parts.fallback,
        resilience=parts.witness,
        figures=parts.figures,
        traces=parts.traces,
        recent=recent,
        elsewhere=elsewhere,
    )


def build_front_end(
    settings: Settings, versions: Mapping[str, str], operator_key: str | None, tell: Tell, first_process: Path
) -> FrontEndApplication:
    """What a front-end beside the first process answers with. `tell` is its way to that one, and `first_process` the
    socket behind which it takes the requests that are passed on. Raises `BadRedisUrl` and `TenantsFileError`.
    """
    registry = REGISTRY
    parts = build_front_end_parts(settings, versions, registry, operator_key, tell)
    api = _new_api(settings, versions, parts.service)
    _mount_model(api, settings, parts.service, parts.doors)
    api.include_router(_status(parts.service, versions, parts.figures, Elsewhere()))
    seen = RequestMetrics(parts.objectives, registry)
    reporting = Reporting(parts.figures, seen, parts.traces, ToldHappenings(tell), settings.access_log)
    asgi = _with_cors(Exchange(DirectRoutes(api, on_refusal, _on_error), reporting), settings)
    here = answered_here(keeps_responses=os.environ.get(_KEEPS_RESPONSES, "0") != "0", root_path=settings.root_path)
    passing_on = PassingOn(asgi, first_process, here, settings.slow_reader_timeout_s)
    return FrontEndApplication(
        asgi=passing_on,
        slot=parts.slot,
        requests=parts.requests,
        generation=Generation(parts.fitter, parts.gate, parts.charging, parts.traces),
        gate=parts.gate,
        level=parts.level,
        store=parts.store,
        access=parts.doors.access,
        fallback=parts.fallback,
        objectives=parts.objectives,
        figures=parts.figures,
        traces=parts.traces,
        passing_on=passing_on,
    )


def _new_api(settings: Settings, versions: Mapping[str, str], service: Service) -> DocumentedApi:
    api = DocumentedApi(
        title="Tidegate",
        version=versions["tidegate"],
        root_path=settings.root_path,
        openapi_url="/openapi.json" if settings.docs else None,
    )
    api.service = service
    api.add_exception_handler(HTTPException, _on_http_exception)
    api.add_exception_handler(Refusal, on_refusal)
    api.add_exception_handler(Exception, _on_error)
    return api


def _mount_model(api: DocumentedApi, settings: Settings, service: Service, doors: Doors) -> None:
    """The routes that use the model."""
    limits = WireLimits(int(settings.max_body_mib * _MIB), settings.keep_alive_s, settings.slow_reader_timeout_s)
    api.include_router(
        operations_router(service, limits, doors.callers, doors.edge, developer_routes=settings.developer_routes)
    )
    api.include_router(ollama_router(service, limits, doors.callers, doors.edge))


def _mount_desks(api: DocumentedApi, settings: Settings, parts: Parts) -> None:
    """The routes about tenants, the level, usage, files and batches."""
    doors, batching = parts.doors, parts.batching
    api.include_router(operators_router(doors.desk, doors.operators))
    api.include_router(level_router(parts.ladder, doors.operators))
    api.include_router(usage_router(UsageDesk(parts.store.usage), doors.desk, doors.callers, doors.operators))
    if settings.batches:
        api.include_router(files_router(batching.files, doors.callers))
        api.include_router(batches_router(batching.batches, doors.callers))


def _mount_overview(api: DocumentedApi, settings: Settings, parts: Parts, sights: Sights) -> None:
    """The console, and the route that it looks at."""
    api.include_router(overview_router(Overview(sights), parts.doors.operators))
    if settings.console:
        api.include_router(console_router())


def _sights(
    settings: Settings, parts: Parts, versions: Mapping[str, str], recent: RecentHappenings, elsewhere: Elsewhere
) -> Sights:
    return Sights(
        versions=versions,
        readings=Readings(parts.figures.merged, COUNTERS, HISTOGRAMS.values()),
        elsewhere=elsewhere,
        recent=recent,
        slot=parts.slot,
        requests=parts.requests,
        gate=parts.gate,
        ladder=parts.ladder,
        limiter=parts.store.limiter,
        tenants=parts.doors.desk,
        usage=UsageDesk(parts.store.usage),
        batches=parts.batching.batches if settings.batches else None,
    )


def _with_cors(asgi: ASGIApp, settings: Settings) -> ASGIApp:
    if not settings.allowed_origins:
        return asgi
    return CORSMiddleware(
        asgi,
        allow_origins=settings.allowed_origins,
        allow_methods=settings.allowed_methods,
        allow_headers=settings.allowed_headers,
        allow_credentials=settings.allow_credentials,
    )


def _status(service: Service, versions: Mapping[str, str], figures: Metrics, elsewhere: Elsewhere) -> Any:
    # vLLM's clients read its version under `version`
    shown = {"version": versions.get("vllm", "unknown"), "tidegate": versions["tidegate"]}

    async def page() -> Response:
        await elsewhere.gather()
        return Response(figures.page(), media_type=metrics.CONTENT_TYPE)

    return status_router(service, shown, page, elsewhere)


def _dialect(request: Request) -> Dialect:
    if request.url.path.startswith(OLLAMA_PREFIX):
        return "ollama"
    return "anthropic" if request.url.path.startswith(_ANTHROPIC_PREFIX) else "openai"


async def on_refusal(request: Request, error: Exception) -> Response:
    """A refusal as its HTTP answer."""
    assert isinstance(error, Refusal)
    request.state.refusal = error
    return Response(
        errors.encoded(error, _dialect(request)),
        status_code=errors.status(error),
        headers=errors.headers(error),
        media_type="application/json",
    )


async def _on_http_exception(request: Request, error: Exception) -> Response:
    """Starlette's own answers (no such route, wrong method) in the shape of every other error."""
    assert isinstance(error, HTTPException)
    kind = _HTTP_REFUSALS.get(error.status_code, InvalidRequest)
    sentences = {NotFound: "There is no route", MethodNotAllowed: "This route does not take"}
    text = f"{sentences.get(kind, error.detail)} {request.method} {request.url.path}."
    response = await on_refusal(request, kind(text))
    response.headers.update(error.headers or {})
    return response


async def _on_error(request: Request, _: Exception) -> Response:
    """The last resort; the server logs the traceback, the client gets none of it."""
    return await on_refusal(request, GenerationFailed("Something went wrong on the server. Please try again."))
