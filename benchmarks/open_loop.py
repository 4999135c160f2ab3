"""Sends requests when they are due, whether earlier ones have been answered or not, as a crowd of clients does."""

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import aiohttp

from benchmarks.contenders import MODEL_NAME
from benchmarks.traffic import Arrival

_CHAT_PATH: Final = "/v1/chat/completions"
_DATA: Final = b"data: "
_DONE: Final = b"data: [DONE]"
_TIMEOUT: Final = aiohttp.ClientTimeout(total=None)

Ending = Literal["answered", "refused", "failed", "unfinished"]


@dataclass(slots=True)
class Outcome:
    """What became of one arrival. Times are seconds from when it was due, so a late generator counts against itself."""

    arrival: Arrival
    ending: Ending = "unfinished"
    status: int = 0
    ttft_s: float | None = None
    total_s: float | None = None
    tokens: int = 0
    late_s: float = 0.0

    @property
    def tpot_s(self) -> float | None:
        """Mean seconds per token after the first."""
        if self.ttft_s is None or self.total_s is None or self.tokens < 2:
            return None
        return (self.total_s - self.ttft_s) / (self.tokens - 1)

    def within(self, ttft_slo_s: float, tpot_slo_s: float) -> bool:
        """Whether the answer came in full and in time. Nobody waits for batch work: it only has to be done."""
        if self.arrival.caller.traffic_class == "batch":
            return self.ending == "answered"
        if self.ending != "answered" or self.ttft_s is None or self.ttft_s > ttft_slo_s:
            return False
        return self.tpot_s is None or self.tpot_s <= tpot_slo_s


@dataclass(slots=True)
class Run:
    """All outcomes of one turn, and the CPU seconds that sending and reading them took."""

    outcomes: list[Outcome] = field(default_factory=list)
    generator_cpu_s: float = 0.0
    wall_s: float = 0.0


async def run(url: str, arrivals: Sequence[Arrival], grace_s: float) -> Run:
    """Send every arrival at its time; what is still open `grace_s` after the last one is hung up on."""
    turn = Run([Outcome(arrival) for arrival in arrivals])
    cpu_s, started_s = time.process_time(), time.perf_counter()
    async with aiohttp.ClientSession(url, connector=aiohttp.TCPConnector(limit=0), timeout=_TIMEOUT) as session:
        tasks = []
        for outcome in turn.outcomes:
            await asyncio.sleep(max(0.0, started_s + outcome.arrival.at_s - time.perf_counter()))
            tasks.append(asyncio.create_task(_ask(session, outcome, started_s + outcome.arrival.at_s)))
        if tasks:
            _, late = await asyncio.wait(tasks, timeout=grace_s)
            for task in late:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
    turn.generator_cpu_s, turn.wall_s = time.process_time() - cpu_s, time.perf_counter() - started_s
    return turn


async def _ask(session: aiohttp.ClientSession, outcome: Outcome, due_s: float) -> None:
    outcome.late_s = time.perf_counter() - due_s
    key = outcome.arrival.caller.key
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        async with session.post(_CHAT_PATH, json=outcome.arrival.body(MODEL_NAME), headers=headers) as response:
            outcome.status = response.status
            if response.status == 200:
                await _read(response, outcome, due_s)
            else:
                await response.read()
                outcome.ending = "refused" if response.status in {429, 503} else "failed"
    except aiohttp.ClientError:
        outcome.ending = "failed"
    outcome.total_s = time.perf_counter() - due_s


async def _read(response: aiohttp.ClientResponse, outcome: Outcome, due_s: float) -> None:
    async for line in response.content:
        if not line.startswith(_DATA) or line.startswith(_DONE):
            continue
        frame: dict[str, Any] = json.loads(line[len(_DATA) :])
        if "error" in frame:
            outcome.ending = "refused"
            return
        if outcome.ttft_s is None and any(choice["delta"].get("content") for choice in frame["choices"]):
            outcome.ttft_s = time.perf_counter() - due_s
        if usage := frame.get("usage"):
            outcome.tokens = usage["completion_tokens"]
    finished = outcome.tokens == outcome.arrival.max_tokens
    outcome.ending = "answered" if finished else "failed"
