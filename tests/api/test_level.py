"""The operator's switch over HTTP."""

from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Request
from prometheus_client import CollectorRegistry

from server.api.auth import presented_key
from server.api.level import level_router
from server.app import on_refusal
from server.policy.ladder import LadderRules, Level, Pin
from server.policy.refusals import InvalidApiKey, Refusal
from server.serving.engine_slot import EngineSlot
from server.serving.ladder import LadderSources, LadderWatch, LocalPins
from server.store.level import PinsUnreachable
from server.telemetry.resilience import ResilienceMetrics

pytestmark = pytest.mark.anyio

KEY = {"authorization": "Bearer the-operator"}
GOOD = {"level": 3, "reason": "a migration", "ttl_s": 60}


class FragilePins(LocalPins):
    """Pins whose store can go away."""

    away = False

    async def write(self, pin: Pin) -> None:
        if self.away:
            raise PinsUnreachable("timeout")
        await super().write(pin)


class Switch:
    """The routes on an application of their own."""

    def __init__(self, *, has_fallback: bool = False) -> None:
        self.pins = FragilePins()
        sources = LadderSources(lambda: 0.0, lambda: True, EngineSlot(), has_fallback)
        self.ladder = LadderWatch(LadderRules(), sources, self.pins, ResilienceMetrics(CollectorRegistry()))
        app = FastAPI()
        app.include_router(level_router(self.ladder, self._operators))
        app.add_exception_handler(Refusal, on_refusal)
        self.client = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test", headers=KEY)

    @staticmethod
    async def _operators(request: Request) -> None:
        if presented_key(request) != "the-operator":
            raise InvalidApiKey("This route is the operator's.")


@pytest.fixture
async def switch() -> AsyncIterator[Switch]:
    made = Switch()
    async with made.client:
        yield made


async def test_the_level_is_shown_with_what_made_it_so(switch: Switch) -> None:
    shown = (await switch.client.get("/admin/level")).json()
    assert (shown["level"], shown["name"], shown["because"], shown["pin"]) == (0, "normal", "pressure", None)


async def test_a_level_is_pinned_and_unpinned(switch: Switch) -> None:
    pinned = (await switch.client.put("/admin/level", json={**GOOD, "by": "anna"})).json()
    assert (pinned["level"], pinned["pin"]["reason"]) == (3, "a migration")
    assert pinned["pin"]["by"].startswith("anna (")
    assert switch.ladder.level == Level.ESSENTIAL
    cleared = (await switch.client.delete("/admin/level")).json()
    assert (cleared["level"], cleared["pin"]) == (0, None)


async def test_a_pin_lasts_an_hour_unless_it_says_otherwise(switch: Switch) -> None:
    body = {"level": 1, "reason": "a test"}
    pinned = (await switch.client.put("/admin/level", json=body)).json()
    assert 3590 < pinned["pin"]["ttl_s"] <= 3600


@pytest.mark.parametrize(
    "wrong",
    [
        {"level": 6}, {"level": -1}, {"level": "2"}, {"level": 2.5}, {"level": True}, {"level": None}, {"ttl_s": 0},
        {"ttl_s": -5}, {"ttl_s": 10**9}, {"ttl_s": "soon"}, {"reason": ""}, {"reason": "   "}, {"reason": "x" * 501},
        {"unknown": 1}, {"by": ""},
    ],
)  # fmt: skip
async def test_a_wrong_field_is_a_400_that_names_it_and_changes_nothing(switch: Switch, wrong: dict[str, Any]) -> None:
    refused = await switch.client.put("/admin/level", json={**GOOD, **wrong})
    error = refused.json()["error"]
    assert (refused.status_code, error["param"]) == (400, next(iter(wrong)))
    assert "Nothing was changed" in error["message"]
    assert (await switch.client.get("/admin/level")).json()["pin"] is None


@pytest.mark.parametrize("content", [b"", b"nonsense", b"[1]", b'{"level": NaN, "reason": "x"}'])
async def test_a_body_that_is_no_form_is_a_400(switch: Switch, content: bytes) -> None:
    headers = {"content-type": "application/json"}
    refused = await switch.client.put("/admin/level", content=content, headers=headers)
    assert refused.status_code == 400
    assert refused.json()["error"]["message"]


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE"])
async def test_without_the_operators_key_nothing_is_shown_and_nothing_changes(switch: Switch, method: str) -> None:
    refused = await switch.client.request(method, "/admin/level", json=GOOD, headers={"authorization": "Bearer x"})
    assert (refused.status_code, refused.json()["error"]["code"]) == (401, "invalid_api_key")
    assert switch.ladder.level == Level.NORMAL


async def test_level_four_needs_a_fallback(switch: Switch) -> None:
    refused = await switch.client.put("/admin/level", json={**GOOD, "level": 4})
    assert refused.status_code == 400
    assert "--fallback-url" in refused.json()["error"]["message"]
    with_fallback = Switch(has_fallback=True)
    async with with_fallback.client as client:
        assert (await client.put("/admin/level", json={**GOOD, "level": 4})).json()["level"] == 4


async def test_a_pin_that_cannot_be_kept_is_refused_and_changes_nothing(switch: Switch) -> None:
    switch.pins.away = True
    refused = await switch.client.put("/admin/level", json=GOOD)
    assert refused.status_code == 503
    assert "Nothing was changed" in refused.json()["error"]["message"]
    assert switch.ladder.level == Level.NORMAL
