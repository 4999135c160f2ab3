"""Batches from upload to output, on a real Redis and a real folder."""

import asyncio
import itertools
import random
from pathlib import Path

import pytest
from redis.asyncio import Redis

from server.policy.batches import LINES_WAITING, Batch
from server.policy.refusals import (
    Conflict,
    Draining,
    GenerationFailed,
    InvalidRequest,
    NotFound,
    Overloaded,
    RateLimited,
)
from server.policy.tenants import Tenant
from server.serving.batch_desk import Order
from tests.serving.batch_files import CHAT, jsonl, line
from tests.serving.batch_replica import TENANT, Replica, eventually
from tests.serving.chat_operation import ChatOperation
from tests.telemetry.captured_logs import captured_logs

pytestmark = pytest.mark.anyio

STRANGER = Tenant("stranger")


@pytest.fixture
def replica(redis: Redis, tmp_path: Path) -> Replica:
    return Replica(redis, tmp_path)


async def test_every_line_is_answered_once(replica: Replica) -> None:
    async with replica.running():
        batch = await replica.ended(await replica.submit(line(f"id-{n}", f"text {n}") for n in range(40)))
        assert await replica.answers(batch) == {f"id-{n}": f"TEXT {n}" for n in range(40)}
    assert batch.status == "completed"
    assert (batch.counts.total, batch.counts.completed, batch.counts.failed) == (40, 40, 0)
    assert (batch.usage.input_tokens, batch.usage.output_tokens, batch.usage.cached_tokens) == (280, 120, 80)
    assert batch.error_file_id is None
    assert batch.model == "a-model"
    assert replica.chat.classes == {"batch"}
    assert replica.metric("tidegate_batch_lines_total", state="completed") == 40
    assert replica.metric("tidegate_batch_engine_seconds_total") > 0
    assert replica.metric("tidegate_batch_lines_in_flight", where="engine") == 0
    assert replica.metric("tidegate_batch_lines_in_flight", where="gate") == 0


async def test_a_bad_request_is_answered_in_the_error_file_and_spoils_no_other(replica: Replica) -> None:
    replica.chat.failing["bad"] = InvalidRequest("Not like this.")
    async with replica.running():
        batch = await replica.ended(await replica.submit([line("a"), line("b", "bad"), line("c")]))
        assert set(await replica.answers(batch)) == {"a", "c"}
        (failed,) = await replica.content(batch.error_file_id)
    assert (failed["custom_id"], failed["error"]) == ("b", None)
    assert failed["response"]["status_code"] == 400
    assert failed["response"]["body"]["error"]["message"] == "Not like this."
    assert (batch.status, batch.counts.completed, batch.counts.failed) == ("completed", 2, 1)


async def test_what_the_gate_refuses_is_tried_again(replica: Replica) -> None:
    replica.chat.refusals = [Overloaded("busy", retry_after_s=0.05), GenerationFailed("the engine died")]
    async with replica.running():
        batch = await replica.ended(await replica.submit([line("a"), line("b")]))
        assert set(await replica.answers(batch)) == {"a", "b"}
    assert batch.status == "completed"


async def test_a_line_that_fails_twice_gets_the_failure_as_its_answer(replica: Replica) -> None:
    replica.chat.failing["bad"] = GenerationFailed("It died again.")
    async with replica.running():
        batch = await replica.ended(await replica.submit([line("a", "bad"), line("b")]))
        assert [item["custom_id"] for item in await replica.content(batch.error_file_id)] == ["a"]
    assert replica.chat.asked.count("bad") == 2


async def test_an_error_of_our_own_is_logged_and_fails_its_line_alone(replica: Replica) -> None:
    replica.chat.failing["bad"] = ZeroDivisionError()  # type: ignore[assignment]
    with captured_logs() as log:
        async with replica.running():
            batch = await replica.ended(await replica.submit([line("a", "bad"), line("b")]))
    assert (batch.counts.completed, batch.counts.failed) == (1, 1)
    assert any("ZeroDivisionError" in str(event) for event in log.events)


async def test_as_many_run_as_the_gate_lets_in_and_a_few_wait_at_it(replica: Replica) -> None:
    replica.chat.gate.clear()
    async with replica.running():
        batch = await replica.submit(line(f"id-{n}", str(n)) for n in range(100))
        await eventually(lambda: len(replica.chat.asked) >= replica.chat.in_engine + LINES_WAITING)
        await asyncio.sleep(0.2)
        running = replica.chat.in_engine
        assert running > 1
        assert len(replica.chat.asked) == running + LINES_WAITING
        assert replica.metric("tidegate_batch_lines_in_flight", where="engine") == running
        assert replica.metric("tidegate_batch_lines_in_flight", where="gate") == LINES_WAITING
        replica.chat.gate.set()
        assert (await replica.ended(batch)).counts.completed == 100


async def test_few_wait_at_a_gate_that_lets_nobody_in(replica: Replica) -> None:
    replica.chat.shut = True
    async with replica.running():
        await replica.submit(line(f"id-{n}") for n in range(100))
        await eventually(lambda: len(replica.chat.asked) >= LINES_WAITING)
        await asyncio.sleep(0.2)
        assert len(replica.chat.asked) == LINES_WAITING


async def test_nothing_new_runs_while_batches_are_paused(replica: Replica) -> None:
    replica.paused = True
    async with replica.running():
        batch = await replica.submit([line("a")])
        await asyncio.sleep(1.2)
        assert replica.chat.asked == []
        assert (await replica.batch(batch)).status == "in_progress"
        replica.paused = False
        assert (await replica.ended(batch)).status == "completed"


async def test_lines_that_begin_alike_run_after_each_other(replica: Replica) -> None:
    lines = [line(f"{n}-{system}", f"{system} {n}") for n in range(6) for system in ("translate", "sum up", "rhyme")]
    async with replica.running():
        await replica.ended(await replica.submit(lines))
    begins = [text.split()[0] for text in replica.chat.asked]
    changes = sum(first != second for first, second in itertools.pairwise(begins))
    assert changes == 2


async def test_a_cancelled_batch_keeps_what_is_answered_and_names_the_rest(replica: Replica) -> None:
    replica.chat.gate.clear()
    async with replica.running():
        batch = await replica.submit(line(f"id-{n}", str(n)) for n in range(1000))
        await eventually(lambda: replica.chat.in_engine > 1)
        replica.paused = True
        replica.chat.gate.set()
        cancelling = await replica.batching.batches.cancel(TENANT, batch.id)
        assert cancelling.status == "cancelling"
        ended = await replica.ended(batch)
        answered, unrun = await replica.answers(ended), await replica.content(ended.error_file_id)
    assert ended.status == "cancelled"
    assert {*answered, *(item["custom_id"] for item in unrun)} == {f"id-{n}" for n in range(1000)}
    assert len(answered) + len(unrun) == 1000
    assert {item["error"]["code"] for item in unrun} <= {"batch_cancelled"}
    assert ended.counts.completed == len(answered) > 0
    again = await replica.batching.batches.cancel(TENANT, batch.id)
    assert again.status == "cancelled"


async def test_a_batch_that_has_ended_cannot_be_cancelled(replica: Replica) -> None:
    async with replica.running():
        batch = await replica.ended(await replica.submit([line("a")]))
        with pytest.raises(Conflict, match="completed"):
            await replica.batching.batches.cancel(TENANT, batch.id)


async def test_an_expired_batch_keeps_what_is_answered_and_names_the_rest(replica: Replica) -> None:
    async with replica.running():
        replica.paused = True
        batch = await replica.submit([line("a"), line("b")])
        await asyncio.sleep(0.2)
        replica.clock.ahead_s = 25 * 3600
        ended = await replica.ended(batch)
        unrun = await replica.content(ended.error_file_id)
    assert ended.status == "expired"
    assert "finalizing" in ended.times
    assert {item["custom_id"]: item["error"]["code"] for item in unrun} == {"a": "batch_expired", "b": "batch_expired"}
    assert (ended.counts.total, ended.counts.failed) == (2, 2)


async def test_a_broken_line_fails_the_batch_and_is_named(replica: Replica) -> None:
    content = jsonl(line(f"id-{n}") for n in range(400)) + b'{"custom_id": "id-400", \n' + jsonl([line("id-0")])
    async with replica.running():
        batch = await replica.ended(await replica.submit(content))
        named = await replica.content(batch.error_file_id)
    assert batch.status == "failed"
    assert [(error.code, error.line) for error in batch.errors] == [
        ("invalid_json_line", 401),
        ("duplicate_custom_id", 402),
    ]
    assert [item["error"]["line"] for item in named] == [401, 402]
    assert replica.chat.asked == []


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (b"", "empty_file"),
        (b"\n \n", "empty_file"),
        (jsonl([line("a"), line("b", model="another")]), "mismatched_model"),
        (jsonl(line(f"id-{n}") for n in range(1001)), "too_many_requests"),
        (jsonl([line("a", "x" * 70_000)]), "line_too_long"),
        (b"\xff\xfe\n", "invalid_json_line"),
    ],
)
async def test_an_input_that_cannot_run_is_refused_as_a_whole(replica: Replica, content: bytes, code: str) -> None:
    async with replica.running():
        batch = await replica.ended(await replica.submit(content))
    assert batch.status == "failed"
    assert code in {error.code for error in batch.errors}
    assert replica.chat.asked == []


async def test_a_missing_input_fails_the_batch(replica: Replica) -> None:
    batch = await replica.submit([line("a")])
    replica.bodies.delete(batch.input_file_id)
    async with replica.running():
        ended = await replica.ended(batch)
    assert (ended.status, ended.errors[0].code) == ("failed", "input_missing")


async def test_a_batch_whose_tenant_is_gone_does_not_run(replica: Replica) -> None:
    batch = await replica.submit([line("a")])
    replica.tenants.clear()
    async with replica.running():
        ended = await replica.ended(batch)
    assert (ended.status, ended.errors[0].code) == ("failed", "tenant_gone")


async def test_another_tenants_files_and_batches_are_not_there(replica: Replica) -> None:
    async with replica.running():
        batch = await replica.ended(await replica.submit([line("a")]))
    files, batches = replica.batching.files, replica.batching.batches
    assert batch.output_file_id is not None
    for file_id in (batch.input_file_id, batch.output_file_id):
        with pytest.raises(NotFound):
            await files.content(STRANGER, file_id)
        with pytest.raises(NotFound):
            await files.delete(STRANGER, file_id)
        with pytest.raises(NotFound):
            await batches.create(STRANGER, Order(file_id, CHAT))
    with pytest.raises(NotFound):
        await batches.batch(STRANGER, batch.id)
    with pytest.raises(NotFound):
        await batches.cancel(STRANGER, batch.id)


async def test_the_input_of_an_open_batch_cannot_be_deleted(replica: Replica) -> None:
    batch = await replica.submit([line("a")])
    with pytest.raises(Conflict, match=batch.id):
        await replica.batching.files.delete(TENANT, batch.input_file_id)
    async with replica.running():
        await replica.ended(batch)
    await replica.batching.files.delete(TENANT, batch.input_file_id)


async def test_stopping_anywhere_and_going_on_answers_each_line_once(redis: Redis, tmp_path: Path) -> None:
    """Stops as hard as one process can; a real kill is in tests/live."""
    seeds, first = random.Random(7), Replica(redis, tmp_path)
    batch = await first.submit(line(f"id-{n}", str(n)) for n in range(300))
    for attempt in range(8):
        chat = ChatOperation(delay_s=0.02)
        replica = Replica(redis, tmp_path, chat, name=f"replica-{attempt}")
        async with replica.running():
            await asyncio.sleep(seeds.uniform(0.02, 0.1))
    last = Replica(redis, tmp_path, name="last")
    async with last.running():
        ended = await last.ended(batch)
        assert set(await last.answers(ended)) == {f"id-{n}" for n in range(300)}
    assert (ended.status, ended.counts.completed, ended.usage.output_tokens) == ("completed", 300, 900)


async def test_replicas_share_the_batches_and_no_line_runs_twice(redis: Redis, tmp_path: Path) -> None:
    chat = ChatOperation(delay_s=0.01)
    one, two = (Replica(redis, tmp_path, chat, name) for name in ("one", "two"))
    batches = [await one.submit(line(f"id-{n}", f"{b} {n}") for n in range(50)) for b in range(4)]
    async with one.running(), two.running():
        for batch in batches:
            assert len(await one.answers(await two.ended(batch))) == 50
    assert sorted(chat.asked) == sorted(f"{b} {n}" for b in range(4) for n in range(50))


async def test_a_replica_with_another_folder_leaves_a_batch_alone(redis: Redis, tmp_path: Path) -> None:
    here, elsewhere = Replica(redis, tmp_path / "a"), Replica(redis, tmp_path / "b", name="two")
    batch = await here.submit([line("a")])
    async with elsewhere.running():
        await asyncio.sleep(0.3)
        assert (await here.batch(batch)).status == "validating"
        with pytest.raises(NotFound, match="not on this server"):
            await elsewhere.batching.files.content(TENANT, batch.input_file_id)


async def test_a_draining_server_finishes_its_lines_and_keeps_the_others_for_later(
    redis: Redis, tmp_path: Path
) -> None:
    replica = Replica(redis, tmp_path)
    replica.chat.gate.clear()
    async with replica.running():
        batch = await replica.submit(line(f"id-{n}", str(n)) for n in range(40))
        await eventually(lambda: replica.chat.in_engine > 1)
        running = replica.chat.in_engine
        draining = asyncio.create_task(replica.requests.drain(5.0))
        await asyncio.sleep(0)
        replica.chat.gate.set()
        assert await draining == 0
    async with Replica(redis, tmp_path, name="next").running() as after:
        ended = await after.ended(batch)
        assert set(await after.answers(ended)) == {f"id-{n}" for n in range(40)}
        assert len(after.chat.asked) <= 40 - running


async def test_lines_that_a_stop_cut_off_run_on_the_next_server(redis: Redis, tmp_path: Path) -> None:
    replica = Replica(redis, tmp_path, ChatOperation())
    replica.chat.gate.clear()
    async with replica.running():
        batch = await replica.submit(line(f"id-{n}", str(n)) for n in range(20))
        await eventually(lambda: replica.chat.in_engine > 1)
        await replica.requests.drain(0.05)
        await replica.requests.end_all(Draining("stopping"))
        assert (await replica.batch(batch)).status == "in_progress"
    async with Replica(redis, tmp_path, name="next").running() as after:
        ended = await after.ended(batch)
    assert (ended.counts.completed, ended.counts.failed) == (20, 0)


async def test_a_line_whose_task_is_woken_because_its_engine_died_runs_again(replica: Replica) -> None:
    replica.chat.gate.clear()
    async with replica.running():
        batch = await replica.submit([line("a")])
        await eventually(lambda: replica.chat.in_engine == 1)
        (task,) = replica.requests._open
        task.cancel()
        await eventually(lambda: replica.chat.in_engine == 0)
        replica.chat.gate.set()
        ended = await replica.ended(batch)
    assert (ended.status, ended.counts.completed) == ("completed", 1)
    assert replica.chat.asked == ["Hello", "Hello"]


async def test_a_lost_lease_stops_the_lines(replica: Replica, redis: Redis) -> None:
    replica.chat.gate.clear()
    async with replica.running():
        batch = await replica.submit([line("a")])
        await eventually(lambda: replica.chat.in_engine == 1)
        await redis.set(f"tidegate:{{batches}}:lease:{batch.id}", "another", px=60_000)
        await eventually(lambda: replica.chat.in_engine == 0)
    assert await redis.get(f"tidegate:{{batches}}:lease:{batch.id}") == b"another"


async def test_files_that_are_kept_no_longer_are_removed_but_not_from_under_a_batch(replica: Replica) -> None:
    unused, batch = await replica.upload(b"old"), await replica.submit([line("a")])
    replica.clock.ahead_s = 8 * 24 * 3600
    await replica.batching.runner.sweep()
    assert not replica.bodies.path(unused).exists()
    assert replica.bodies.path(batch.input_file_id).exists()
    with pytest.raises(NotFound):
        await replica.batching.files.file(TENANT, unused)


async def test_nobody_can_leave_any_number_of_batches_open(replica: Replica) -> None:
    file_id = await replica.upload(jsonl([line("a")]))
    for _ in range(100):
        await replica.batching.batches.create(TENANT, Order(file_id, CHAT))
    with pytest.raises(RateLimited, match="100 batches"):
        await replica.batching.batches.create(TENANT, Order(file_id, CHAT))


async def test_a_line_rather_waits_than_loses_a_part_of_its_answer(replica: Replica) -> None:
    async with replica.running():
        await replica.ended(await replica.submit([line("a")]))
    assert replica.chat.headers == {b"x-degradation": b"none", b"x-request-timeout": b"3600"}


async def test_a_batch_of_a_tenant_waits_for_the_one_before_it(replica: Replica) -> None:
    replica.chat.gate.clear()
    async with replica.running():
        batches: list[Batch] = [await replica.submit([line("a", f"batch {n}")]) for n in range(2)]
        await eventually(lambda: replica.chat.in_engine == 1)
        await asyncio.sleep(0.3)
        assert replica.chat.asked == ["batch 0"]
        replica.chat.gate.set()
        for batch in batches:
            assert (await replica.ended(batch)).status == "completed"
