"""A further front-end as a real process, which joins an engine's stand-in and serves HTTP on the first one's socket."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import httpx
import pytest

from server.policy.reservations import Capacity
from tests.engine.stand_in import plan_of, stand_in
from tests.lifecycle.first_process import OPERATOR_KEY, FirstProcess, first_process
from tests.lifecycle.test_switchboard import FakeStack

if TYPE_CHECKING:
    from server.engine.stack import Stack

pytestmark = [pytest.mark.anyio, pytest.mark.engine, pytest.mark.slow]

CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "Hello."}], "max_tokens": 1}
KEY = {"authorization": "Bearer a-key"}
OPERATOR = {"authorization": f"Bearer {OPERATOR_KEY}"}


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


async def until(holds: Callable[[], object], what: str) -> None:
    for _ in range(900):
        if holds():
            return
        await asyncio.sleep(0.1)
    raise AssertionError(what)


def seated(first: FirstProcess, stack: FakeStack, plan: bytes) -> None:
    """What the first process does when its engine serves."""
    first.app.gate.open(Capacity(10_000, 16, 8), None)
    first.board.engine_is(cast("Stack", stack), plan)


async def test_it_joins_serves_passes_on_and_outlives_an_engine(tmp_path: Path, tiny_tools_model: Path) -> None:
    plan, stack = plan_of(tiny_tools_model), FakeStack()
    (tmp_path / "logging.json").write_text('{"version": 1, "disable_existing_loggers": false}')
    async with first_process(tmp_path, 2) as first, httpx.AsyncClient(base_url=first.url, timeout=120) as client:
        await until(lambda: first.lines, "it has not connected")
        (address,) = first.board.next_engine()
        with stand_in(address) as engine:
            seated(first, stack, plan)
            answer = await client.post("/v1/chat/completions", json=CHAT, headers=KEY)
            assert answer.status_code == 200, answer.text
            assert answer.json()["usage"]["completion_tokens"] == 1
            assert float(answer.headers["x-queue-wait"]) >= 0
            assert len(engine.requests) == 1
            assert stack.steps
            assert (await client.get("/health/ready")).status_code == 200
            assert (await client.post("/v1/chat/completions", json=CHAT)).status_code == 401
            page = (await client.get("/metrics")).text
            assert 'tidegate_requests_total{class="default",route="/v1/chat/completions",status="200"} 1.0' in page
            overview = (await client.get("/admin/overview", headers=OPERATOR)).json()
            assert overview["recent"]["refusals"][0]["code"] == "invalid_api_key"
            assert len(first.app.gate.admission.ledger) == 0
        first.board.engine_is_gone()
        first.app.gate.close()
        waiting = asyncio.create_task(client.post("/v1/chat/completions", json=CHAT, headers=KEY))
        (address,) = first.board.next_engine()
        await asyncio.sleep(1)
        assert not waiting.done()
        with stand_in(address) as engine:
            seated(first, FakeStack(), plan)
            assert (await waiting).status_code == 200
            assert len(engine.requests) == 1
            await first.several.stop()
