import asyncio

import pytest
from redis.asyncio import Redis

from server.store.file_records import FileRecords, StoredFile
from server.store.pages import Cut

pytestmark = pytest.mark.anyio


def file(number: int, tenant: str = "a", size: int = 10, purpose: str = "batch") -> StoredFile:
    return StoredFile(f"file-{number}", tenant, "here", "in.jsonl", purpose, size, number, 100 + number)


@pytest.fixture
def records(redis: Redis) -> FileRecords:
    return FileRecords(redis)


async def test_a_file_comes_back_as_it_was_written(records: FileRecords) -> None:
    assert await records.add(file(1))
    assert await records.find("file-1") == file(1)
    assert await records.find("file-2") is None


async def test_adding_again_counts_once(records: FileRecords) -> None:
    for _ in range(3):
        assert await records.add(file(1), quota_bytes=15)
    assert await records.used_bytes("a") == 10
    assert len((await records.page("a", None, Cut(10)))[0]) == 1


async def test_files_at_the_same_time_never_pass_the_quota(records: FileRecords) -> None:
    added = await asyncio.gather(*(records.add(file(number), quota_bytes=35) for number in range(10)))
    assert added.count(True) == 3
    assert await records.used_bytes("a") == 30
    assert await records.add(file(20, tenant="b"), quota_bytes=35)


async def test_a_deleted_file_gives_its_room_back_once(records: FileRecords) -> None:
    await records.add(file(1))
    await records.add(file(2))
    assert await records.delete(file(1))
    assert not await records.delete(file(1))
    assert await records.used_bytes("a") == 10
    assert [found.id for found in (await records.page("a", None, Cut(10)))[0]] == ["file-2"]


async def test_a_page_can_show_one_purpose(records: FileRecords) -> None:
    for number in range(4):
        await records.add(file(number, purpose="batch" if number % 2 else "batch_output"))
    page, more = await records.page("a", "batch", Cut(10))
    assert ([found.id for found in page], more) == (["file-3", "file-1"], False)
    page, more = await records.page("a", None, Cut(3, order="asc"))
    assert ([found.id for found in page], more) == (["file-0", "file-1", "file-2"], True)


async def test_files_expire_at_their_own_times(records: FileRecords) -> None:
    for number in range(5):
        await records.add(file(number))
    assert {found.id for found in await records.expired(102.5, 10)} == {"file-0", "file-1", "file-2"}
    assert len(await records.expired(200.0, 2)) == 2
