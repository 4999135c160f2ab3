"""What a tenant does with its files."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

from server.policy.refusals import BodyTooLarge, Conflict, InvalidRequest, NotFound, StorageFull, StoreUnavailable
from server.policy.tenants import Tenant
from server.serving.batch_life import BatchKeeping
from server.serving.blocking import in_thread
from server.store.file_bodies import DiskFull, Upload, new_file_id
from server.store.file_records import StoredFile
from server.store.pages import Cut, UnknownCursor
from server.store.reaching import RedisUnavailable

INPUT_PURPOSE: Final = "batch"
_WRITTEN_AT_ONCE: Final = 1 << 20
_RETRY_AFTER_S: Final = 2.0


@dataclass(frozen=True, slots=True)
class FileRules:
    """`quota_bytes`: what one tenant's files may take together; 0 for any."""

    max_file_bytes: int
    quota_bytes: int
    kept_s: int


@dataclass(frozen=True, slots=True)
class About:
    """What a client says about its file. `expires_after_s` None: the server's own time."""

    filename: str
    purpose: str
    expires_after_s: int | None


@asynccontextmanager
async def kept_in_redis() -> AsyncIterator[None]:
    """Inside it, a Redis that does not answer becomes a refusal."""
    try:
        yield
    except RedisUnavailable as error:
        raise StoreUnavailable(
            "The server's records cannot be reached right now. Please try again in a moment.",
            retry_after_s=_RETRY_AFTER_S,
        ) from error


class FileDesk:
    """Every method raises `StoreUnavailable` when Redis does not answer."""

    def __init__(self, keeping: BatchKeeping, rules: FileRules) -> None:
        self._keeping = keeping
        self._rules = rules

    @asynccontextmanager
    async def receiving(self, tenant: Tenant) -> AsyncIterator[IncomingFile]:
        """A file that is being uploaded; what was not kept is gone when it is left. Raises `StorageFull`."""
        async with kept_in_redis():
            used = await self._keeping.files.used_bytes(tenant.name)
        room = self._rules.quota_bytes - used if self._rules.quota_bytes else self._rules.max_file_bytes
        file_id = new_file_id()
        with _disk_full_refused(), self._keeping.bodies.upload(file_id) as upload:
            yield IncomingFile(file_id, tenant, upload, room, self)

    async def file(self, tenant: Tenant, file_id: str, param: str | None = None) -> StoredFile:
        """A tenant's own file. Raises `NotFound`, also for a file of somebody else."""
        async with kept_in_redis():
            found = await self._keeping.files.find(file_id)
        if found is None or found.tenant != tenant.name or found.expires_at <= self._keeping.clock():
            raise NotFound(f"No such File object: {file_id}", param=param)
        return found

    async def content(self, tenant: Tenant, file_id: str) -> tuple[StoredFile, Path]:
        """A file and where its body lies. Raises `NotFound`."""
        file = await self.file(tenant, file_id)
        path = self._keeping.bodies.path(file.id)
        if not path.is_file():
            raise NotFound(f"The content of {file_id} is not on this server. Ask the replica that it was sent to.")
        return file, path

    async def delete(self, tenant: Tenant, file_id: str) -> None:
        """Raises `NotFound`, and `Conflict` while a batch reads it."""
        file = await self.file(tenant, file_id)
        async with kept_in_redis():
            for batch in await self._keeping.batches.open(file.folder):
                if batch.input_file_id == file.id:
                    raise Conflict(f"{file.id} is the input of {batch.id}, which has not ended. Cancel that first.")
            await self._keeping.files.delete(file)
        self._keeping.bodies.delete(file.id)

    async def page(self, tenant: Tenant, purpose: str | None, cut: Cut) -> tuple[list[StoredFile], bool]:
        """Raises `InvalidRequest` for a cursor that is no file of the tenant's."""
        try:
            async with kept_in_redis():
                return await self._keeping.files.page(tenant.name, purpose, cut)
        except UnknownCursor as error:
            raise InvalidRequest(f"`after` names no file on this list: {cut.after}", param="after") from error

    async def keep(self, file_id: str, tenant: Tenant, upload: Upload, about: About) -> StoredFile:
        """Make an upload a file. Raises `InvalidRequest` and `StorageFull`."""
        if about.purpose != INPUT_PURPOSE:
            message = f"This server keeps files for batches only: send `purpose={INPUT_PURPOSE}`."
            raise InvalidRequest(message, param="purpose")
        now_s = int(self._keeping.clock())
        kept_s = self._rules.kept_s if about.expires_after_s is None else about.expires_after_s
        folder = self._keeping.bodies.folder_id()
        file = StoredFile(
            file_id, tenant.name, folder, about.filename, about.purpose, upload.size, now_s, now_s + kept_s
        )  # fmt: skip
        await in_thread(upload.keep)
        added = False
        try:
            async with kept_in_redis():
                added = await self._keeping.files.add(file, self._rules.quota_bytes)
        finally:
            if not added:
                self._keeping.bodies.delete(file_id)
        if not added:
            raise _quota_used_up(self._rules.quota_bytes)
        return file

    @property
    def rules(self) -> FileRules:
        return self._rules


class IncomingFile:
    """One upload; its bytes go to disk in large pieces."""

    def __init__(self, file_id: str, tenant: Tenant, upload: Upload, room: int, desk: FileDesk) -> None:
        self._id = file_id
        self._tenant = tenant
        self._upload = upload
        self._room = room
        self._desk = desk
        self._held = bytearray()
        self._size = 0

    async def write(self, data: bytes) -> None:
        """Raises `BodyTooLarge` and `StorageFull`."""
        self._size += len(data)
        rules = self._desk.rules
        if self._size > rules.max_file_bytes:
            raise BodyTooLarge(
                f"The file is larger than this server keeps ({rules.max_file_bytes} bytes).", param="file"
            )
        if self._size > self._room:
            raise _quota_used_up(rules.quota_bytes)
        self._held += data
        if len(self._held) >= _WRITTEN_AT_ONCE:
            await self._flush()

    async def keep(self, about: About) -> StoredFile:
        """Everything has come. Raises `InvalidRequest` and `StorageFull`."""
        await self._flush()
        return await self._desk.keep(self._id, self._tenant, self._upload, about)

    async def _flush(self) -> None:
        held, self._held = bytes(self._held), bytearray()
        await in_thread(partial(self._upload.write, held))


def _quota_used_up(quota_bytes: int) -> StorageFull:
    return StorageFull(
        f"Your files would take more than the {quota_bytes} bytes that you may keep here. Delete some of them.",
        param="file",
        should_retry=False,
    )


@contextmanager
def _disk_full_refused() -> Iterator[None]:
    try:
        yield
    except DiskFull as error:
        raise StorageFull("The server has no room for this file.", param="file", should_retry=False) from error
