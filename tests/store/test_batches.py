import asyncio
from dataclasses import replace

import pytest
from redis.asyncio import Redis

from server.policy.batches import Batch, BatchError, Counts, Outputs, Usage, moved
from server.store.batches import LEASE_S, BatchRecords
from server.store.pages import Cut, UnknownCursor

pytestmark = pytest.mark.anyio


def batch(number: int, tenant: str = "a", folder: str = "here") -> Batch:
    outputs = Outputs("file-1", "file-2", 3600)
    return Batch(f"batch_{number}", tenant, "file-0", "/v1/chat/completions", number, number + 9, folder, outputs)


@pytest.fixture
def records(redis: Redis) -> BatchRecords:
    return BatchRecords(redis)


async def test_a_batch_comes_back_as_it_was_written(records: BatchRecords) -> None:
    whole = replace(
        moved(batch(1), "in_progress", 5.0),
        ends_as="expired",
        end_user="someone",
        metadata={"for": "tests"},
        model="m",
        counts=Counts(3, 2, 1),
        usage=Usage(1, 2, 3, 4),
        errors=(BatchError("code", "words", 4, "param"), BatchError("other", "words")),
        output_file_id="file-1",
    )
    await records.add(whole)
    found = await records.find("batch_1")
    assert found is not None
    assert found.batch == whole
    assert await records.find("batch_2") is None


async def test_only_who_read_it_last_may_replace_it(records: BatchRecords) -> None:
    await records.add(batch(1))
    first, second = await records.find("batch_1"), await records.find("batch_1")
    assert first is not None
    assert second is not None
    changed = await records.replace(first, moved(first.batch, "in_progress", 5.0))
    assert changed is not None
    assert await records.replace(second, moved(second.batch, "cancelling", 6.0)) is None
    again = await records.replace(changed, moved(changed.batch, "cancelling", 7.0))
    assert again is not None
    assert again.batch.status == "cancelling"


async def test_open_batches_are_those_of_the_folder_that_have_not_ended(records: BatchRecords) -> None:
    for number, folder in ((3, "here"), (1, "here"), (2, "elsewhere")):
        await records.add(batch(number, folder=folder))
    assert [found.id for found in await records.open("here")] == ["batch_1", "batch_3"]
    stored = await records.find("batch_1")
    assert stored is not None
    await records.replace(stored, moved(stored.batch, "failed", 5.0))
    assert [found.id for found in await records.open("here")] == ["batch_3"]


async def test_pages_show_a_tenants_own_batches_newest_first(records: BatchRecords) -> None:
    for number in range(1, 6):
        await records.add(batch(number))
        await records.add(batch(number + 10, tenant="b"))
    page, more = await records.page("a", Cut(2))
    assert ([found.id for found in page], more) == (["batch_5", "batch_4"], True)
    page, more = await records.page("a", Cut(3, after="batch_4"))
    assert ([found.id for found in page], more) == (["batch_3", "batch_2", "batch_1"], False)
    page, more = await records.page("a", Cut(2, order="asc"))
    assert ([found.id for found in page], more) == (["batch_1", "batch_2"], True)


async def test_a_cursor_of_another_tenant_is_unknown(records: BatchRecords) -> None:
    await records.add(batch(1, tenant="b"))
    with pytest.raises(UnknownCursor):
        await records.page("a", Cut(2, after="batch_1"))


async def test_a_lease_has_one_holder(records: BatchRecords) -> None:
    taken = await asyncio.gather(*(records.take("batch_1", f"replica-{number}") for number in range(8)))
    assert taken.count(True) == 1
    holder = f"replica-{taken.index(True)}"
    assert await records.renew("batch_1", holder)
    assert not await records.renew("batch_1", "replica-9")
    await records.release("batch_1", "replica-9")
    assert not await records.take("batch_1", "replica-9")
    await records.release("batch_1", holder)
    assert await records.take("batch_1", "replica-9")


async def test_a_lease_ends_by_itself(records: BatchRecords, redis: Redis) -> None:
    await records.take("batch_1", "replica-1")
    left_ms = await redis.pttl("tidegate:{batches}:lease:batch_1")
    assert 0 < left_ms <= LEASE_S * 1000
