"""What a tenant does with its batches."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from server.policy.batches import COMPLETION_WINDOW_S, MOVES, Batch, Outputs, moved
from server.policy.refusals import Conflict, InvalidRequest, NotFound, RateLimited
from server.policy.tenants import Tenant
from server.serving.batch_life import BatchKeeping
from server.serving.file_desk import INPUT_PURPOSE, FileDesk, kept_in_redis
from server.store.file_bodies import new_file_id
from server.store.pages import Cut, UnknownCursor

_ATTEMPTS: Final = 20
# They run one after the other; each is read by whoever looks for work.
_MOST_OPEN: Final = 100
_RETRY_AFTER_S: Final = 60.0


@dataclass(frozen=True, slots=True)
class Order:
    """A batch that a tenant asks for."""

    input_file_id: str
    endpoint: str
    metadata: Mapping[str, str] | None = None
    output_expires_after_s: int | None = None
    end_user: str | None = None


class BatchDesk:
    """Every method raises `StoreUnavailable` when Redis does not answer. `look` tells the runner of a new batch."""

    def __init__(self, keeping: BatchKeeping, files: FileDesk, look: Callable[[], None]) -> None:
        self._keeping = keeping
        self._files = files
        self._look = look

    async def create(self, tenant: Tenant, order: Order) -> Batch:
        """Raises `NotFound` for a file that is not the tenant's, `InvalidRequest` for one that is no input, and
        `RateLimited` for a tenant with too many batches.
        """
        file = await self._files.file(tenant, order.input_file_id, "input_file_id")
        if file.purpose != INPUT_PURPOSE:
            message = f"{file.id} has the purpose `{file.purpose}`: the input of a batch is uploaded as `batch`."
            raise InvalidRequest(message, param="input_file_id")
        now_s = int(self._keeping.clock())
        batch = Batch(
            id=f"batch_{secrets.token_hex(16)}",
            tenant=tenant.name,
            input_file_id=file.id,
            endpoint=order.endpoint,
            created_at=now_s,
            expires_at=now_s + COMPLETION_WINDOW_S,
            folder=file.folder,
            outputs=Outputs(new_file_id(), new_file_id(), order.output_expires_after_s),
            end_user=order.end_user,
            metadata=order.metadata,
        )
        async with kept_in_redis():
            await self._refuse_too_many(tenant, file.folder)
            await self._keeping.batches.add(batch)
        self._look()
        return batch

    async def _refuse_too_many(self, tenant: Tenant, folder: str) -> None:
        open_batches = sum(batch.tenant == tenant.name for batch in await self._keeping.batches.open(folder))
        if open_batches >= _MOST_OPEN:
            message = f"You have {open_batches} batches that have not ended. Please wait for one of them."
            raise RateLimited(message, retry_after_s=_RETRY_AFTER_S)

    async def unfinished(self) -> list[Batch]:
        """Every tenant's batches that have not ended, oldest first. Raises `DiskFull` and `OSError` as well."""
        async with kept_in_redis():
            return await self._keeping.batches.open(self._keeping.bodies.folder_id())

    async def batch(self, tenant: Tenant, batch_id: str) -> Batch:
        """A tenant's own batch. Raises `NotFound`, also for one of somebody else."""
        async with kept_in_redis():
            stored = await self._keeping.batches.find(batch_id)
        if stored is None or stored.batch.tenant != tenant.name:
            raise NotFound(f"No such Batch object: {batch_id}")
        return stored.batch

    async def cancel(self, tenant: Tenant, batch_id: str) -> Batch:
        """Ask for its end; what is answered by then is kept. Raises `NotFound` and `Conflict`."""
        for _ in range(_ATTEMPTS):
            async with kept_in_redis():
                stored = await self._keeping.batches.find(batch_id)
                if stored is None or stored.batch.tenant != tenant.name:
                    raise NotFound(f"No such Batch object: {batch_id}")
                batch = stored.batch
                if batch.status in ("cancelling", "cancelled"):
                    return batch
                if "cancelling" not in MOVES[batch.status]:
                    raise Conflict(f"A batch that is {batch.status} cannot be cancelled.")
                done = await self._keeping.batches.replace(stored, moved(batch, "cancelling", self._keeping.clock()))
            if done is not None:
                self._look()
                return done.batch
        raise Conflict("The batch changes too fast to be cancelled. Please try again.")

    async def page(self, tenant: Tenant, cut: Cut) -> tuple[list[Batch], bool]:
        """Raises `InvalidRequest` for a cursor that is no batch of the tenant's."""
        try:
            async with kept_in_redis():
                return await self._keeping.batches.page(tenant.name, cut)
        except UnknownCursor as error:
            raise InvalidRequest(f"`after` names no batch on this list: {cut.after}", param="after") from error
