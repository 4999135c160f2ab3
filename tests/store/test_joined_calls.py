import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
from redis.exceptions import ConnectionError as RedisConnectionError

from server.store.joined_calls import Asked, JoinedCalls, Word, one_place, tag_of

pytestmark = pytest.mark.anyio


@dataclass(slots=True)
class Wire:
    """Notes each call and answers an operation with its last word, when it is let."""

    calls: list[tuple[list[str], list[Word]]] = field(default_factory=list)
    failure: BaseException | None = None
    open: asyncio.Event = field(default_factory=asyncio.Event)

    async def run(self, keys: Sequence[str], words: Sequence[Word]) -> list[Any]:
        self.calls.append((list(keys), list(words)))
        await self.open.wait()
        if self.failure is not None:
            raise self.failure
        answers, rest = [], list(words)
        while rest:
            _, count, *rest = rest
            operation, rest = rest[: int(count)], rest[int(count) :]
            answers.append(operation[-1])
        return answers


def ask(calls: JoinedCalls, number: int, tag: str = "{a}") -> Asked[str]:
    return calls.ask([f"{tag}:limits"], ["do", number], str)


async def test_what_is_asked_for_during_a_call_shares_the_next_in_its_order() -> None:
    wire = Wire()
    calls = JoinedCalls(wire.run, one_place)
    first = ask(calls, 1)
    await asyncio.sleep(0)
    others = [ask(calls, number, tag) for number, tag in ((2, "{a}"), (3, "{b}"), (4, "{a}"))]
    wire.open.set()
    assert [await asked for asked in (first, *others)] == ["1", "2", "3", "4"]
    assert wire.calls == [
        (["{a}:limits"], [1, 2, "do", 1]),
        (["{a}:limits", "{b}:limits", "{a}:limits"], [1, 2, "do", 2, 1, 2, "do", 3, 1, 2, "do", 4]),
    ]


async def test_in_a_cluster_only_what_lies_together_shares_a_call() -> None:
    wire = Wire()
    wire.open.set()
    calls = JoinedCalls(wire.run, tag_of)
    asked = [ask(calls, number, tag) for number, tag in ((1, "{a}"), (2, "{b}"), (3, "{a}"))]
    assert [await one for one in asked] == ["1", "2", "3"]
    assert sorted(keys for keys, _ in wire.calls) == [["{a}:limits", "{a}:limits"], ["{b}:limits"]]


async def test_no_call_is_endless() -> None:
    wire = Wire()
    wire.open.set()
    calls = JoinedCalls(wire.run, one_place)
    asked = [ask(calls, number) for number in range(150)]
    assert [await one for one in asked] == [str(number) for number in range(150)]
    assert [len(keys) for keys, _ in wire.calls] == [64, 64, 22]


async def test_what_is_withdrawn_in_time_is_never_sent() -> None:
    wire = Wire()
    calls = JoinedCalls(wire.run, one_place)
    sent = ask(calls, 1)
    await asyncio.sleep(0)
    late, wanted = ask(calls, 2), ask(calls, 3)
    assert late.withdraw()
    assert not sent.withdraw()
    wire.open.set()
    assert (await sent, await wanted) == ("1", "3")
    assert wire.calls[1] == (["{a}:limits"], [1, 2, "do", 3])
    assert not wanted.withdraw()


async def test_a_failure_is_everybodys_who_shared_the_call_and_nobody_elses() -> None:
    wire = Wire(failure=RedisConnectionError("gone"))
    wire.open.set()
    calls = JoinedCalls(wire.run, one_place)
    for asked in [ask(calls, 1), ask(calls, 2)]:
        with pytest.raises(RedisConnectionError):
            await asked
    wire.failure = None
    assert await ask(calls, 3) == "3"


async def test_a_mistake_is_raised_to_whoever_asked() -> None:
    wire = Wire(failure=TypeError("a mistake"))
    wire.open.set()
    calls = JoinedCalls(wire.run, one_place)
    with pytest.raises(TypeError):
        await ask(calls, 1)
    wire.failure = None
    assert await ask(calls, 2) == "2"


async def test_nobody_waits_for_a_call_that_was_cancelled() -> None:
    wire = Wire()
    calls = JoinedCalls(wire.run, one_place)
    first = ask(calls, 1)
    await asyncio.sleep(0)
    second = ask(calls, 2)
    (sender,) = calls._senders
    sender.cancel()
    for asked in (first, second):
        with pytest.raises(asyncio.CancelledError):
            await asked
