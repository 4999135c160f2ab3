"""The life of one batch on the replica that has its lease: from whatever state it is found in to its end."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Final

import structlog

from server.policy import batch_answers
from server.policy.batch_answers import Named, Unrun
from server.policy.batches import Batch, BatchError, Counts, Ending, Status, Usage, moved
from server.policy.tenants import Tenant
from server.serving.batch_plan import BadInput, InputLimits, Plan, scan
from server.serving.batch_work import BatchWork, LineParts, Progress
from server.serving.blocking import in_thread
from server.store.answer_log import AnswerLog, Kind, LogPaths, opened, recover
from server.store.batches import BatchRecords, StoredBatch
from server.store.ending import ended
from server.store.file_bodies import DiskFull, FileBodies
from server.store.file_records import FileRecords, StoredFile
from server.store.reaching import RedisUnavailable

log = structlog.get_logger(__name__)

_SYNC_INTERVAL_S: Final = 1.0
_CLEANUP_S: Final = 0.5
# As many as stand in the batch itself; the error file names them all.
_ERRORS_SHOWN: Final = 100
_OUTPUT_PURPOSE: Final = "batch_output"
_UNRUN: Final[dict[Ending, Unrun]] = {"expired": "batch_expired", "cancelled": "batch_cancelled"}


@dataclass(frozen=True, slots=True)
class BatchKeeping:
    """Where batches and files are kept, and for how long what they write is. `clock` gives Unix seconds."""

    batches: BatchRecords
    files: FileRecords
    bodies: FileBodies
    output_kept_s: int
    clock: Callable[[], float]


class BatchGone(Exception):
    """The record is no longer there."""


class BatchLife:
    """Brings one batch to its end, or as far as it comes before the server stops."""

    def __init__(
        self, stored: StoredBatch, tenant: Tenant | None, keeping: BatchKeeping, lines: LineParts, limits: InputLimits
    ) -> None:
        self._stored = stored
        self._tenant = tenant
        self._keeping = keeping
        self._lines = lines
        self._limits = limits
        self._progress = Progress()

    @property
    def pending_lines(self) -> int:
        progress = self._progress
        return max(0, progress.total - progress.completed - progress.failed)

    @property
    def _batch(self) -> Batch:
        return self._stored.batch

    async def live(self) -> None:
        """Raises `RedisUnavailable`, `BatchGone` and `LogInUse`; the batch is taken up again later."""
        bodies, outputs = self._keeping.bodies, self._batch.outputs
        paths = LogPaths(bodies.path(outputs.output_file_id), bodies.path(outputs.error_file_id))
        failure: list[BatchError] = []
        try:
            with opened(paths) as answers:
                await in_thread(partial(recover, paths, self._progress.add))
                await self._live(answers)
        except* DiskFull:
            failure = [BatchError("disk_full", "The server has no room for more answers. Those given are kept.")]
        except* BadInput as bad:
            failure = next(_leaves(bad)).errors
        if failure:
            await self._fail(failure)
        if self._batch.ended:
            log.info("batch ended", batch=self._batch.id, status=self._batch.status, **_figures(self._batch.counts))

    async def _live(self, answers: AnswerLog) -> None:
        batch = self._batch
        if self._tenant is None:
            return await self._fail([BatchError("tenant_gone", "The tenant of this batch does not exist any more.")])
        try:
            input_path = self._keeping.bodies.path(batch.input_file_id)
            plan = await in_thread(partial(scan, input_path, batch.endpoint, self._limits))
        except FileNotFoundError:
            return await self._fail([BatchError("input_missing", "The input file is not there any more.")])
        except BadInput as bad:
            return await self._refuse_input(bad.errors, answers)
        self._progress.total = len(plan)
        if batch.status == "validating":
            await self._change(partial(_begun, total=len(plan), model=plan.model, now_s=self._keeping.clock()))
        if self._batch.status == "in_progress":
            await self._work(plan, self._tenant, answers)
        await self._conclude(plan, answers)
        return None

    async def _work(self, plan: Plan, tenant: Tenant, answers: AnswerLog) -> None:
        work = BatchWork(self._batch, tenant, self._lines, answers, self._progress)
        syncing = asyncio.create_task(self._keep_in_step())
        try:
            pending = (index for index in plan.order if plan.custom_ids[index] not in self._progress.done)
            await work.run(plan, pending, self._halted)
        finally:
            await ended([syncing], _CLEANUP_S)

    def _halted(self) -> bool:
        return self._lines.runner.draining or self._batch.status != "in_progress" or self._out_of_time()

    def _out_of_time(self) -> bool:
        return self._keeping.clock() >= self._batch.expires_at

    async def _keep_in_step(self) -> None:
        """Tell Redis how far it came, and learn from it that the batch is to be cancelled."""
        while True:
            await asyncio.sleep(_SYNC_INTERVAL_S)
            try:
                await self._change(self._with_progress)
            except RedisUnavailable as error:
                log.warning("a batch cannot tell Redis how far it came", batch=self._batch.id, reason=str(error))
            except BatchGone:
                return

    def _with_progress(self, batch: Batch) -> Batch:
        return replace(batch, counts=self._progress.counts, usage=self._progress.usage)

    async def _conclude(self, plan: Plan, answers: AnswerLog) -> None:
        """End it, if there is nothing left to run; lines that did not run are named in the error file."""
        await self._change(self._with_progress)
        left = [index for index in plan.order if plan.custom_ids[index] not in self._progress.done]
        ending = self._ending(bool(left))
        if ending is None:
            return
        if ending != "cancelled" and self._batch.status == "in_progress":
            await self._change(partial(_finalizing, ends_as=ending, now_s=self._keeping.clock()))
        if left:
            await in_thread(partial(self._name_unrun, plan, left, _UNRUN[ending], answers))
        await in_thread(answers.sync)
        await self._end(ending)

    def _ending(self, some_left: bool) -> Ending | None:
        """How it ends now; None: it goes on later."""
        if self._batch.status == "cancelling":
            return "cancelled"
        if self._batch.ends_as is not None:
            return self._batch.ends_as
        if not some_left:
            return "completed"
        return "expired" if self._out_of_time() else None

    def _name_unrun(self, plan: Plan, left: list[int], why: Unrun, answers: AnswerLog) -> None:
        for index in left:
            line = Named(plan.custom_ids[index], f"{self._batch.id}-{plan.numbers[index]}")
            answers.append("error", batch_answers.not_run(line, why))
            self._progress.done.add(line.custom_id)
            self._progress.failed += 1
            self._lines.metrics.line_done(why, Usage())

    async def _refuse_input(self, errors: list[BatchError], answers: AnswerLog) -> None:
        """The input is bad: nothing of it runs, and the error file names every bad line."""
        for error in errors:
            answers.append("error", batch_answers.bad_line(self._batch.id, error))
        await self._fail(errors)

    async def _fail(self, errors: list[BatchError]) -> None:
        await self._change(lambda batch: replace(self._with_progress(batch), errors=tuple(errors[:_ERRORS_SHOWN])))
        await self._end("failed")

    async def _end(self, status: Status) -> None:
        """Show the files that hold something, then the state that says so."""
        output, error = await self._publish("output"), await self._publish("error")

        def at_its_end(batch: Batch) -> Batch:
            batch = replace(self._with_progress(batch), output_file_id=output, error_file_id=error)
            return moved(batch, "cancelled" if batch.status == "cancelling" else status, self._keeping.clock())

        await self._change(at_its_end)

    async def _publish(self, kind: Kind) -> str | None:
        batch, now_s = self._batch, int(self._keeping.clock())
        outputs = batch.outputs
        file_id = outputs.output_file_id if kind == "output" else outputs.error_file_id
        size = self._keeping.bodies.path(file_id).stat().st_size
        if size == 0:
            self._keeping.bodies.delete(file_id)
            return None
        kept_s = outputs.expire_after_s or self._keeping.output_kept_s
        name = f"{batch.id}_{kind}.jsonl"
        await self._keeping.files.add(
            StoredFile(file_id, batch.tenant, batch.folder, name, _OUTPUT_PURPOSE, size, now_s, now_s + kept_s)
        )
        return file_id

    async def _change(self, change: Callable[[Batch], Batch]) -> None:
        """Change the record, on top of what somebody else may have changed. Raises `BatchGone`."""
        while True:
            if (new := change(self._batch)) == self._batch:
                found: StoredBatch | None = await self._keeping.batches.find(self._batch.id)
                if found is not None and found.batch == new:
                    return
            elif (done := await self._keeping.batches.replace(self._stored, new)) is not None:
                self._stored = done
                return
            else:
                found = await self._keeping.batches.find(self._batch.id)
            if found is None:
                raise BatchGone(self._batch.id)
            self._stored = found


def _begun(batch: Batch, total: int, model: str | None, now_s: float) -> Batch:
    """Validated. A batch that was cancelled meanwhile stays so."""
    batch = replace(batch, counts=replace(batch.counts, total=total), model=model)
    return moved(batch, "in_progress", now_s) if batch.status == "validating" else batch


def _finalizing(batch: Batch, ends_as: Ending, now_s: float) -> Batch:
    """A batch that is cancelled at the last moment has nothing left to cancel."""
    if batch.status == "cancelling":
        return batch
    return moved(replace(batch, ends_as=ends_as), "finalizing", now_s)


def _figures(counts: Counts) -> dict[str, int]:
    return {"lines": counts.total, "completed": counts.completed, "failed": counts.failed}


def _leaves(group: BaseExceptionGroup[BadInput]) -> Iterator[BadInput]:
    for error in group.exceptions:
        if isinstance(error, BaseExceptionGroup):
            yield from _leaves(error)
        else:
            yield error
