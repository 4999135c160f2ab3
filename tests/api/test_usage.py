"""What a tenant and the operator are told of usage, with a real Redis."""

from collections.abc import Iterator
from datetime import UTC, datetime

import httpx
import pytest
from redis import Redis

from server.store.usage import TokenCounts, UsageEntry
from tests.api.running_application import OPERATOR_KEY, running
from tests.serving.fake_stack import FakeStack

OPERATOR = {"authorization": f"Bearer {OPERATOR_KEY}"}


@pytest.fixture
def server(store_url: str) -> Iterator[httpx.Client]:
    with running(FakeStack({}), redis_url=store_url) as client:
        client.post("/admin/tenants", json={"name": "search"}, headers=OPERATOR)
        key = client.post("/admin/tenants/search/keys", headers=OPERATOR).json()["key"]
        client.headers["authorization"] = f"Bearer {key}"
        yield client


def used(stored: Redis, model: str, prompt: int, completion: int, cached: int = 0) -> datetime:
    """As the limiter writes it."""
    moment = datetime.now(UTC)
    for key in UsageEntry("search", model, TokenCounts(), moment).keys:
        counts = {"requests": 1, "prompt_tokens": prompt, "cached_tokens": cached, "completion_tokens": completion}
        stored.hset(key, mapping={f"{model}|{name}": count for name, count in counts.items()})
    return moment


def test_a_tenant_reads_its_own_usage_by_model(server: httpx.Client, stored: Redis) -> None:
    used(stored, "b", 5, 7)
    moment = used(stored, "org/a|1", 100, 50, cached=64)
    body = server.get("/v1/usage").json()
    one = {"requests": 1, "prompt_tokens": 100, "cached_tokens": 64, "completion_tokens": 50, "total_tokens": 150}
    two = {"requests": 1, "prompt_tokens": 5, "cached_tokens": 0, "completion_tokens": 7, "total_tokens": 12}
    figures = {"total_tokens": 162, "models": [{"model": "b", **two}, {"model": "org/a|1", **one}]}
    assert body == {
        "object": "usage",
        "tenant": "search",
        "today": {"date": f"{moment:%Y-%m-%d}", **figures},
        "this_month": {"month": f"{moment:%Y-%m}", **figures},
    }
    assert server.get("/admin/tenants/search/usage", headers=OPERATOR).json() == body


def test_the_overview_sums_a_tenants_day_over_its_models(server: httpx.Client, stored: Redis) -> None:
    used(stored, "b", 5, 7)
    used(stored, "org/a|1", 100, 50, cached=64)
    server.post("/admin/tenants", json={"name": "idle"}, headers=OPERATOR)
    shown = server.get("/admin/overview", headers=OPERATOR).json()["tenants"]["shown"]
    today = {"requests": 2, "prompt_tokens": 105, "cached_tokens": 64, "completion_tokens": 57}
    assert [row["name"] for row in shown] == ["search", "idle"]
    assert shown[0]["today"] == today


def test_a_tenant_that_has_used_nothing_has_zeros(server: httpx.Client) -> None:
    assert server.get("/v1/usage").json()["today"]["total_tokens"] == 0


def test_usage_wants_a_key_and_that_of_others_the_operators(server: httpx.Client) -> None:
    assert server.get("/v1/usage", headers={"authorization": "Bearer tg-wrong"}).status_code == 401
    assert server.get("/admin/tenants/search/usage").status_code == 401
    assert server.get("/admin/tenants/nobody/usage", headers=OPERATOR).status_code == 404


def test_without_redis_usage_is_unavailable() -> None:
    with running(FakeStack({}), redis_url="redis://127.0.0.1:1") as client:
        answer = client.get("/v1/usage", headers=OPERATOR)
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "store_unavailable")
