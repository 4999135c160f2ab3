"""A small load generator: a fixed number of chats, a fixed number of them at a time, each of a fixed length.

It reads with aiohttp, which vLLM brings along and uses for its own benchmarks: a streamed token costs a third of the
CPU that it costs with httpx, and every core the generator takes is missing to the servers. vLLM's own request function
is not used because it takes the frame that only carries the role for the first token, and has no non-streamed chats.
"""

import asyncio
import json
import math
import random
import re
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final

import aiohttp

WORDS: Final = re.findall(
    "[a-z]+",
    "tide gate harbour water level river boat lock stone bridge wind rope anchor sail north chart signal lamp crew "
    "storm cargo pilot depth channel bank reed gull salt iron timber market street letter clock winter garden",
)
_PROMPT_WORDS: Final = 60
_CHAT_PATH: Final = "/v1/chat/completions"
_DATA: Final = b"data: "
_DONE: Final = b"data: [DONE]"
_TIMEOUT: Final = aiohttp.ClientTimeout(total=600)


class LoadFailed(Exception):
    """An answer that was refused, broken off or of another length than asked: the turn would measure something else."""


@dataclass(frozen=True, slots=True)
class Load:
    """One turn's work. The same seed gives the same prompts, and another seed prompts that no cache has seen."""

    concurrency: int
    requests: int
    max_tokens: int
    stream: bool
    seed: int

    def bodies(self, model: str) -> Iterator[dict[str, Any]]:
        """The request bodies. `ignore_eos` makes every answer `max_tokens` long."""
        words = random.Random(self.seed)
        for number in range(self.requests):
            text = " ".join(words.choices(WORDS, k=_PROMPT_WORDS))
            body = {
                "model": model,
                "messages": [{"role": "user", "content": f"Tell a story with these words: {text}"}],
                "max_tokens": self.max_tokens,
                "ignore_eos": True,
                "temperature": 0,
                "seed": number,
            }
            yield {**body, "stream": True, "stream_options": {"include_usage": True}} if self.stream else body


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer's times. `ttft_s` and `itl_s` (the gaps between frames with text) are there for streams only."""

    total_s: float
    ttft_s: float = 0.0
    itl_s: Sequence[float] = ()


async def run(url: str, model: str, load: Load, key: str | None = None) -> dict[str, float]:
    """Send the load and return the turn's figures. Raises `LoadFailed`."""
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    bodies = load.bodies(model)
    answers: list[Answer] = []

    async def client(session: aiohttp.ClientSession) -> None:
        for body in bodies:  # one iterator for all clients: whoever is free takes the next
            answer = await _ask(session, body)
            answers.append(answer)

    connections = aiohttp.TCPConnector(limit=load.concurrency)
    async with aiohttp.ClientSession(url, connector=connections, timeout=_TIMEOUT, headers=headers) as session:
        started_s = time.perf_counter()
        async with asyncio.TaskGroup() as clients:
            for _ in range(load.concurrency):
                clients.create_task(client(session))
        wall_s = time.perf_counter() - started_s
    return _figures(load, answers, wall_s)


async def _ask(session: aiohttp.ClientSession, body: dict[str, Any]) -> Answer:
    started_s = time.perf_counter()
    async with session.post(_CHAT_PATH, json=body) as response:
        if response.status != 200:
            raise LoadFailed(f"{response.status}: {(await response.text())[:300]}")
        if body.get("stream"):
            return await _read_stream(response, started_s, body["max_tokens"])
        usage = (await response.json())["usage"]
    _check_length(usage, body["max_tokens"])
    return Answer(time.perf_counter() - started_s)


async def _read_stream(response: aiohttp.ClientResponse, started_s: float, max_tokens: int) -> Answer:
    arrivals_s: list[float] = []
    usage: dict[str, Any] = {}
    async for line in response.content:
        if not line.startswith(_DATA) or line.startswith(_DONE):
            continue
        arrived_s = time.perf_counter()
        frame = json.loads(line[len(_DATA) :])
        if "error" in frame:
            raise LoadFailed(str(frame["error"]))
        usage = frame.get("usage") or usage
        if any(choice["delta"].get("content") for choice in frame["choices"]):
            arrivals_s.append(arrived_s)
    _check_length(usage, max_tokens)
    if not arrivals_s:
        raise LoadFailed("a stream without text")
    gaps_s = [later - earlier for earlier, later in pairwise(arrivals_s)]
    return Answer(time.perf_counter() - started_s, arrivals_s[0] - started_s, gaps_s)


def _check_length(usage: dict[str, Any], max_tokens: int) -> None:
    if usage.get("completion_tokens") != max_tokens:
        raise LoadFailed(f"asked for {max_tokens} tokens, and the usage says {usage}")


def _figures(load: Load, answers: Sequence[Answer], wall_s: float) -> dict[str, float]:
    figures = {
        "tokens_per_s": len(answers) * load.max_tokens / wall_s,
        "requests_per_s": len(answers) / wall_s,
        **_percentiles("total", [answer.total_s for answer in answers]),
    }
    if load.stream:
        figures["chunks_per_s"] = sum(1 + len(answer.itl_s) for answer in answers) / wall_s
        figures |= _percentiles("ttft", [answer.ttft_s for answer in answers])
        gaps_s = [gap_s for answer in answers for gap_s in answer.itl_s]
        figures |= _percentiles("itl", gaps_s) | {"itl_max_ms": max(gaps_s, default=0.0) * 1000}
    return figures


def _percentiles(name: str, values_s: Sequence[float]) -> dict[str, float]:
    """The median, the 95th and the 99th percentile, in milliseconds; nothing where there are no values."""
    if not values_s:
        return {}
    tails = {f"{name}_p{p}_ms": percentile(values_s, p) * 1000 for p in (95, 99)}
    return {f"{name}_p50_ms": statistics.median(values_s) * 1000, **tails}


def percentile(values: Sequence[float], percent: int) -> float:
    """The value that so many percent are not above. There must be one."""
    return sorted(values)[math.ceil(percent / 100 * len(values)) - 1]
