import asyncio
import contextlib
from typing import Any

import pytest

from server.lifecycle.process import _all_flags
from server.settings import load_settings
from server.store.ending import ended


@pytest.mark.parametrize(
    ("settings", "command_line", "flags"),
    [
        ({}, ("m", "--seed", "1"), ("m", "--seed", "1")),
        ({"model": "a"}, (), ("--model", "a")),
        ({"model": "a"}, ("--model", "b"), ("--model", "a", "--model", "b")),
        ({"vllm": {"served-model-name": ["x", "y"]}}, ("m",), ("m", "--served-model-name", "x", "y")),
        ({"vllm": {"seed": 1}}, ("--seed", "2"), ("--seed", "1", "--seed", "2")),
    ],
)
def test_the_command_line_wins_over_the_file_and_its_model_stays_in_front(
    settings: dict[str, Any], command_line: tuple[str, ...], flags: tuple[str, ...]
) -> None:
    assert _all_flags(load_settings(settings, None), command_line) == flags


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.mark.anyio
async def test_a_task_that_loses_a_cancellation_is_ended_all_the_same() -> None:
    async def deaf_once() -> None:
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.Event().wait()
        await asyncio.Event().wait()

    task = asyncio.create_task(deaf_once())
    await asyncio.sleep(0)
    await asyncio.wait_for(ended({task}), 5)
    assert task.cancelled()
