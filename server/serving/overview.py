"""What the server is doing and why, as one JSON object for the operator: the console and `tidegate top` show it.

Nothing is counted here. Counters and histograms are those of the metrics, as they stand since the start; whoever looks
twice has the rates between.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from heapq import nsmallest
from typing import Any, Final

from server.policy.batches import Batch
from server.policy.ladder import DESCRIPTIONS, Level
from server.policy.tenants import Tenant
from server.policy.terms import TRAFFIC_CLASSES
from server.serving.batch_desk import BatchDesk
from server.serving.elsewhere import Elsewhere
from server.serving.engine_slot import EngineSlot
from server.serving.glimpses import Glimpse
from server.serving.ladder import LadderWatch
from server.serving.queue import Gate
from server.serving.requests import OpenRequests
from server.serving.tenant_desk import TenantDesk
from server.serving.usage import UsageDesk
from server.store.limiter import Limiter
from server.store.tenant_forms import written_limits
from server.store.usage import TokenCounts
from server.telemetry.readings import Distribution, Reading, Readings
from server.telemetry.recent import Entry, Kind, RecentHappenings

_TENANTS_KEPT_S: Final = 5.0
_BATCHES_KEPT_S: Final = 2.0
_MOST_TENANTS: Final = 100
_MOST_BATCHES: Final = 100

_HTTP: Final = "tidegate_http_requests_total"
_PROMPT: Final = "tidegate_engine_prompt_tokens_total"
_COMPLETION: Final = "vllm:generation_tokens_total"
_PREEMPTED: Final = "tidegate_engine_preemptions_total"
_TRUNCATED: Final = "tidegate_context_truncated_requests_total"
_LIMITED: Final = "tidegate_limit_refusals_total"
_OVERLOADED: Final = "tidegate_overload_refusals_total"
_RESTARTS: Final = "tidegate_engine_restarts_total"
_FAILED_RESTARTS: Final = "tidegate_engine_failed_restarts_total"
_FALLBACK_UP: Final = "tidegate_fallback_up"
_FALLBACK_REQUESTS: Final = "tidegate_fallback_requests_total"
# The metrics that an overview shows.
COUNTERS: Final = (
    _HTTP, _PROMPT, _COMPLETION, _PREEMPTED, _TRUNCATED, _LIMITED, _OVERLOADED, _RESTARTS, _FAILED_RESTARTS,
    _FALLBACK_UP, _FALLBACK_REQUESTS,
)  # fmt: skip
HISTOGRAMS: Final[Mapping[str, str]] = {
    "ttft_s": "tidegate_time_to_first_token_seconds",  # with the wait in our queue, which vLLM's does not see
    "itl_s": "vllm:inter_token_latency_seconds",
    "queue_wait_s": "tidegate_queue_wait_seconds",
}
# Work, in contrast to probes, scrapes and the operator's own calls.
_WORK_METHOD: Final = "POST"
_NO_WORK: Final = ("/admin", "/health", "/ping")


@dataclass(frozen=True, slots=True)
class Sights:
    """What an overview looks at. `batches` None: this server runs none."""

    versions: Mapping[str, str]
    readings: Readings
    elsewhere: Elsewhere
    recent: RecentHappenings
    slot: EngineSlot
    requests: OpenRequests
    gate: Gate
    ladder: LadderWatch
    limiter: Limiter
    tenants: TenantDesk
    usage: UsageDesk
    batches: BatchDesk | None


class Overview:
    """Takes snapshots."""

    def __init__(self, sights: Sights) -> None:
        self._sights = sights
        self._started_s = time.monotonic()
        self._tenants = Glimpse(self._read_tenants, _TENANTS_KEPT_S)
        self._batches = Glimpse(self._read_batches, _BATCHES_KEPT_S)

    async def take(self) -> dict[str, Any]:
        """The snapshot. Times are Unix seconds, lengths of time seconds."""
        sights = self._sights
        open_elsewhere = await sights.elsewhere.gather()
        reading = sights.readings.take()
        return {
            "object": "overview",
            "taken_at_s": round(time.time(), 3),
            "uptime_s": round(time.monotonic() - self._started_s, 1),
            "versions": dict(sights.versions),
            "engine": self._engine(reading),
            "level": {**sights.ladder.status(), "levels": _levels()},
            "limits": {"mode": sights.limiter.mode, "replicas": sights.limiter.replicas},
            "requests": self._requests(open_elsewhere),
            "kv": self._kv(),
            "counters": _counters(reading),
            "histograms": {name: _histogram(reading.distribution(metric)) for name, metric in HISTOGRAMS.items()},
            "tenants": await self._shown_tenants(),
            "batches": await self._shown_batches(),
            "fallbacks": _fallbacks(reading),
            "recent": {f"{kind}s": [_entry(entry) for entry in sights.recent.latest(kind)] for kind in _KINDS},
        }

    def _engine(self, reading: Reading) -> dict[str, Any]:
        slot = self._sights.slot
        stack = slot.stack if slot.ready else None
        return {
            "ready": slot.ready and not self._sights.requests.leaving,
            "stage": "draining" if self._sights.requests.leaving else slot.stage,
            "models": [] if stack is None else list(stack.model_names),
            "max_model_len": None if stack is None else stack.max_model_len,
            "restarts": _whole(reading.by(_RESTARTS, "reason")),
            "failed_restarts": int(reading.total(_FAILED_RESTARTS) or 0),
        }

    def _requests(self, open_elsewhere: int) -> dict[str, Any]:
        admission = self._sights.gate.admission
        return {
            "open": len(self._sights.requests) + open_elsewhere,
            "running": {name: admission.ledger.running(name) for name in TRAFFIC_CLASSES},
            "waiting": {name: admission.backlog.size(name) for name in TRAFFIC_CLASSES},
            "running_cap": admission.cap.limit if admission.capacity is not None else None,
        }

    def _kv(self) -> dict[str, Any]:
        """Tokens."""
        admission = self._sights.gate.admission
        capacity = admission.capacity.kv_tokens if admission.capacity is not None else 0
        return {
            "capacity_tokens": capacity,
            "reserved_tokens": admission.ledger.reserved,
            "used_tokens": round(admission.kv_usage_ratio * capacity),
        }

    async def _read_tenants(self) -> list[tuple[Tenant, TokenCounts]]:
        tenants = await self._sights.tenants.tenants()
        used = await self._sights.usage.today([tenant.name for tenant in tenants])
        return [(tenant, used[tenant.name]) for tenant in tenants]

    async def _shown_tenants(self) -> dict[str, Any]:
        found, problem = await self._tenants.look()
        busiest = nsmallest(_MOST_TENANTS, found or [], key=self._busiest_first)
        return {"total": len(found or []), "shown": [self._tenant(*one) for one in busiest], "problem": problem}

    def _busiest_first(self, one: tuple[Tenant, TokenCounts]) -> tuple[int, int, str]:
        tenant, used = one
        now = self._running(tenant) + self._waiting(tenant)
        return -now, -(used.prompt_tokens + used.completion_tokens), tenant.name

    def _tenant(self, tenant: Tenant, used: TokenCounts) -> dict[str, Any]:
        return {
            "name": tenant.name,
            "class": tenant.traffic_class,
            "running": self._running(tenant),
            "waiting": self._waiting(tenant),
            "today": asdict(used),
            "limits": written_limits(tenant.limits),
        }

    def _running(self, tenant: Tenant) -> int:
        return self._sights.gate.admission.ledger.places_of(tenant.name)

    def _waiting(self, tenant: Tenant) -> int:
        return self._sights.gate.admission.backlog.waiting_of(tenant.name)

    async def _read_batches(self) -> list[Batch]:
        return [] if self._sights.batches is None else await self._sights.batches.unfinished()

    async def _shown_batches(self) -> dict[str, Any]:
        found, problem = await self._batches.look()
        shown = [_batch(batch) for batch in (found or [])[:_MOST_BATCHES]]
        return {"total": len(found or []), "shown": shown, "problem": problem}


_KINDS: Final[tuple[Kind, ...]] = ("refusal", "truncation")


def _levels() -> list[dict[str, Any]]:
    return [{"level": int(level), "name": level.name.lower(), "description": DESCRIPTIONS[level]} for level in Level]


def _counters(reading: Reading) -> dict[str, Any]:
    """Since the start; None for what nobody counts. vLLM's begin anew with each engine."""
    prompt, cached = reading.total(_PROMPT), reading.total(_PROMPT, source="cache")
    return {
        "prompt_tokens": prompt,
        "cached_prompt_tokens": cached,
        "completion_tokens": reading.total(_COMPLETION),
        "requests_by_status": _by_status(reading),
        "truncated_requests": reading.total(_TRUNCATED),
        "limit_refusals": _whole(reading.by(_LIMITED, "limit")),
        "overload_refusals": _whole(reading.by(_OVERLOADED, "class")),
        "preemptions": reading.total(_PREEMPTED),
    }


def _by_status(reading: Reading) -> dict[str, int]:
    """Finished requests for work, by the first digit of their status: `2xx`, `4xx`, `5xx`."""
    sums = {"2xx": 0, "4xx": 0, "5xx": 0}
    for sample in reading.samples.get(_HTTP, ()):
        labels = sample.labels
        if labels["method"] == _WORK_METHOD and not labels["route"].startswith(_NO_WORK):
            group = f"{labels['status'][:1]}xx"
            sums[group] = sums.get(group, 0) + int(sample.value)
    return sums


def _histogram(found: Distribution | None) -> dict[str, Any] | None:
    """`counts` are cumulative; the last one is that of all, and its bound is null, since JSON has no infinity."""
    if found is None:
        return None
    bounds = [None if math.isinf(bound) else bound for bound in found.bounds]
    return {"bounds": bounds, "counts": [int(count) for count in found.counts], "sum": found.sum}


def _fallbacks(reading: Reading) -> list[dict[str, Any]]:
    return [
        {"name": name, "up": bool(up), "requests": _outcomes(reading, name)}
        for name, up in sorted(reading.by(_FALLBACK_UP, "upstream").items())
    ]


def _outcomes(reading: Reading, upstream: str) -> dict[str, int]:
    samples = reading.samples.get(_FALLBACK_REQUESTS, ())
    return {sample.labels["outcome"]: int(sample.value) for sample in samples if sample.labels["upstream"] == upstream}


def _batch(batch: Batch) -> dict[str, Any]:
    return {
        "id": batch.id,
        "tenant": batch.tenant,
        "status": batch.status,
        "endpoint": batch.endpoint,
        "model": batch.model,
        "created_at": batch.created_at,
        "expires_at": batch.expires_at,
        "total": batch.counts.total,
        "completed": batch.counts.completed,
        "failed": batch.counts.failed,
    }


def _entry(entry: Entry) -> dict[str, Any]:
    last = entry.last
    return {
        "code": last.code,
        "route": last.route,
        "tenant": last.tenant,
        "status": last.status,
        "detail": last.detail,
        "request_id": last.request_id,
        "count": entry.count,
        "first_s": round(entry.first_s, 3),
        "last_s": round(entry.last_s, 3),
    }


def _whole(figures: Mapping[str, float]) -> dict[str, int]:
    return {name: int(value) for name, value in figures.items()}
