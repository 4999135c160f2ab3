"""The lines of one batch on their way through the server: as many as it lets in, each until it has its answer."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import IO, Any

from server.policy import batch_answers
from server.policy.batch_answers import Named
from server.policy.batches import NO_USAGE, Batch, Counts, Pace, Record, Retry, Usage, after_refusal
from server.policy.refusals import GenerationFailed, Refusal
from server.policy.tenants import Tenant
from server.serving.batch_plan import Plan
from server.serving.line_runner import Answered, LineCall, LineRunner, Refused
from server.store.answer_log import AnswerLog, Kind
from server.telemetry.batches import BatchMetrics

_LOOK_INTERVAL_S = 0.5
_LOST = "The model stopped while it worked on this line."

# How a refusal looks in an error file: its HTTP status and body.
Described = Callable[[Refusal], tuple[int, dict[str, Any]]]
# Whether a batch is to offer no more lines.
Halted = Callable[[], bool]


@dataclass(frozen=True, slots=True)
class LineParts:
    """What every batch's lines share. `paused`: batches wait for a while."""

    runner: LineRunner
    described: Described
    paused: Callable[[], bool]
    metrics: BatchMetrics


@dataclass(slots=True)
class Progress:
    """How far a batch has come."""

    total: int = 0
    completed: int = 0
    failed: int = 0
    usage: Usage = NO_USAGE
    done: set[str] = field(default_factory=set)

    def add(self, kind: Kind, record: dict[str, Any]) -> None:
        """Take in an answer that stands in the log."""
        self.done.add(record["custom_id"])
        if kind == "output":
            self.completed += 1
            self.usage += batch_answers.usage_in(record)
        else:
            self.failed += 1

    @property
    def counts(self) -> Counts:
        return Counts(self.total, self.completed, self.failed)


class BatchWork:
    """Runs lines and writes down their answers."""

    def __init__(self, batch: Batch, tenant: Tenant, parts: LineParts, log: AnswerLog, progress: Progress) -> None:
        self._batch = batch
        self._tenant = tenant
        self._parts = parts
        self._log = log
        self._progress = progress
        self._pace = Pace()
        self._changed = asyncio.Event()
        self._at_the_door: set[asyncio.Task[None]] = set()
        self._parent: asyncio.Task[None] | None = None
        self._failed = False
        self._dropping = False

    async def run(self, plan: Plan, pending: Iterable[int], halted: Halted) -> None:
        """Answer the pending lines, or some of them until it is halted. Raises `DiskFull` in an exception group."""
        self._parent = asyncio.current_task()
        with plan.path.open("rb") as file:
            async with asyncio.TaskGroup() as group:
                for index in pending:
                    if not await self._room(halted):
                        break
                    self._pace.waiting += 1
                    group.create_task(self._line(plan, file, index, halted))
                await self._until_over(halted)

    async def _room(self, halted: Halted) -> bool:
        """Wait until one more line may be offered. False: none may be any more."""
        while not halted():
            paused = self._parts.paused() or not self._parts.runner.ready
            if not paused and self._pace.may_offer(time.monotonic()):
                return True
            await self._something_changes()
        return False

    async def _until_over(self, halted: Halted) -> None:
        """Every line is offered: wait for the last answers; what still waits at the door when halted goes home."""
        while self._pace.waiting + self._pace.in_engine:
            if halted():
                self._dropping = True
                for task in self._at_the_door:
                    task.cancel()
                return
            await self._something_changes()

    async def _something_changes(self) -> None:
        self._changed.clear()
        try:
            async with asyncio.timeout(_LOOK_INTERVAL_S):
                await self._changed.wait()
        except TimeoutError:
            return

    async def _line(self, plan: Plan, file: IO[bytes], index: int, halted: Halted) -> None:
        """One line until it has its answer. Outside the engine it counts as waiting."""
        try:
            line = Named(plan.custom_ids[index], f"{self._batch.id}-{plan.numbers[index]}")
            await self._answer(line, plan.request(file, index)["body"], halted)
        except BaseException:
            self._failed = True
            raise
        finally:
            self._pace.waiting -= 1
            self._changed.set()

    async def _answer(self, line: Named, body: dict[str, Any], halted: Halted) -> None:
        batch, tries = self._batch, 0
        call = LineCall(line.request_id, batch.endpoint, self._tenant, batch.end_user, body)
        while not halted():
            tries += 1
            outcome = await self._attempt(call)
            if isinstance(outcome, Answered):
                record = batch_answers.answered(line, outcome.body, outcome.latency_s)
                self._write("output", record, line, batch_answers.usage_in({"response": {"body": outcome.body}}))
                return
            if outcome is None or self._parts.runner.draining:
                return
            decision = after_refusal(outcome.refusal, tries, random.random())  # noqa: S311  # jitter is no secret
            if isinstance(decision, Record):
                self._write("error", batch_answers.refused(line, *self._parts.described(outcome.refusal)), line)
                return
            await self._hold(decision, halted)

    async def _attempt(self, call: LineCall) -> Answered | Refused | None:
        """One attempt, counted where it is: at the door or in the engine. None: it was sent home from the door."""
        task = asyncio.current_task()
        assert task is not None
        pace, metrics, inside = self._pace, self._parts.metrics, False

        def admitted() -> None:
            nonlocal inside
            if not inside:
                inside = True
                self._at_the_door.discard(task)
                pace.waiting, pace.in_engine = pace.waiting - 1, pace.in_engine + 1
                metrics.line_entered()
                self._changed.set()

        self._at_the_door.add(task)
        metrics.line_offered()
        try:
            outcome = await self._parts.runner.attempt(call, admitted)
            _refuse_swallowed(outcome, task)
        except asyncio.CancelledError:
            if self._failed or self._parent is None or self._parent.cancelling() or task.uncancel() > 0:
                raise
            return None if self._dropping and not inside else Refused(GenerationFailed(_LOST))
        else:
            return outcome
        finally:
            self._at_the_door.discard(task)
            if inside:
                pace.waiting, pace.in_engine = pace.waiting + 1, pace.in_engine - 1
            metrics.line_left(inside)

    async def _hold(self, retry: Retry, halted: Halted) -> None:
        """Wait before another attempt, and let the lines after this one wait as well."""
        until_s = time.monotonic() + retry.wait_s
        self._pace.hold(until_s)
        while not halted() and time.monotonic() < until_s:
            await self._something_changes()

    def _write(self, kind: Kind, record: bytes, line: Named, usage: Usage = NO_USAGE) -> None:
        """Write the answer down; from now on the line is done."""
        self._log.append(kind, record)
        progress = self._progress
        progress.done.add(line.custom_id)
        progress.completed += kind == "output"
        progress.failed += kind == "error"
        progress.usage += usage
        self._parts.metrics.line_done("completed" if kind == "output" else "failed", usage)


def _refuse_swallowed(outcome: Answered | Refused, task: asyncio.Task[None]) -> None:
    """vLLM turns the cancellation of some endpoints into an error answer, which is none of the line's."""
    if isinstance(outcome, Refused) and task.cancelling():
        raise asyncio.CancelledError
