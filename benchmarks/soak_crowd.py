"""The clients of a soak, and their looks at what the server holds."""

import asyncio
import time
from collections import Counter
from typing import Final

import aiohttp

from benchmarks.comparison import say
from benchmarks.contenders import Contender
from benchmarks.holdings import holdings
from benchmarks.soak_mix import Ask, asks
from benchmarks.soak_report import Sample

_CLIENTS: Final = 16
_SAMPLES: Final = 200
_TIMEOUT: Final = aiohttp.ClientTimeout(total=600)
_LEAVES_AT_ONCE_S: Final = 0.005
_DATA: Final = b"data: "
_DONE: Final = b"data: [DONE]"
_TASKS: Final = "tidegate_event_loop_tasks "


class Crowd:
    """Clients that work off one list of requests, and look at the server after every so many of them."""

    def __init__(self, contender: Contender, requests: int) -> None:
        self._contender = contender
        self._asks = asks(requests)
        self._requests = requests
        self._over = 0
        self.outcomes: Counter[tuple[str, str]] = Counter()
        self.unexpected: Counter[tuple[str, str]] = Counter()
        self.samples: list[Sample] = []

    async def run(self) -> None:
        connections = aiohttp.TCPConnector(limit=_CLIENTS + 1)
        async with aiohttp.ClientSession(self._contender.url, connector=connections, timeout=_TIMEOUT) as session:
            await self._look(session)
            async with asyncio.TaskGroup() as clients:
                for _ in range(_CLIENTS):
                    clients.create_task(self._client(session))

    async def _client(self, session: aiohttp.ClientSession) -> None:
        every = max(1, self._requests // _SAMPLES)
        for ask in self._asks:  # one iterator for all clients: whoever is free takes the next
            outcome = await outcome_of(session, ask)
            self.outcomes[ask.kind, outcome] += 1
            if outcome not in ask.expected:
                self.unexpected[ask.kind, outcome] += 1
            self._over += 1
            if self._over % every == 0:
                await self._look(session)

    async def _look(self, session: aiohttp.ClientSession) -> None:
        over = self._over
        async with session.get("/metrics") as response:
            page = await response.text()
        tasks = next(float(line.split()[1]) for line in page.splitlines() if line.startswith(_TASKS))
        self.samples.append(Sample(over, time.perf_counter(), int(tasks), holdings(self._contender)))
        if len(self.samples) % (_SAMPLES // 10) == 1:
            say(f"{over:,} of {self._requests:,} requests: {tasks:g} tasks, {self.samples[-1].held}")


async def outcome_of(session: aiohttp.ClientSession, ask: Ask) -> str:
    try:
        async with asyncio.timeout(_LEAVES_AT_ONCE_S if ask.frames == 0 else None):
            return await _asked(session, ask)
    except TimeoutError:
        return "left" if ask.frames == 0 else "timed out"
    except aiohttp.ClientError as error:
        return type(error).__name__


async def _asked(session: aiohttp.ClientSession, ask: Ask) -> str:
    headers = {"Authorization": f"Bearer {ask.key}"}
    async with session.post(ask.path, json=ask.body, headers=headers) as response:
        if response.status != 200:
            await response.read()
            return str(response.status)
        if not ask.body.get("stream"):
            return "answered" if await response.json() else "empty"
        frames, last = 0, b""
        async for line in response.content:
            if not line.startswith(_DATA):
                continue
            frames += 1
            if frames == ask.frames:
                response.close()
                return "left"
            last = line
            if b'"error"' in line:
                return "broken off"
    return "answered" if last.startswith(_DONE) else "cut short"
