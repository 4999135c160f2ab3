"""What is kept in Redis, opened and closed together."""

import uuid
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Final

from server.store.batches import BatchRecords
from server.store.connection import connect
from server.store.file_records import FileRecords
from server.store.limit_script import LimitScript
from server.store.limiter import Limiter
from server.store.redis_server import EmbeddedRedis
from server.store.usage import UsageBook

_EMBEDDED_FOLDER: Final = "redis"
# Nobody's first token waits for what is asked of it here.
_PATIENT_TIMEOUT_S: Final = 2.0


class Store:
    """One Redis and what stands on it. Raises `BadRedisUrl`; nothing is reached before `running`."""

    def __init__(self, redis_url: str | None, data_folder: Path) -> None:
        self.replica = uuid.uuid4().hex[:12]
        self._embedded = EmbeddedRedis(data_folder / _EMBEDDED_FOLDER) if redis_url is None else None
        url = self._embedded.url if self._embedded is not None else redis_url or ""
        self.client = connect(url)
        self._patient = connect(url, _PATIENT_TIMEOUT_S)
        self.limiter = Limiter(LimitScript(self.client), self.replica)
        self.usage = UsageBook(self.client)
        self.batches = BatchRecords(self._patient)
        self.files = FileRecords(self._patient)

    @property
    def server_pid(self) -> int | None:
        """The embedded server, where it is a child of this process: it is ended here, and by nobody else."""
        return self._embedded.pid if self._embedded is not None else None

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Entering waits for nothing; leaving tells Redis what is still to be told, then ends the embedded one."""
        async with _kept(self._embedded), aclosing(self.client), aclosing(self._patient), self.limiter.running():
            yield


@asynccontextmanager
async def _kept(embedded: EmbeddedRedis | None) -> AsyncIterator[None]:
    if embedded is None:
        yield
        return
    async with embedded.running():
        yield
