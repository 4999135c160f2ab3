"""How a process stops serving: it says so, takes nothing new, and lets what runs come to its end."""

import asyncio
from typing import Final

import structlog

from server.lifecycle.tasks import first
from server.policy.refusals import Draining
from server.serving.requests import OpenRequests
from server.settings import Settings

log = structlog.get_logger("server.lifecycle")

_UNFINISHED: Final = "The server is stopping and could not finish this answer."


async def drain(requests: OpenRequests, settings: Settings, stop_at_once: asyncio.Event) -> None:
    """Finish what runs; what is still running at the deadline, or at a second signal, ends with an error."""
    await _lame_duck(requests, settings.drain_delay_s, stop_at_once)
    log.info("draining", open_requests=len(requests), timeout_s=settings.drain_timeout_s)
    draining = asyncio.create_task(requests.drain(settings.drain_timeout_s))
    await first(stop_at_once.wait(), draining)
    draining.cancel()
    if len(requests):
        log.warning("ending open requests", open_requests=len(requests))
        await requests.end_all(Draining(_UNFINISHED))


async def _lame_duck(requests: OpenRequests, delay_s: float, stop_at_once: asyncio.Event) -> None:
    """Say that the server is leaving before it refuses anything: a balancer needs a moment to see it."""
    requests.announce_leaving()
    if delay_s > 0:
        log.info("leaving: not ready any more, and taking requests for a moment", delay_s=delay_s)
        await first(stop_at_once.wait(), asyncio.sleep(delay_s))
