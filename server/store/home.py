"""What is kept in Redis, opened and closed together."""

import uuid
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Final

from server.store.connection import FAILURES, TIMEOUT_S, connect
from server.store.limit_script import LimitScript
from server.store.limiter import Limiter
from server.store.redis_server import EmbeddedRedis, start_problem
from server.store.usage import UsageBook

_EMBEDDED_FOLDER: Final = "redis"
_DATA: Final = "appendonlydir"  # Redis's own name for it
_PATIENCE_S: Final = 5.0


def embedded_problem(data_folder: Path) -> str | None:
    """What would keep the embedded server of this data folder from running, as a sentence."""
    return start_problem(data_folder / _EMBEDDED_FOLDER)


async def reach_problem(redis_url: str, timeout_s: float = _PATIENCE_S) -> str | None:
    """Why the operator's own Redis does not answer; None where it does. Raises `BadRedisUrl`."""
    async with aclosing(connect(redis_url, timeout_s)) as client:
        try:
            await client.ping()
        except FAILURES as error:
            return str(error) or type(error).__name__
    return None


class Store:
    """One Redis and what stands on it. Raises `BadRedisUrl`; nothing is reached before `running`.

    `runs_embedded` False: another process of the same server runs the embedded one, if that is used.
    `client` gives up soon, since requests wait for it; `patient_client` is for what an operator asks.
    """

    def __init__(
        self, redis_url: str | None, data_folder: Path, timeout_s: float = TIMEOUT_S, *, runs_embedded: bool = True
    ) -> None:
        self.replica = uuid.uuid4().hex[:12]
        self._folder = data_folder / _EMBEDDED_FOLDER
        self._embedded = EmbeddedRedis(self._folder) if redis_url is None else None
        self._runs_embedded = runs_embedded
        url = self._embedded.url if self._embedded is not None else redis_url or ""
        self.client = connect(url, timeout_s)
        self.patient_client = connect(url, max(_PATIENCE_S, timeout_s))
        self.limiter = Limiter(LimitScript(self.client), self.replica, timeout_s)
        self.usage = UsageBook(self.client)

    @property
    def server_pid(self) -> int | None:
        """The embedded server, where it is a child of this process: it is ended here, and by nobody else."""
        return self._embedded.pid if self._embedded is not None else None

    def surely_empty(self) -> bool:
        """Whether nothing was ever kept: the embedded server has not written to its folder yet."""
        return self._embedded is not None and not (self._folder / _DATA).exists()

    async def wait_until_up(self) -> None:
        """Wait until the embedded server has answered once; one of the operator's own is not waited for."""
        if self._embedded is not None:
            await self._embedded.wait_until_up()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Entering waits for nothing; leaving tells Redis what is still to be told, then ends the embedded one."""
        embedded = self._embedded if self._runs_embedded else None
        async with _kept(embedded), aclosing(self.client), aclosing(self.patient_client), self.limiter.running():
            yield


@asynccontextmanager
async def _kept(embedded: EmbeddedRedis | None) -> AsyncIterator[None]:
    if embedded is None:
        yield
        return
    async with embedded.running():
        yield
