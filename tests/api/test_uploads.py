from collections.abc import AsyncIterator

import pytest
from starlette.datastructures import Headers

from server.api.uploads import Form, read_upload
from server.policy.refusals import InvalidRequest

pytestmark = pytest.mark.anyio

HEADERS = Headers({"content-type": "multipart/form-data; boundary=cut"})
FILE = b'--cut\r\nContent-Disposition: form-data; name="file"; filename="in.jsonl"\r\n\r\none\r\n--cu\r\ntwo\r\n'
PURPOSE = b'--cut\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n'
END = b"--cut--\r\n"


async def read(body: bytes, size: int = 1 << 20, headers: Headers = HEADERS) -> tuple[Form, bytes]:
    written = bytearray()

    async def chunks() -> AsyncIterator[bytes]:
        for start in range(0, len(body), size):
            yield body[start : start + size]

    async def write(piece: bytes) -> None:
        written.extend(piece)

    return await read_upload(headers, chunks(), write), bytes(written)


@pytest.mark.parametrize("size", [1, 2, 7, 50, 1000])
@pytest.mark.parametrize("body", [FILE + PURPOSE + END, PURPOSE + FILE + END])
async def test_the_file_comes_out_as_it_went_in_however_it_is_cut(body: bytes, size: int) -> None:
    form, written = await read(body, size)
    assert written == b"one\r\n--cu\r\ntwo"
    assert (form.fields, form.filename, form.has_file) == ({"purpose": "batch"}, "in.jsonl", True)


async def test_a_form_without_a_file_says_so() -> None:
    form, written = await read(PURPOSE + END)
    assert (form.has_file, written) == (False, b"")


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (FILE + PURPOSE, "ends before"),
        (b"", "ends before"),
        (b"nonsense that is no form", "not a valid multipart form"),
        (FILE + FILE + END, "one file"),
        (FILE.replace(b'name="file"', b'name="other"') + END, "one file"),
        (b"--cut\r\nContent-Disposition: form-data\r\n\r\nx\r\n" + END, "no name"),
        (PURPOSE.replace(b"batch", b"x" * 20_000) + END, "too long"),
        (PURPOSE * 40 + END, "more than 32"),
        (b"--cut\r\n" + b"X: y\r\n" * 50 + b"\r\nx\r\n" + END, "not a valid multipart form"),
    ],
)
async def test_a_bad_form_is_refused_with_a_sentence(body: bytes, said: str) -> None:
    with pytest.raises(InvalidRequest, match=said):
        await read(body)


@pytest.mark.parametrize("kind", ["", "application/json", "multipart/form-data", "text/plain; boundary=cut"])
async def test_what_is_no_form_is_refused(kind: str) -> None:
    with pytest.raises(InvalidRequest, match="multipart/form-data"):
        await read(FILE + END, headers=Headers({"content-type": kind}))


async def test_a_file_name_is_text_for_people_and_nothing_else() -> None:
    name = "../" * 200 + "a\tb\x7f"
    form, _ = await read(FILE.replace(b"in.jsonl", name.encode()) + END)
    assert len(form.filename) <= 255
    assert form.filename.isprintable()
