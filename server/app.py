"""The composition: builds every room's parts from the settings and puts them together."""

import random
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
from server.api.auth import Callers, OperatorKey, Operators
from server.api.batches import batches_router
from server.api.console import console_router, overview_router
from server.api.edge import Edge, EdgeLimits
from server.api.errors import Dialect
from server.api.files import files_router
from server.api.level import level_router
from server.api.middleware import Exchange, Reporting
from server.api.noting import Noting
from server.api.ollama import OLLAMA_PREFIX, ollama_router
from server.api.operators import operators_router
from server.api.routes import operations_router, status_router
from server.api.schema import DocumentedApi
from server.api.usage import usage_router
from server.policy.admission import Admission
from server.policy.bodies import MaxTokensDefaults
from server.policy.context import TruncationPolicy
from server.policy.ladder import LadderRules, Level
from server.policy.objectives import Objectives
from server.policy.refusals import GenerationFailed, InvalidRequest, MethodNotAllowed, NotFound, Refusal
from server.serving.access import Access, OpenRule
from server.serving.batch_life import BatchKeeping
from server.serving.batch_plan import InputLimits
from server.serving.batch_work import LineParts
from server.serving.batches import BatchRunner, Runners
from server.serving.batching import Batching
from server.serving.charging import Charging, Pricing
from server.serving.declared_tenants import DeclaredTenants
from server.serving.degradation import Degradation, DegradationRules
from server.serving.engine_slot import EngineSlot
from server.serving.fallback import Fallback, Upstream
from server.serving.file_desk import FileRules
from server.serving.fitting import ContextPolicy, HistoryFitter
from server.serving.generation import Generation
from server.serving.ladder import LadderSources, LadderWatch
from server.serving.line_runner import LineRunner
from server.serving.overview import COUNTERS, HISTOGRAMS, Overview, Sights
from server.serving.queue import Gate, Surroundings
from server.serving.recovery import Recovery
from server.serving.requests import OpenRequests
from server.serving.service import BodyRules, Guards, Service
from server.serving.several import OneByOne
from server.serving.tenant_desk import TenantDesk
from server.serving.usage import UsageDesk
from server.settings import Settings
from server.store.batches import BatchRecords
from server.store.file_bodies import FileBodies
from server.store.file_records import FileRecords
from server.store.home import Store
from server.store.level import RedisPins
from server.store.tenants import TenantRecords
from server.telemetry import metrics
from server.telemetry.admission import AdmissionMetrics
from server.telemetry.batches import BatchMetrics
from server.telemetry.metrics import Metrics
from server.telemetry.readings import Readings
from server.telemetry.recent import RecentHappenings
from server.telemetry.requests import RequestMetrics
from server.telemetry.resilience import ResilienceMetrics
from server.telemetry.traces import Traces

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
    gate: Gate
    store: Store
    access: Access
    batches: BatchRunner
    ladder: LadderWatch
    fallback: Fallback
    resilience: ResilienceMetrics
    traces: Traces


def build_application(
    settings: Settings,
    versions: Mapping[str, str],
    registry: CollectorRegistry = REGISTRY,
    operator_key: str | None = None,
) -> Application:
    """Everything but the engine, which is loaded while this already answers.

    Without an operator key nobody is the operator. Raises `BadRedisUrl` and `TenantsFileError`.
    """
    slot, requests, figures = EngineSlot(), OpenRequests(), Metrics(registry, settings.metrics_tenants)
    figures.describe(versions)
    traces = _traces(settings, versions)
    store = Store(settings.redis_url, settings.data_path, settings.redis_timeout_s)
    charging = Charging(store.limiter, store.replica, _pricing(settings), figures)
    fitter = HistoryFitter(_context_policy(settings), _context_overrides(settings), figures)
    rules = BodyRules(
        opened_fields=frozenset(settings.allow_client_field),
        max_tokens=MaxTokensDefaults(
            chat=settings.default_max_tokens, background_task=settings.background_task_max_tokens
        ),
    )
    objectives = Objectives(settings.ttft_slo_s or {}, settings.tpot_slo_s or {})
    gate = Gate(Admission(objectives), AdmissionMetrics(registry), Surroundings(traces=traces))
    witness = ResilienceMetrics(registry)
    witness.watch_engine(lambda: slot.ready)
    fallback = Fallback(_upstreams(settings), witness, random.random, trace_headers=traces.carrier)
    sources = LadderSources(lambda: gate.pressure, slot, bool(fallback))
    ladder = LadderWatch(_ladder_rules(settings), sources, RedisPins(store.patient_client), witness)
    degradation = Degradation(ladder, DegradationRules(settings.economy_max_tokens, settings.canned_reply), witness)
    guards = Guards(
        gate, charging, Recovery(witness), degradation, fallback, settings.restart_wait_s, OneByOne(_described)
    )
    service = Service(slot, requests, rules, fitter, guards)
    docs = settings.docs
    api = DocumentedApi(
        title="Tidegate",
        version=versions["tidegate"],
        root_path=settings.root_path,
        openapi_url="/openapi.json" if docs else None,
    )
    api.service = service
    limits = WireLimits(int(settings.max_body_mib * _MIB), settings.keep_alive_s, settings.slow_reader_timeout_s)
    api.include_router(_status(service, versions, figures))
    doors = _doors(settings, store, operator_key)
    api.include_router(
        operations_router(service, limits, doors.callers, doors.edge, developer_routes=settings.developer_routes)
    )
    api.include_router(ollama_router(service, limits, doors.callers, doors.edge))
    api.include_router(operators_router(doors.desk, doors.operators))
    api.include_router(level_router(ladder, doors.operators))
    api.include_router(usage_router(UsageDesk(store.usage), doors.desk, doors.callers, doors.operators))
    runner = LineRunner(service, traces)
    batching = _batching(settings, store, runner, doors.access, ladder, BatchMetrics(registry))
    if settings.batches:
        api.include_router(files_router(batching.files, doors.callers))
        api.include_router(batches_router(batching.batches, doors.callers))
    recent = RecentHappenings()
    readings = Readings(registry, COUNTERS, HISTOGRAMS.values())
    sights = Sights(
        versions, readings, recent, slot, requests, gate, ladder, store.limiter, doors.desk, UsageDesk(store.usage),
        batching.batches if settings.batches else None,
    )  # fmt: skip
    api.include_router(overview_router(Overview(sights), doors.operators))
    if settings.console:
        api.include_router(console_router())
    api.add_exception_handler(HTTPException, _on_http_exception)
    api.add_exception_handler(Refusal, on_refusal)
    api.add_exception_handler(Exception, _on_error)
    seen = RequestMetrics(gate.admission, registry)
    asgi: ASGIApp = Exchange(Noting(api, recent), Reporting(figures, seen, traces, settings.access_log))
    if settings.allowed_origins:
        asgi = CORSMiddleware(
            asgi,
            allow_origins=settings.allowed_origins,
            allow_methods=settings.allowed_methods,
            allow_headers=settings.allowed_headers,
            allow_credentials=settings.allow_credentials,
        )
    return Application(
        asgi, slot, requests, Generation(fitter, gate, charging, traces), gate, store, doors.access, batching.runner,
        ladder, fallback, witness, traces,
    )  # fmt: skip


def _traces(settings: Settings, versions: Mapping[str, str]) -> Traces:
    if settings.otlp_endpoint is None:
        return Traces()
    from server.telemetry import otlp  # a second of imports

    return otlp.start(settings.otlp_endpoint, versions["tidegate"])


def _batching(
    settings: Settings, store: Store, runner: LineRunner, access: Access, ladder: LadderWatch, figures: BatchMetrics
) -> Batching:
    folder = settings.batch_folder or settings.data_path / _BATCH_FOLDER
    kept_s = int(settings.batch_files_kept_days * _DAY_S)
    client = store.patient_client
    keeping = BatchKeeping(BatchRecords(client), FileRecords(client), FileBodies(folder), kept_s, time.time)
    return Batching(
        keeping,
        FileRules(int(settings.batch_max_file_mib * _MIB), int(settings.batch_quota_mib * _MIB), kept_s),
        LineParts(runner, _described, lambda: ladder.level >= Level.ESSENTIAL, figures),
        InputLimits(settings.batch_max_lines, int(settings.max_body_mib * _MIB)),
        Runners(store.replica, access.named, runs=settings.batches),
    )


def _described(refusal: Refusal) -> tuple[int, dict[str, Any]]:
    """A refusal as it stands in the error file of a batch, or in the place of one answer among several."""
    return errors.status(refusal), errors.body(refusal, "openai")


def _ladder_rules(settings: Settings) -> LadderRules:
    highest = settings.highest_automatic_level
    if highest is None:
        highest = Level.FALLBACK if settings.fallbacks else Level.ESSENTIAL
    return LadderRules(highest=Level(highest))


def _upstreams(settings: Settings) -> list[Upstream]:
    return [
        Upstream(
            name=chosen.name or chosen.host,
            url=chosen.url,
            api_key=chosen.api_key(),
            models=chosen.models,
            connect_timeout_s=chosen.connect_timeout_s,
            first_byte_timeout_s=chosen.first_byte_timeout_s,
            idle_timeout_s=chosen.idle_timeout_s,
            whole_answer_timeout_s=chosen.whole_answer_timeout_s,
            canary_share=chosen.canary_share,
        )
        for chosen in settings.fallbacks
    ]


def _pricing(settings: Settings) -> Pricing:
    return Pricing(settings.cached_token_price, settings.limit_reserve_tokens or None)


@dataclass(frozen=True, slots=True)
class _Doors:
    """Who may come in, as what, and how often they may try."""

    access: Access
    desk: TenantDesk
    callers: Callers
    operators: Operators
    edge: Edge


def _doors(settings: Settings, store: Store, operator_key: str | None) -> _Doors:
    declared = DeclaredTenants(settings.tenants_file)
    rule = OpenRule(settings.api_key, settings.require_key, store.surely_empty)
    access = Access(rule, declared, TenantRecords(store.client), time.time)
    operator = OperatorKey(settings.operator_key or operator_key)
    edge = Edge(
        EdgeLimits(
            failed_logins=settings.failed_logins_per_minute,
            model_lists=settings.model_lists_per_minute,
            operator_requests=settings.operator_requests_per_minute,
        )
    )
    return _Doors(
        access=access,
        desk=TenantDesk(TenantRecords(store.patient_client), declared, access, time.time),
        callers=Callers(access, operator, edge),
        operators=Operators(operator, edge),
        edge=edge,
    )


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
