"""What the settings make: the parts of every room, before any route is mounted."""

import random
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from prometheus_client import CollectorRegistry

from server.api import errors
from server.api.auth import Callers, OperatorKey, Operators
from server.api.edge import Edge, EdgeLimits
from server.policy.admission import Admission
from server.policy.bodies import MaxTokensDefaults
from server.policy.context import TruncationPolicy
from server.policy.ladder import LadderRules, Level
from server.policy.objectives import Objectives
from server.policy.refusals import Refusal
from server.serving.access import Access, OpenRule
from server.serving.batch_life import BatchKeeping
from server.serving.batch_plan import InputLimits
from server.serving.batch_work import LineParts
from server.serving.batches import Runners
from server.serving.batching import Batching
from server.serving.charging import Charging, Pricing
from server.serving.declared_tenants import DeclaredTenants
from server.serving.degradation import Degradation, DegradationRules, Levels
from server.serving.distant_gate import DistantGate
from server.serving.engine_slot import EngineSlot
from server.serving.fallback import Fallback, Upstream
from server.serving.file_desk import FileRules
from server.serving.fitting import ContextPolicy, HistoryFitter
from server.serving.followed_level import FollowedLevel
from server.serving.guests import Tell
from server.serving.ladder import LadderSources, LadderWatch
from server.serving.line_runner import LineRunner
from server.serving.queue import Gate, Surroundings
from server.serving.recovery import Recovery
from server.serving.requests import OpenRequests
from server.serving.service import BodyRules, Guards, Knockable, Service
from server.serving.several import OneByOne
from server.serving.tenant_desk import TenantDesk
from server.settings import Settings
from server.store.batches import BatchRecords
from server.store.file_bodies import FileBodies
from server.store.file_records import FileRecords
from server.store.home import Store
from server.store.level import RedisPins
from server.store.tenants import TenantRecords
from server.telemetry.admission import AdmissionMetrics
from server.telemetry.batches import BatchMetrics
from server.telemetry.metrics import Metrics
from server.telemetry.resilience import ResilienceMetrics
from server.telemetry.traces import Traces

_MIB: Final = 1 << 20
_DAY_S: Final = 24 * 3600
_BATCH_FOLDER: Final = "batches"


@dataclass(frozen=True, slots=True)
class Doors:
    """Who may come in, as what, and how often they may try."""

    access: Access
    desk: TenantDesk
    callers: Callers
    operators: Operators
    edge: Edge


@dataclass(frozen=True, slots=True)
class Parts:
    """Each once in a process."""

    slot: EngineSlot
    requests: OpenRequests
    figures: Metrics
    traces: Traces
    store: Store
    charging: Charging
    fitter: HistoryFitter
    gate: Gate
    witness: ResilienceMetrics
    fallback: Fallback
    ladder: LadderWatch
    service: Service
    doors: Doors
    batching: Batching


@dataclass(frozen=True, slots=True)
class FrontEndParts:
    """Each once in a front-end that has the first process's gate and level. `objectives` decide nothing."""

    slot: EngineSlot
    requests: OpenRequests
    figures: Metrics
    traces: Traces
    store: Store
    charging: Charging
    fitter: HistoryFitter
    gate: DistantGate
    fallback: Fallback
    level: FollowedLevel
    service: Service
    doors: Doors
    objectives: Admission


def build_parts(
    settings: Settings, versions: Mapping[str, str], registry: CollectorRegistry, operator_key: str | None
) -> Parts:
    """Raises `BadRedisUrl` and `TenantsFileError`."""
    slot, requests, figures = EngineSlot(), OpenRequests(), Metrics(registry, settings.metrics_tenants)
    figures.describe(versions)
    traces = _traces(settings, versions)
    store = Store(settings.redis_url, settings.data_path, settings.redis_timeout_s)
    charging = Charging(store.limiter, store.replica, _pricing(settings), figures)
    fitter = HistoryFitter(_context_policy(settings), _context_overrides(settings), figures)
    gate = Gate(Admission(_objectives(settings)), AdmissionMetrics(registry), Surroundings(traces=traces))
    witness = ResilienceMetrics(registry)
    witness.watch_engine(lambda: slot.ready)
    fallback = Fallback(_upstreams(settings), witness, random.random, trace_headers=traces.carrier)
    sources = LadderSources(lambda: gate.pressure, lambda: gate.calm, slot, bool(fallback))
    ladder = LadderWatch(_ladder_rules(settings), sources, RedisPins(store.patient_client), witness)
    guards = _guards(settings, gate, charging, ladder, fallback, witness)
    service = Service(slot, requests, _body_rules(settings), fitter, guards)
    doors = _doors(settings, store, operator_key)
    runner = LineRunner(service, traces)
    batching = _batching(settings, store, runner, doors.access, ladder, BatchMetrics(registry))
    return Parts(
        slot, requests, figures, traces, store, charging, fitter, gate, witness, fallback, ladder, service, doors,
        batching,
    )  # fmt: skip


def build_front_end_parts(
    settings: Settings, versions: Mapping[str, str], registry: CollectorRegistry, operator_key: str | None, tell: Tell
) -> FrontEndParts:
    """The parts of a further front-end; `tell` is its way to the first process.

    Raises `BadRedisUrl` and `TenantsFileError`.
    """
    slot, requests, figures = EngineSlot(), OpenRequests(), Metrics(registry, settings.metrics_tenants)
    traces = _traces(settings, versions)
    store = Store(settings.redis_url, settings.data_path, settings.redis_timeout_s, runs_embedded=False)
    charging = Charging(store.limiter, store.replica, _pricing(settings), figures)
    fitter = HistoryFitter(_context_policy(settings), _context_overrides(settings), figures)
    gate, witness = DistantGate(tell, traces), ResilienceMetrics(registry)
    fallback = Fallback(_upstreams(settings), witness, random.random, trace_headers=traces.carrier)
    level = FollowedLevel(slot, has_fallback=bool(fallback))
    guards = _guards(settings, gate, charging, level, fallback, witness)
    service = Service(slot, requests, _body_rules(settings), fitter, guards)
    doors = _doors(settings, store, operator_key)
    return FrontEndParts(
        slot, requests, figures, traces, store, charging, fitter, gate, fallback, level, service, doors,
        Admission(_objectives(settings)),
    )  # fmt: skip


def _guards(
    settings: Settings,
    gate: Knockable,
    charging: Charging,
    levels: Levels,
    fallback: Fallback,
    witness: ResilienceMetrics,
) -> Guards:
    degradation = Degradation(levels, DegradationRules(settings.economy_max_tokens, settings.canned_reply), witness)
    return Guards(
        gate, charging, Recovery(witness), degradation, fallback, settings.restart_wait_s, OneByOne(_described)
    )


def _objectives(settings: Settings) -> Objectives:
    return Objectives(settings.ttft_slo_s or {}, settings.tpot_slo_s or {})


def _doors(settings: Settings, store: Store, operator_key: str | None) -> Doors:
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
    return Doors(
        access=access,
        desk=TenantDesk(TenantRecords(store.patient_client), declared, access, time.time),
        callers=Callers(access, operator, edge),
        operators=Operators(operator, edge),
        edge=edge,
    )


def _body_rules(settings: Settings) -> BodyRules:
    return BodyRules(
        opened_fields=frozenset(settings.allow_client_field),
        max_tokens=MaxTokensDefaults(
            chat=settings.default_max_tokens, background_task=settings.background_task_max_tokens
        ),
    )


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
