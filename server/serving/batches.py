"""Takes up the batches that have not ended: one of each tenant at a time, oldest first, each under a lease."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Final

import structlog

from server.policy.batches import Batch
from server.policy.tenants import Tenant
from server.serving.batch_life import BatchGone, BatchKeeping, BatchLife
from server.serving.batch_plan import InputLimits
from server.serving.batch_work import LineParts
from server.serving.blocking import in_thread
from server.store.answer_log import LogInUse
from server.store.batches import LEASE_S
from server.store.beats import until_beat
from server.store.ending import ended
from server.store.file_bodies import DiskFull
from server.store.file_records import StoredFile
from server.store.reaching import RedisUnavailable

log = structlog.get_logger(__name__)

_LOOK_INTERVAL_S: Final = 1.0
# While none is open: whoever makes one has it run at once, and others look after those of a replica that cannot.
_REST_INTERVAL_S: Final = 5.0
_RENEW_INTERVAL_S: Final = LEASE_S / 5
_SWEEP_INTERVAL_S: Final = 60.0
_SWEPT_AT_ONCE: Final = 100
# Each holds a plan of its input in memory: some 10 MB for 50,000 lines.
_MOST_AT_ONCE: Final = 16
_AFTER_TROUBLE_S: Final = 5.0
# What a task may take to let go before it is told again.
_CLEANUP_S: Final = 0.5

# The tenant with a name, as it is now; None where there is none any more.
TenantOf = Callable[[str], Awaitable[Tenant | None]]


@dataclass(frozen=True, slots=True)
class Runners:
    """Who runs batches here. `replica` is this process's name on its leases; `runs` False: nobody does."""

    replica: str
    tenant_of: TenantOf
    runs: bool = True


class LeaseLost(Exception):
    """Another replica may run the batch by now."""


class BatchRunner:
    """Runs batches as long as the server serves."""

    def __init__(self, keeping: BatchKeeping, lines: LineParts, limits: InputLimits, who: Runners) -> None:
        self._keeping = keeping
        self._lines = lines
        self._limits = limits
        self._who = who
        self._lives: dict[str, BatchLife] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._rest_until_s: dict[str, float] = {}
        self._look_now = asyncio.Event()
        self._said = ""

    def look(self) -> None:
        """There is a new batch."""
        self._look_now.set()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Run batches inside it. Leaving stops them where they are; what they wrote is kept, and they go on later."""
        if not self._who.runs:
            yield
            return
        tasks = [asyncio.create_task(self._run_all()), asyncio.create_task(self._sweep_now_and_then())]
        try:
            yield
        finally:
            await ended(tasks, _CLEANUP_S)
            await ended(self._tasks.values(), _CLEANUP_S)

    async def _run_all(self) -> None:
        missed = 0
        while True:
            self._look_now.clear()
            pause_s = _LOOK_INTERVAL_S
            try:
                if not await self._look():
                    pause_s = _REST_INTERVAL_S
                self._say("")
                missed = 0
            except RedisUnavailable as error:
                missed += 1
                if missed > 1:  # the first look may come before the embedded Redis is up
                    self._say(f"batches wait, because Redis does not answer: {error}")
            except (DiskFull, OSError) as error:
                self._say(f"batches wait, because their folder cannot be used: {error}")
            except Exception:  # one look that fails must not be the last
                log.exception("batches wait")
            with suppress(TimeoutError):
                async with asyncio.timeout(until_beat(pause_s)):
                    await self._look_now.wait()

    async def _look(self) -> bool:
        """Take up what can be taken up. Returns whether any batch is open."""
        open_batches = await self._keeping.batches.open(self._keeping.bodies.folder_id())
        self._measure(open_batches)
        if self._lines.runner.draining or not self._lines.runner.ready:
            return bool(open_batches)
        busy = {batch.tenant for batch in open_batches if batch.id in self._tasks}
        for batch in open_batches:
            if len(self._tasks) >= _MOST_AT_ONCE:
                break
            if batch.tenant not in busy and await self._take(batch):
                busy.add(batch.tenant)
        return bool(open_batches)

    async def _take(self, batch: Batch) -> bool:
        if batch.id in self._tasks or time.monotonic() < self._rest_until_s.get(batch.id, 0.0):
            return False
        if not await self._keeping.batches.take(batch.id, self._who.replica):
            return False
        self._rest_until_s.pop(batch.id, None)
        task = asyncio.create_task(self._run(batch.id))
        self._tasks[batch.id] = task
        task.add_done_callback(lambda _: self._forget(batch.id))
        return True

    def _forget(self, batch_id: str) -> None:
        self._tasks.pop(batch_id, None)
        self._lives.pop(batch_id, None)
        self._look_now.set()

    async def _run(self, batch_id: str) -> None:
        """One batch under its lease. What goes wrong is logged, and the batch is taken up again later."""
        trouble = True
        with structlog.contextvars.bound_contextvars(batch=batch_id):
            try:
                async with self._leased(batch_id):
                    await self._live(batch_id)
                trouble = False
            except (RedisUnavailable, LeaseLost, LogInUse, BatchGone) as reason:
                log.warning("batch put back", why=type(reason).__name__, detail=str(reason))
            except Exception:  # of this batch; the others go on
                log.exception("batch put back")
            finally:
                if trouble:
                    self._rest_until_s[batch_id] = time.monotonic() + _AFTER_TROUBLE_S

    async def _live(self, batch_id: str) -> None:
        stored = await self._keeping.batches.find(batch_id)
        if stored is None or stored.batch.ended:
            return
        tenant = await self._who.tenant_of(stored.batch.tenant)
        life = self._lives[batch_id] = BatchLife(stored, tenant, self._keeping, self._lines, self._limits)
        log.info("batch taken up", status=stored.batch.status)
        await life.live()

    @asynccontextmanager
    async def _leased(self, batch_id: str) -> AsyncIterator[None]:
        """Keep the lease while inside. Raises `LeaseLost` in there as soon as another replica could have it."""
        inside, lost = asyncio.current_task(), asyncio.Event()
        assert inside is not None
        renewing = asyncio.create_task(self._renew(batch_id, inside, lost))
        try:
            yield
        except asyncio.CancelledError:
            if not lost.is_set():
                raise
            while inside.uncancel():
                pass
            raise LeaseLost(batch_id) from None
        finally:
            await ended([renewing], _CLEANUP_S)
            with suppress(RedisUnavailable):
                await self._keeping.batches.release(batch_id, self._who.replica)

    async def _renew(self, batch_id: str, inside: asyncio.Task[None], lost: asyncio.Event) -> None:
        """Renew the lease; when it is lost, cancel `inside` until that ends."""
        renewed_s = time.monotonic()
        while time.monotonic() < renewed_s + LEASE_S - _RENEW_INTERVAL_S:
            await asyncio.sleep(_RENEW_INTERVAL_S)
            asked_s = time.monotonic()
            try:
                if not await self._keeping.batches.renew(batch_id, self._who.replica):
                    break
                renewed_s = asked_s
            except RedisUnavailable as error:
                log.warning("a lease could not be renewed", reason=str(error))
        lost.set()
        await ended([inside], _CLEANUP_S)

    def _measure(self, open_batches: list[Batch]) -> None:
        pending = sum(
            life.pending_lines if (life := self._lives.get(batch.id)) is not None else _left(batch)
            for batch in open_batches
        )
        now_s = self._keeping.clock()
        oldest_s = max((now_s - batch.created_at for batch in open_batches), default=0.0)
        self._lines.metrics.queued(len(open_batches), pending, oldest_s)

    async def _sweep_now_and_then(self) -> None:
        """Remove files that are kept no longer, unless a batch still reads them."""
        while True:
            try:
                await in_thread(self._keeping.bodies.sweep)
                await self.sweep()
            except (RedisUnavailable, DiskFull, OSError) as error:
                log.debug("files could not be swept", reason=str(error))
            except Exception:  # one sweep that fails must not be the last
                log.exception("files could not be swept")
            await asyncio.sleep(_SWEEP_INTERVAL_S)

    async def sweep(self) -> None:
        """Remove what is kept no longer."""
        keeping = self._keeping
        folder = keeping.bodies.folder_id()
        expired = await keeping.files.expired(keeping.clock(), _SWEPT_AT_ONCE)
        in_use = {batch.input_file_id for batch in await keeping.batches.open(folder)}
        for file in _here(expired, folder):
            if file.id not in in_use and await keeping.files.delete(file):
                keeping.bodies.delete(file.id)

    def _say(self, sentence: str) -> None:
        if sentence and sentence != self._said:
            log.warning(sentence)
        self._said = sentence


def _left(batch: Batch) -> int:
    return batch.counts.total - batch.counts.completed - batch.counts.failed


def _here(files: Iterable[StoredFile], folder: str) -> Iterable[StoredFile]:
    return (file for file in files if file.folder == folder)
