"""Templates and tokenizers at work on short prompts, where they are asked for.

vLLM hands both to a thread, so that a long prompt does not hold up everybody's tokens. The way to a thread and back
costs more than a short prompt itself, and on a busy server the thread has to wait for the interpreter besides. So short
work is done at once, unless the thread has something to do: a tokenizer is never at work in two places.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Final, TypeVar

from vllm.renderers.base import BaseRenderer, _SwappableExecutor

from server.engine.counting import plain_texts

# A few hundred tokens: rendered and tokenized in well under a millisecond.
_SHORT_CHARS: Final = 2048
_MOST_MESSAGES: Final = 16

Result = TypeVar("Result")

_short: ContextVar[bool] = ContextVar("short_work", default=False)


class NearExecutor(_SwappableExecutor):
    """vLLM's executor, which does short work itself while its threads are idle."""

    _handed_over: set[Future[Any]]

    def submit(self, fn: Callable[..., Result], /, *args: Any, **kwargs: Any) -> Future[Result]:
        if _short.get() and not self._handed_over:
            return _done(fn, *args, **kwargs)
        future: Future[Result] = super().submit(fn, *args, **kwargs)
        self._handed_over.add(future)
        future.add_done_callback(self._handed_over.discard)
        return future


def _done(fn: Callable[..., Result], *args: Any, **kwargs: Any) -> Future[Result]:
    future: Future[Result] = Future()
    try:
        future.set_result(fn(*args, **kwargs))
    except Exception as error:  # noqa: BLE001  # it is raised where the result is asked for
        future.set_exception(error)
    return future


def do_short_work_near(renderer: BaseRenderer) -> None:
    """Put it into a live renderer in place: vLLM has bound its functions to the executor by then."""
    executor = renderer._executor
    executor.__class__ = NearExecutor
    assert isinstance(executor, NearExecutor)
    executor._handed_over = set()


@contextmanager
def short_work(short: bool) -> Generator[None]:
    """What is rendered and tokenized inside is short, or not."""
    token = _short.set(short)
    try:
        yield
    finally:
        _short.reset(token)


def is_short(messages: Sequence[Mapping[str, Any]]) -> bool:
    """Whether these are plain texts, and few and short enough."""
    texts = plain_texts(messages) if len(messages) <= _MOST_MESSAGES else None
    return texts is not None and sum(map(len, texts)) <= _SHORT_CHARS
