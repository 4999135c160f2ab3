"""Lets requests begin a few at a time.

To begin a request takes a millisecond of the event loop: JSON, validation, the template, the tokenizer. A loop runs all
that is ready before it looks at the engine again, so two hundred that arrive together would keep every running stream
from its tokens for a fifth of a second, and the first of them from its own. So each round of the loop begins a few, and
the rest wait for the next rounds in their order. A long history takes as long as many short ones.
"""

import asyncio
from collections import deque
from typing import Final

_PER_ROUND: Final = 32
_BYTES_OF_ONE: Final = 8192


class Turnstile:
    """One for all requests of an event loop."""

    def __init__(self, per_round: int = _PER_ROUND) -> None:
        self._per_round = per_round
        self._left = per_round
        self._counting = False
        self._waiting: deque[tuple[asyncio.Future[None], int]] = deque()

    async def turn(self, body_bytes: int = 0) -> None:
        """Wait for the round in which a request of this size may go on; nearly always that is this one."""
        weight = 1 + body_bytes // _BYTES_OF_ONE
        loop = asyncio.get_running_loop()
        if not self._counting:
            self._counting = True
            loop.call_soon(self._next_round)
        if self._left > 0 and not self._waiting:
            self._left -= weight
            return
        future: asyncio.Future[None] = loop.create_future()
        self._waiting.append((future, weight))
        await future

    def _next_round(self) -> None:
        """Called once a round for as long as anybody is there."""
        self._left = self._per_round
        while self._waiting and self._left > 0:
            future, weight = self._waiting.popleft()
            if not future.done():  # a client that waited may have left
                future.set_result(None)
                self._left -= weight
        self._counting = bool(self._waiting)
        if self._counting:
            asyncio.get_running_loop().call_soon(self._next_round)
