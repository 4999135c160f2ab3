"""Files and batches over HTTP, through the official SDK, with a real Redis and without an engine."""

import io
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import httpx
import pytest
from openai import BadRequestError, ConflictError, InternalServerError, NotFoundError, OpenAI
from openai.types import Batch, FileObject

from server.store.keys import digest
from tests.api.running_application import running
from tests.serving.batch_files import CHAT, jsonl, line, records
from tests.serving.chat_operation import ChatOperation
from tests.serving.fake_stack import FakeStack

WITHIN_S = 20.0
LINES = jsonl(line(f"id-{n}", f"text {n}") for n in range(5))


def stack() -> FakeStack:
    return FakeStack({("POST", CHAT): ChatOperation()})


def sdk(server: httpx.Client, key: str = "EMPTY") -> OpenAI:
    return OpenAI(base_url=f"{server.base_url}/v1", api_key=key, max_retries=0)


@pytest.fixture
def server(store_url: str, tmp_path: Path) -> Iterator[httpx.Client]:
    with running(stack(), redis_url=store_url, data_folder=tmp_path) as client:
        yield client


@pytest.fixture
def client(server: httpx.Client) -> OpenAI:
    return sdk(server)


def upload(client: OpenAI, content: bytes = LINES, **fields: Any) -> FileObject:
    return client.files.create(file=("in.jsonl", content), purpose="batch", **fields)


def submit(client: OpenAI, content: bytes = LINES, **fields: Any) -> Batch:
    file = upload(client, content)
    return client.batches.create(input_file_id=file.id, endpoint=CHAT, completion_window="24h", **fields)


def ended(client: OpenAI, batch: Batch) -> Batch:
    deadline_s = time.monotonic() + WITHIN_S
    while batch.status in ("validating", "in_progress", "finalizing", "cancelling"):
        assert time.monotonic() < deadline_s, batch.status
        time.sleep(0.05)
        batch = client.batches.retrieve(batch.id)
    return batch


def test_a_batch_goes_from_upload_to_output_with_the_official_sdk(client: OpenAI) -> None:
    file = upload(client)
    assert (file.object, file.bytes, file.filename, file.purpose) == ("file", len(LINES), "in.jsonl", "batch")
    begun = client.batches.create(
        input_file_id=file.id, endpoint=CHAT, completion_window="24h", metadata={"for": "tests"}
    )
    assert (begun.status, begun.object, begun.metadata) == ("validating", "batch", {"for": "tests"})
    batch = ended(client, begun)
    assert (batch.status, batch.model) == ("completed", "a-model")
    assert batch.request_counts is not None
    assert (batch.request_counts.total, batch.request_counts.completed) == (5, 5)
    assert batch.usage is not None
    assert batch.usage.total_tokens == 50
    assert batch.output_file_id is not None
    output = records(client.files.content(batch.output_file_id).read())
    assert {item["custom_id"] for item in output} == {f"id-{n}" for n in range(5)}
    assert {item["response"]["status_code"] for item in output} == {200}
    assert client.files.retrieve(batch.output_file_id).purpose == "batch_output"


def test_an_uploaded_file_comes_back_byte_for_byte(client: OpenAI) -> None:
    content = bytes(range(256)) * 20_000
    file = upload(client, content)
    assert client.files.content(file.id).read() == content
    assert client.files.delete(file.id).deleted
    with pytest.raises(NotFoundError):
        client.files.content(file.id)
    with pytest.raises(NotFoundError):
        client.files.delete(file.id)


def test_lists_come_in_pages(client: OpenAI) -> None:
    files = [upload(client, b"x").id for _ in range(5)]
    first = client.files.list(limit=2)
    assert ([file.id for file in first.data], first.has_more) == ([files[4], files[3]], True)
    assert [file.id for file in client.files.list(limit=2)] == files[::-1]
    assert [file.id for file in client.files.list(order="asc", after=files[2])] == files[3:]
    assert client.files.list(purpose="batch_output").data == []
    batches = [submit(client).id for _ in range(3)]
    assert [batch.id for batch in client.batches.list(limit=1)] == batches[::-1]


def test_a_batch_with_bad_lines_fails_as_openai_says_it(client: OpenAI) -> None:
    content = jsonl([line("a"), line("a")]) + b"not json\n"
    batch = ended(client, submit(client, content))
    assert batch.status == "failed"
    assert batch.errors is not None
    assert batch.errors.object == "list"
    assert [(error.code, error.line, error.param) for error in batch.errors.data or []] == [
        ("duplicate_custom_id", 2, "custom_id"),
        ("invalid_json_line", 3, None),
    ]
    assert batch.error_file_id is not None
    named = records(client.files.content(batch.error_file_id).read())
    assert [item["error"]["line"] for item in named] == [2, 3]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "input_file_id"),
        ({"input_file_id": 7}, "input_file_id"),
        ({"endpoint": "/v1/moderations"}, "endpoint"),
        ({"completion_window": "1h"}, "completion_window"),
        ({"metadata": {"a": 1}}, "metadata"),
        ({"metadata": {str(n): "x" for n in range(17)}}, "metadata"),
        ({"metadata": {"a": "x" * 513}}, "metadata"),
        ({"output_expires_after": {"anchor": "created_at", "seconds": 5}}, "output_expires_after"),
        ({"output_expires_after": {"anchor": "now", "seconds": 5000}}, "output_expires_after"),
        ({"output_expires_after": 5}, "output_expires_after"),
        ({"colour": "blue"}, "colour"),
    ],
)
def test_a_bad_order_is_refused_with_the_field_at_fault(server: httpx.Client, body: Any, param: str) -> None:
    good = {"input_file_id": "file-1", "endpoint": CHAT, "completion_window": "24h"}
    answer = server.post("/v1/batches", json=body and {**good, **body})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param


def test_an_order_for_a_file_that_is_not_there_is_a_404(client: OpenAI, server: httpx.Client) -> None:
    good = {"input_file_id": "../../etc/passwd", "endpoint": CHAT, "completion_window": "24h"}
    answer = server.post("/v1/batches", json=good)
    assert (answer.status_code, answer.json()["error"]["param"]) == (404, "input_file_id")
    batch = ended(client, submit(client))
    assert batch.output_file_id is not None
    with pytest.raises(BadRequestError, match="batch_output"):
        client.batches.create(input_file_id=batch.output_file_id, endpoint=CHAT, completion_window="24h")


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"purpose": "fine-tune"}, "purpose=batch"),
        ({}, "'purpose'"),
        ({"purpose": "batch", "expires_after[anchor]": "created_at"}, "seconds"),
        ({"purpose": "batch", "expires_after[anchor]": "created_at", "expires_after[seconds]": "59"}, "3600"),
        ({"purpose": "batch", "expires_after[anchor]": "x", "expires_after[seconds]": "3600"}, "anchor"),
    ],
)
def test_a_bad_upload_is_refused_and_leaves_nothing(
    server: httpx.Client, tmp_path: Path, fields: dict[str, str], said: str
) -> None:
    answer = server.post("/v1/files", files={"file": ("in.jsonl", io.BytesIO(LINES))}, data=fields)
    assert answer.status_code == 400
    assert said in answer.json()["error"]["message"]
    assert list(tmp_path.rglob("file-*")) == []


def test_a_file_expires_when_its_client_says(client: OpenAI) -> None:
    file = upload(client, expires_after={"anchor": "created_at", "seconds": 3600})
    assert file.expires_at == file.created_at + 3600


def test_a_file_without_an_upload_is_refused(server: httpx.Client) -> None:
    answer = server.post("/v1/files", json={"purpose": "batch"})
    assert answer.status_code == 400
    assert "multipart/form-data" in answer.json()["error"]["message"]


@pytest.mark.parametrize("query", ["limit=0", "limit=10001", "limit=x", "order=up", "after=file-1"])
def test_a_bad_page_is_refused(server: httpx.Client, query: str) -> None:
    assert server.get(f"/v1/files?{query}").status_code == 400


def test_files_keep_to_their_size_and_their_tenants_to_their_quota(store_url: str, tmp_path: Path) -> None:
    limits = {"batch_max_file_mib": 0.01, "batch_quota_mib": 0.015}
    with running(stack(), redis_url=store_url, data_folder=tmp_path, **limits) as server:
        client = sdk(server)
        too_large = server.post("/v1/files", files={"file": ("a", b"x" * 20_000)}, data={"purpose": "batch"})
        assert too_large.status_code == 413
        kept = upload(client, b"x" * 10_000)
        with pytest.raises(InternalServerError, match="Delete some of them") as refused:
            upload(client, b"x" * 10_000)
        assert refused.value.status_code == 507
        assert refused.value.code == "storage_full"
        client.files.delete(kept.id)
        assert upload(client, b"x" * 10_000).bytes == 10_000
        assert len([path for path in tmp_path.rglob("file-*") if path.is_file()]) == 1


def test_tenants_do_not_see_each_other(store_url: str, tmp_path: Path) -> None:
    tenants = tmp_path / "tenants.toml"
    tenants.write_text(
        "\n".join(f'[tenants.{name}]\nkeys = [{{ sha256 = "{digest(f"{name}-key")}" }}]' for name in ("one", "two"))
    )
    with running(stack(), redis_url=store_url, data_folder=tmp_path, tenants_file=tenants) as server:
        one, two = sdk(server, "one-key"), sdk(server, "two-key")
        batch = ended(one, submit(one))
        assert batch.status == "completed"
        assert (two.files.list().data, two.batches.list().data) == ([], [])
        for look in (
            lambda: two.files.retrieve(batch.input_file_id),
            lambda: two.files.content(cast("str", batch.output_file_id)),
            lambda: two.files.delete(batch.input_file_id),
            lambda: two.batches.retrieve(batch.id),
            lambda: two.batches.cancel(batch.id),
        ):
            with pytest.raises(NotFoundError):
                look()
        assert server.get("/v1/files").status_code == 401
        assert server.get("/v1/batches").status_code == 401
        with pytest.raises(ConflictError, match="completed"):
            one.batches.cancel(batch.id)


def test_without_redis_a_client_is_told_to_come_back(tmp_path: Path) -> None:
    with running(stack(), redis_url="unix:///nowhere/redis.sock", data_folder=tmp_path, api_key=("k",)) as server:
        server.headers["authorization"] = "Bearer k"
        for answer in (server.get("/v1/files"), server.get("/v1/batches/batch_1")):
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "store_unavailable")
            assert int(answer.headers["retry-after"]) >= 1


def test_an_operator_can_leave_batches_out(store_url: str, tmp_path: Path) -> None:
    with running(stack(), redis_url=store_url, data_folder=tmp_path, batches=False) as server:
        assert [server.get(path).status_code for path in ("/v1/batches", "/v1/files")] == [404, 404]
