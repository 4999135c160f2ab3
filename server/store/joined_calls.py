"""Calls of one script that go to Redis together.

A call costs the client ten times what it costs Redis, nearly all of it around the words that are sent. So there is one
under way at a time, and what is asked for meanwhile shares the next: the busier the server, the less each costs. They
also keep their order that way.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Generator, Sequence
from typing import Any, Final, Generic, TypeVar

Result = TypeVar("Result")
Word = str | int
Run = Callable[[Sequence[str], Sequence[Word]], Awaitable[Sequence[Any]]]

# Redis does nothing else meanwhile: some three milliseconds.
_MOST_TOGETHER: Final = 64


class Asked(Generic[Result]):
    """What was asked for; awaiting it gives the answer, or raises what the call raised."""

    def __init__(self, keys: Sequence[str], words: Sequence[Word], read: Callable[[Any], Result]) -> None:
        self.keys = keys
        self.words = words
        self.answer: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        self._read = read
        self._sent = False

    def __await__(self) -> Generator[Any, None, Result]:
        return self.answer.__await__()

    def withdraw(self) -> bool:
        """Whether it was not sent yet, and never will be."""
        return not self._sent and self.answer.cancel()

    def send(self) -> bool:
        """Whether anybody still wants it."""
        self._sent = not self.answer.done()
        return self._sent

    def answered(self, reply: Any) -> None:
        if not self.answer.done():
            self.answer.set_result(self._read(reply))

    def failed(self, error: Exception) -> None:
        if not self.answer.done():
            self.answer.set_exception(error)


class JoinedCalls:
    """`run` makes one call with many operations and returns their answers. `group_of` a key: those of one may join."""

    def __init__(self, run: Run, group_of: Callable[[str], str]) -> None:
        self._run = run
        self._group_of = group_of
        self._due: dict[str, deque[Asked[Any]]] = {}
        self._senders: set[asyncio.Task[None]] = set()

    def ask(self, keys: Sequence[str], words: Sequence[Word], read: Callable[[Any], Result]) -> Asked[Result]:
        """Send it with the next call. `read` makes the answer of what Redis says."""
        asked, group = Asked(keys, words, read), self._group_of(keys[0])
        if (due := self._due.get(group)) is not None:
            due.append(asked)
            return asked
        self._due[group] = deque([asked])
        sender = asyncio.create_task(self._send(group))
        self._senders.add(sender)
        sender.add_done_callback(self._senders.discard)
        return asked

    async def _send(self, group: str) -> None:
        due = self._due[group]
        try:
            while due:
                some = [due.popleft() for _ in range(min(len(due), _MOST_TOGETHER))]
                if wanted := [asked for asked in some if asked.send()]:
                    await self._call(wanted)
        finally:
            del self._due[group]
            for asked in due:  # only where this task was cancelled
                asked.answer.cancel()

    async def _call(self, operations: Sequence[Asked[Any]]) -> None:
        keys: list[str] = []
        words: list[Word] = []
        for asked in operations:
            keys += asked.keys
            words += alone(asked.keys, asked.words)
        try:
            replies = await self._run(keys, words)
        except asyncio.CancelledError:
            for asked in operations:
                asked.answer.cancel()
            raise
        except Exception as error:  # noqa: BLE001  # it is raised to everybody who asked
            for asked in operations:
                asked.failed(error)
            return
        for asked, reply in zip(operations, replies, strict=True):
            asked.answered(reply)


def alone(keys: Sequence[str], words: Sequence[Word]) -> list[Word]:
    """The words of one operation as the script reads them."""
    return [len(keys), len(words), *words]


def tag_of(key: str) -> str:
    """The part of a key by which a cluster places it."""
    return key[key.find("{") : key.find("}") + 1]


def one_place(key: str) -> str:
    """All keys lie together where there is no cluster."""
    del key
    return ""
