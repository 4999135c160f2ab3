"""What a tenant has used today and this month, by model."""

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import JSONResponse

from server.api.auth import Callers, Operators
from server.serving.tenant_desk import TenantDesk
from server.serving.usage import UsageDesk
from server.store.usage import TokenCounts, Usage


def usage_router(usage: UsageDesk, desk: TenantDesk, callers: Callers, operators: Operators) -> APIRouter:
    """`/v1/usage` for a tenant itself, and the same of any tenant for the operator."""
    router = APIRouter()

    @router.get("/v1/usage", dependencies=[Depends(callers)])
    async def own_usage(request: Request) -> Response:
        """Your own tokens by model, today and this month (UTC)."""
        name = request.state.tenant.name
        return JSONResponse(_shown(name, *await usage.read(name)))

    @router.get("/admin/tenants/{name}/usage", tags=["operator"], dependencies=[Depends(operators)])
    async def usage_of(name: str) -> Response:
        """A tenant's tokens by model, today and this month (UTC)."""
        await desk.entry(name)
        return JSONResponse(_shown(name, *await usage.read(name)))

    return router


def _shown(tenant: str, moment: datetime, used: Usage) -> dict[str, Any]:
    return {
        "object": "usage",
        "tenant": tenant,
        "today": {"date": f"{moment:%Y-%m-%d}", **_figures(used.day)},
        "this_month": {"month": f"{moment:%Y-%m}", **_figures(used.month)},
    }


def _figures(by_model: Mapping[str, TokenCounts]) -> dict[str, Any]:
    models = [{"model": model, **_counts(counts)} for model, counts in by_model.items()]
    return {"total_tokens": sum(model["total_tokens"] for model in models), "models": models}


def _counts(counts: TokenCounts) -> dict[str, int]:
    return {
        "requests": counts.requests,
        "prompt_tokens": counts.prompt_tokens,
        "cached_tokens": counts.cached_tokens,
        "completion_tokens": counts.completion_tokens,
        "total_tokens": counts.prompt_tokens + counts.completion_tokens,
    }
