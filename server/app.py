"""The composition: builds every room's parts from the settings and puts them together."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, Final

from fastapi import Request, Response
from fastapi.middleware.cors import CORSMiddleware
from prometheus_client import REGISTRY, CollectorRegistry
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp

from server.api import errors
from server.api.answer import WireLimits
from server.api.auth import ApiKeys
from server.api.batches import batches_router
from server.api.errors import Dialect
from server.api.files import files_router
from server.api.middleware import Exchange
from server.api.routes import operations_router, status_router
from server.api.schema import DocumentedApi
from server.policy.bodies import MaxTokensDefaults
from server.policy.context import TruncationPolicy
from server.policy.refusals import GenerationFailed, InvalidRequest, MethodNotAllowed, NotFound, Refusal
from server.policy.tenants import ANYONE, Tenant
from server.serving.batch_desk import BatchDesk
from server.serving.batch_life import BatchKeeping
from server.serving.batch_plan import InputLimits
from server.serving.batch_work import LineParts
from server.serving.batches import BatchRunner, Runners
from server.serving.charging import Charging, Pricing
from server.serving.engine_slot import EngineSlot
from server.serving.file_desk import FileDesk, FileRules
from server.serving.fitting import ContextPolicy, HistoryFitter
from server.serving.generation import Generation
from server.serving.line_runner import LineRunner
from server.serving.requests import OpenRequests
from server.serving.service import BodyRules, Service
from server.settings import Settings
from server.store.file_bodies import FileBodies
from server.store.home import Store
from server.telemetry import metrics
from server.telemetry.batches import BatchMetrics
from server.telemetry.metrics import Metrics

_MIB: Final = 1 << 20
_DAY_S: Final = 24 * 3600
_BATCH_FOLDER: Final = "batches"
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
    store: Store
    batches: BatchRunner


def build_application(
    settings: Settings, versions: Mapping[str, str], registry: CollectorRegistry = REGISTRY
) -> Application:
    """Everything but the engine, which is loaded while this already answers. Raises `BadRedisUrl`."""
    slot, requests, figures = EngineSlot(), OpenRequests(), Metrics(registry)
    store = Store(settings.redis_url, settings.data_path)
    charging = Charging(store.limiter, store.replica, _pricing(settings), figures)
    fitter = HistoryFitter(_context_policy(settings), _context_overrides(settings), figures)
    rules = BodyRules(
        opened_fields=frozenset(settings.allow_client_field),
        max_tokens=MaxTokensDefaults(
            chat=settings.default_max_tokens, background_task=settings.background_task_max_tokens
        ),
    )
    service = Service(slot, requests, rules, fitter, charging)
    docs = settings.docs
    api = DocumentedApi(
        title="Tidegate",
        version=versions["tidegate"],
        root_path=settings.root_path,
        openapi_url="/openapi.json" if docs else None,
    )
    api.service = service
    limits = WireLimits(int(settings.max_body_mib * _MIB), settings.keep_alive_s)
    authenticate = ApiKeys(settings.api_key)
    api.include_router(_status(service, versions, figures))
    api.include_router(operations_router(service, limits, authenticate, developer_routes=settings.developer_routes))
    keeping = _keeping(settings, store)
    batches = _batches(settings, keeping, store.replica, service, BatchMetrics(registry))
    if settings.batches:
        desk = FileDesk(keeping, _file_rules(settings))
        api.include_router(files_router(desk, authenticate))
        api.include_router(batches_router(BatchDesk(keeping, desk, batches.look), authenticate))
    api.add_exception_handler(HTTPException, _on_http_exception)
    api.add_exception_handler(Refusal, _on_refusal)
    api.add_exception_handler(Exception, _on_error)
    asgi: ASGIApp = Exchange(api, metrics=figures, access_log=settings.access_log)
    if settings.allowed_origins:
        asgi = CORSMiddleware(
            asgi,
            allow_origins=settings.allowed_origins,
            allow_methods=settings.allowed_methods,
            allow_headers=settings.allowed_headers,
            allow_credentials=settings.allow_credentials,
        )
    return Application(asgi, slot, requests, Generation(fitter, charging), store, batches)


def _keeping(settings: Settings, store: Store) -> BatchKeeping:
    bodies = FileBodies(settings.batch_folder or settings.data_path / _BATCH_FOLDER)
    return BatchKeeping(store.batches, store.files, bodies, int(settings.batch_files_kept_days * _DAY_S), time.time)


def _file_rules(settings: Settings) -> FileRules:
    kept_s = int(settings.batch_files_kept_days * _DAY_S)
    return FileRules(int(settings.batch_max_file_mib * _MIB), int(settings.batch_quota_mib * _MIB), kept_s)


def _batches(
    settings: Settings, keeping: BatchKeeping, replica: str, service: Service, figures: BatchMetrics
) -> BatchRunner:
    lines = LineParts(LineRunner(service), _described, _never, figures)
    limits = InputLimits(settings.batch_max_lines, int(settings.max_body_mib * _MIB))
    return BatchRunner(keeping, lines, limits, Runners(replica, _tenant_named, runs=settings.batches))


def _described(refusal: Refusal) -> tuple[int, dict[str, Any]]:
    return errors.status(refusal), errors.body(refusal, "openai")


def _never() -> bool:
    return False


async def _tenant_named(name: str) -> Tenant | None:
    return ANYONE if name == ANYONE.name else None


def _pricing(settings: Settings) -> Pricing:
    return Pricing(settings.cached_token_price, settings.limit_reserve_tokens or None)


def _context_policy(settings: Settings) -> ContextPolicy:
    truncation = TruncationPolicy(settings.context_truncation == "auto", settings.context_retention_ratio)
    return ContextPolicy(truncation, settings.context_reserve_tokens)


def _context_overrides(settings: Settings) -> dict[str, ContextPolicy]:
    general = _context_policy(settings)
    return {
        name: ContextPolicy(
            TruncationPolicy(
                general.truncation.enabled if chosen.truncation is None else chosen.truncation == "auto",
                chosen.retention_ratio or general.truncation.retention_ratio,
            ),
            chosen.reserve_tokens or general.reserve_tokens,
        )
        for name, chosen in settings.context_models.items()
    }


def _status(service: Service, versions: Mapping[str, str], figures: Metrics) -> Any:
    # vLLM's clients read its version under `version`
    shown = {"version": versions.get("vllm", "unknown"), "tidegate": versions["tidegate"]}
    return status_router(service, shown, lambda: Response(figures.page(), media_type=metrics.CONTENT_TYPE))


def _dialect(request: Request) -> Dialect:
    return "anthropic" if request.url.path.startswith(_ANTHROPIC_PREFIX) else "openai"


async def _on_refusal(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refusal)
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
    response = await _on_refusal(request, kind(text))
    response.headers.update(error.headers or {})
    return response


async def _on_error(request: Request, _: Exception) -> Response:
    """The last resort; the server logs the traceback, the client gets none of it."""
    return await _on_refusal(request, GenerationFailed("Something went wrong on the server. Please try again."))
