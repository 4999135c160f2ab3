"""Which routes a further process answers itself, and which it passes on to the first."""

from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from starlette.routing import Route

from server.api.direct import DirectRoutes
from server.api.middleware import Exchange
from server.api.passing_on import answered_here
from server.app import build_application
from server.settings import Settings

# Every route that a further process does not answer. Whoever adds a route decides here, or in `answered_here`.
PASSED_ON = {
    "/admin/level", "/admin/overview", "/admin/tenants", "/admin/tenants/{name}", "/admin/tenants/{name}/keys",
    "/admin/tenants/{name}/keys/{key_id}", "/admin/tenants/{name}/rotate", "/admin/tenants/{name}/usage",
    "/collective_rpc", "/console", "/console/{name:path}", "/is_scaling_elastic_ep", "/is_sleeping", "/load",
    "/metrics", "/reset_encoder_cache", "/reset_mm_cache", "/reset_prefix_cache", "/scale_elastic_ep", "/server_info",
    "/sleep", "/start_profile", "/stop_profile", "/v1/batches", "/v1/batches/{batch_id}",
    "/v1/batches/{batch_id}/cancel", "/v1/files", "/v1/files/{file_id}", "/v1/files/{file_id}/content",
    "/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/v1/usage", "/wake_up",
    "/docs", "/docs/oauth2-redirect", "/openapi.json", "/redoc",
}  # fmt: skip


def mounted_paths() -> set[str]:
    """The paths of all routes of the real application."""
    chosen: dict[str, Any] = {"data_folder": Path("/nowhere"), "developer_routes": True}
    exchange = build_application(Settings(**chosen), {"tidegate": "1.2.3"}, CollectorRegistry(), "key").asgi
    assert isinstance(exchange, Exchange)
    assert isinstance(exchange._app, DirectRoutes)
    return {route.path for route in exchange._app._api.routes if isinstance(route, Route)}


def test_every_route_is_answered_here_or_passed_on() -> None:
    is_answered_here = answered_here(keeps_responses=False)
    assert {path for path in mounted_paths() if not is_answered_here(path)} == PASSED_ON


def test_responses_that_are_kept_are_asked_for_where_they_are() -> None:
    here = {path for path in mounted_paths() if answered_here(keeps_responses=False)(path)}
    still_here = {path for path in here if answered_here(keeps_responses=True)(path)}
    assert here - still_here == {
        "/v1/responses", "/v1/responses/{response_id}", "/v1/responses/{response_id}/cancel",
    }  # fmt: skip


@pytest.mark.parametrize("root_path", ["/llm", "/llm/"])
def test_a_prefix_that_a_proxy_leaves_in_the_path_makes_no_difference(root_path: str) -> None:
    is_answered_here = answered_here(keeps_responses=False, root_path=root_path)
    assert is_answered_here("/llm/v1/chat/completions")
    assert is_answered_here("/v1/chat/completions")
    assert not is_answered_here("/llm/admin/level")
    assert not is_answered_here("/other/v1/chat/completions")
