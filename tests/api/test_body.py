from collections.abc import Iterable

import pytest
from starlette.datastructures import Headers
from starlette.types import Message

from server.api.body import ClientLeft, parse_json_object, read_body
from server.policy.refusals import BodyTooLarge, InvalidRequest

pytestmark = pytest.mark.anyio

JSON = Headers({"content-type": "application/json"})
CAP = 10


class Chunks:
    """A `receive` that hands out chunks, then a disconnect, and counts how often it was asked."""

    def __init__(self, chunks: Iterable[bytes], *, complete: bool = True) -> None:
        chunks = list(chunks)
        last = len(chunks) - 1
        self._messages: list[Message] = [
            {"type": "http.request", "body": chunk, "more_body": i < last or not complete}
            for i, chunk in enumerate(chunks)
        ]
        self.asked = 0

    async def __call__(self) -> Message:
        self.asked += 1
        return self._messages.pop(0) if self._messages else {"type": "http.disconnect"}


def declared(length: object) -> Headers:
    return Headers({"content-length": str(length)})


async def test_a_body_in_chunks_is_put_together() -> None:
    assert await read_body(Chunks([b"ab", b"", b"cd"]), Headers(), CAP) == b"abcd"


async def test_a_message_without_a_body_is_an_empty_one() -> None:
    async def receive() -> Message:
        return {"type": "http.request"}

    assert await read_body(receive, Headers(), CAP) == b""


async def test_a_body_of_exactly_the_cap_is_read() -> None:
    assert await read_body(Chunks([b"x" * CAP]), declared(CAP), CAP) == b"x" * CAP


async def test_a_declared_length_over_the_cap_is_refused_before_anything_is_read() -> None:
    chunks = Chunks([b"x"])
    with pytest.raises(BodyTooLarge, match=f"{CAP} bytes"):
        await read_body(chunks, declared(CAP + 1), CAP)
    assert chunks.asked == 0


@pytest.mark.parametrize("headers", [Headers(), declared(1), declared("many"), declared(-1)])
async def test_a_body_that_turns_out_over_the_cap_is_refused_at_that_byte(headers: Headers) -> None:
    chunks = Chunks([b"x" * CAP, b"x", b"never read"])
    with pytest.raises(BodyTooLarge):
        await read_body(chunks, headers, CAP)
    assert chunks.asked == 2


@pytest.mark.parametrize("chunks", [[], [b"{"]])
async def test_a_client_that_leaves_before_its_body_is_complete_is_no_error(chunks: list[bytes]) -> None:
    with pytest.raises(ClientLeft):
        await read_body(Chunks(chunks, complete=False), Headers(), CAP)


@pytest.mark.parametrize(
    "media_type", ["application/json", "Application/JSON", "application/json; charset=utf-8", " application/json ;x=y"]
)
def test_a_json_object_is_read_whatever_the_spelling_of_its_type(media_type: str) -> None:
    assert parse_json_object(b'{"a": [1, "\xc3\xa9"]}', Headers({"content-type": media_type})) == {"a": [1, "é"]}


@pytest.mark.parametrize("media_type", ["", "text/plain", "application/x-www-form-urlencoded", "application/jsonl"])
def test_another_content_type_is_refused_with_the_header_to_send(media_type: str) -> None:
    with pytest.raises(InvalidRequest, match="Content-Type: application/json"):
        parse_json_object(b"{}", Headers({"content-type": media_type}))


def test_a_missing_content_type_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="Content-Type: application/json"):
        parse_json_object(b"{}", Headers())


@pytest.mark.parametrize(
    ("raw", "place"), [(b'{"a": }', "character 6"), (b'{"a": 1', "character 7"), (b"", "character 0")]
)
def test_broken_json_is_refused_with_the_place_where_it_breaks(raw: bytes, place: str) -> None:
    with pytest.raises(InvalidRequest, match=f"not valid JSON.*{place}"):
        parse_json_object(raw, JSON)


def test_bytes_that_are_no_text_are_refused_with_their_place() -> None:
    with pytest.raises(InvalidRequest, match=r"not valid UTF-8 \(byte 6\)"):
        parse_json_object(b'{"a":"\xff"}', JSON)


@pytest.mark.parametrize("raw", [b"[]", b'"text"', b"1", b"null", b"true"])
def test_json_that_is_no_object_is_refused(raw: bytes) -> None:
    with pytest.raises(InvalidRequest, match="must be a JSON object"):
        parse_json_object(raw, JSON)


@pytest.mark.parametrize("raw", [b'{"a":' * 100_000, b"[" * 100_000 + b"]" * 100_000])
def test_json_that_is_nested_without_end_is_refused(raw: bytes) -> None:
    with pytest.raises(InvalidRequest, match="nested too deeply"):
        parse_json_object(raw, JSON)


def test_a_number_with_more_digits_than_python_reads_is_refused() -> None:
    with pytest.raises(InvalidRequest):
        parse_json_object(b'{"seed": ' + b"1" * 5000 + b"}", JSON)
