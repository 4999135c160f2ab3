"""Cancels the work of a request whose client has gone."""

import asyncio
from collections.abc import Callable
from types import TracebackType
from typing import Any, Final

from starlette.types import Receive

from server.api.exchange import exchange_of, watch_for_leaving
from server.policy.refusals import Refusal

# How the work of a client that has gone ends. vLLM makes an error of the cancellation where the answer is whole.
_ENDS: Final = (asyncio.CancelledError, Refusal)


def _nothing() -> None:
    """Ends no watch."""


class CancelOnDisconnect:
    """Inside it, a disconnect cancels the current task, once, so that its cleanup can still await.

    `finish()` says that the answer is complete; the server reports a disconnect after that as a matter of course.
    """

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._task: asyncio.Task[Any] | None = None
        self._end_watch: Callable[[], object] = _nothing
        self._finished = False
        self.client_left = False

    def finish(self) -> None:
        self._finished = True

    def leave(self) -> None:
        """Treat the client as gone."""
        if self._task is not None and not self._finished and not self.client_left:
            self.client_left = True
            self._task.cancel()

    async def __aenter__(self) -> "CancelOnDisconnect":
        self._task = asyncio.current_task()
        if (exchange := exchange_of(self._receive)) is not None:
            self._end_watch = watch_for_leaving(exchange, self.leave)
        else:
            self._end_watch = asyncio.create_task(self._watch()).cancel
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        self._end_watch()
        task, self._task, self._end_watch = self._task, None, _nothing  # the task knows what knows this
        if task is None or not self.client_left or kind is None or not issubclass(kind, _ENDS):
            return False
        return task.uncancel() == 0

    async def _watch(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self.leave()
