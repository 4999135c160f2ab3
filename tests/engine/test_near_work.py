"""Short work is done where it is asked for, and the rest in vLLM's thread."""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.renderers.base import _SwappableExecutor
from vllm.utils.async_utils import make_async

from server.engine.near_work import do_short_work_near, is_short, short_work

pytestmark = pytest.mark.engine


@pytest.fixture
def executor() -> Iterator[_SwappableExecutor]:
    renderer: Any = SimpleNamespace(_executor=_SwappableExecutor(max_workers=1))
    do_short_work_near(renderer)
    yield renderer._executor
    renderer._executor.shutdown()


def _here(work: Callable[[], Any], executor: _SwappableExecutor, *, short: bool) -> Any:
    """What vLLM does with work for its thread."""

    async def run() -> Any:
        with short_work(short):
            return await make_async(work, executor=executor)()

    return asyncio.run(run())


def test_short_work_needs_no_thread(executor: _SwappableExecutor) -> None:
    assert _here(threading.get_ident, executor, short=True) == threading.get_ident()


def test_long_work_holds_up_nobody(executor: _SwappableExecutor) -> None:
    assert _here(threading.get_ident, executor, short=False) != threading.get_ident()


def test_the_thread_and_the_loop_never_work_at_the_same_time(executor: _SwappableExecutor) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def long_work() -> None:
        begun.set()
        go_on.wait(5)

    running = executor.submit(long_work)
    begun.wait(5)
    with short_work(True):
        behind = executor.submit(threading.get_ident)
        go_on.set()
        assert behind.result(5) != threading.get_ident()
        running.result(5)
        deadline_s = time.monotonic() + 5
        while executor.submit(threading.get_ident).result(5) != threading.get_ident():  # told before it has ended
            assert time.monotonic() < deadline_s


def test_an_error_is_raised_where_the_result_is_asked_for(executor: _SwappableExecutor) -> None:
    def fail() -> None:
        raise ValueError("no such template")

    with pytest.raises(ValueError, match="no such template"):
        _here(fail, executor, short=True)


@pytest.mark.parametrize(
    ("messages", "short"),
    [
        ([{"role": "user", "content": "Hi"}], True),
        ([{"role": "system", "content": "a" * 1000}, {"role": "user", "content": "b" * 1000}], True),
        ([{"role": "user", "content": "a" * 3000}], False),
        ([{"role": "user", "content": "a"}] * 40, False),
        ([{"role": "user", "content": [{"type": "text", "text": "a"}]}], False),
        ([{"role": "assistant", "content": "a", "tool_calls": []}], False),
    ],
)
def test_short_is_what_takes_less_than_a_millisecond(messages: list[dict[str, Any]], short: bool) -> None:
    assert is_short(messages) is short
