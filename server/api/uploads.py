"""Reads a multipart upload as it comes: small fields are kept, the file's bytes are passed on."""

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TYPE_CHECKING, Final

from python_multipart import MultipartParser
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import parse_options_header
from starlette.datastructures import Headers

from server.policy.refusals import InvalidRequest

if TYPE_CHECKING:
    from python_multipart.multipart import MultipartCallbacks

_FILE_FIELD: Final = "file"
_MOST_PARTS: Final = 32
_LONGEST_FIELD_BYTES: Final = 16 << 10
_LONGEST_FILENAME: Final = 255


class Form:
    """The fields of an upload, and the name that the client gave its file. `has_file` False: there was none."""

    def __init__(self) -> None:
        self.fields: dict[str, str] = {}
        self.filename = ""
        self.has_file = False


async def read_upload(
    headers: Headers, chunks: AsyncIterator[bytes], write: Callable[[bytes], Awaitable[None]]
) -> Form:
    """Read the whole body and hand the file's bytes to `write`. Raises `InvalidRequest`, and what `write` raises."""
    parts = _Parts()
    try:
        parser = MultipartParser(_boundary(headers), parts.callbacks())
        async for chunk in chunks:
            parser.write(chunk)
            for piece in parts.taken():
                await write(piece)
        parser.finalize()
    except FormParserError as error:
        raise InvalidRequest(f"The body is not a valid multipart form: {error}") from error
    if not parts.complete:
        raise InvalidRequest("The multipart form ends before its last boundary.")
    return parts.form


def _boundary(headers: Headers) -> bytes:
    kind, options = parse_options_header(headers.get("content-type", ""))
    boundary = options.get(b"boundary", b"")
    if kind != b"multipart/form-data" or not boundary:
        raise InvalidRequest("Send the file as a form: `Content-Type: multipart/form-data` with a boundary.")
    return boundary


class _Parts:
    """What the parser has found so far. It calls back in the middle of a chunk, where nothing can be awaited."""

    def __init__(self) -> None:
        self.form = Form()
        self.complete = False
        self._pieces: list[bytes] = []
        self._count = 0
        self._name = ""
        self._is_file = False
        self._field = bytearray()
        self._header_name = b""
        self._header_value = b""
        self._disposition = b""

    def taken(self) -> list[bytes]:
        """The file's bytes that came with the last chunk."""
        pieces, self._pieces = self._pieces, []
        return pieces

    def callbacks(self) -> "MultipartCallbacks":
        return {
            "on_part_begin": self._begin,
            "on_header_field": self._on_header_name,
            "on_header_value": self._on_header_value,
            "on_header_end": self._on_header_end,
            "on_headers_finished": self._on_headers,
            "on_part_data": self._on_data,
            "on_part_end": self._end,
            "on_end": self._on_end,
        }

    def _begin(self) -> None:
        self._count += 1
        if self._count > _MOST_PARTS:
            raise InvalidRequest(f"The form has more than {_MOST_PARTS} fields.")
        self._field, self._disposition = bytearray(), b""

    def _on_header_name(self, data: bytes, start: int, end: int) -> None:
        self._header_name += data[start:end]

    def _on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._header_value += data[start:end]

    def _on_header_end(self) -> None:
        if self._header_name.lower() == b"content-disposition":
            self._disposition = self._header_value
        self._header_name = self._header_value = b""

    def _on_headers(self) -> None:
        _, options = parse_options_header(self._disposition)
        if b"name" not in options:
            raise InvalidRequest("A field of the form has no name.")
        self._name = options[b"name"].decode("utf-8", "replace")
        self._is_file = b"filename" in options
        if not self._is_file:
            return
        if self._name != _FILE_FIELD or self.form.has_file:
            raise InvalidRequest("Send one file, in the field `file`.", param=_FILE_FIELD)
        self.form.has_file = True
        given = options[b"filename"].decode("utf-8", "replace")
        self.form.filename = "".join(filter(str.isprintable, given))[:_LONGEST_FILENAME]

    def _on_data(self, data: bytes, start: int, end: int) -> None:
        if self._is_file:
            self._pieces.append(data[start:end])
            return
        self._field += data[start:end]
        if len(self._field) > _LONGEST_FIELD_BYTES:
            raise InvalidRequest(f"The field `{self._name}` is too long.", param=self._name)

    def _end(self) -> None:
        if not self._is_file:
            self.form.fields[self._name] = self._field.decode("utf-8", "replace")

    def _on_end(self) -> None:
        self.complete = True
