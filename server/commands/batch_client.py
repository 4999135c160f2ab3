"""The Files and Batches API as seen from the command line."""

from collections.abc import Iterator
from http import HTTPStatus
from pathlib import Path
from typing import Any, Final

import click
import httpx

_TIMEOUT_S: Final = 60.0
_UPLOAD_TIMEOUT_S: Final = 600.0
_CHUNK_BYTES: Final = 1 << 20


class BatchClient:
    """Calls one server. What goes wrong ends the command with a sentence."""

    def __init__(self, url: str, key: str | None, uds: Path | None = None) -> None:
        self._url = url.rstrip("/").removesuffix("/v1")
        transport = httpx.HTTPTransport(uds=str(uds)) if uds is not None else None
        headers = {"authorization": f"Bearer {key}"} if key else {}
        self._http = httpx.Client(
            base_url=self._url, headers=headers, timeout=_TIMEOUT_S, transport=transport, trust_env=uds is None
        )

    def close(self) -> None:
        self._http.close()

    def model(self) -> str:
        """The first model that is served."""
        cards = self._call("GET", "/v1/models")["data"]
        if not cards:
            raise click.ClickException(f"The server at {self._url} serves no model to you.")
        return str(cards[0]["id"])

    def upload(self, path: Path) -> str:
        """Send a file as a batch's input. Returns its id."""
        with path.open("rb") as body:
            answer = self._call(
                "POST", "/v1/files", files={"file": (path.name, body)}, data={"purpose": "batch"},
                timeout=_UPLOAD_TIMEOUT_S,
            )  # fmt: skip
        return str(answer["id"])

    def create(self, file_id: str, endpoint: str) -> dict[str, Any]:
        body = {"input_file_id": file_id, "endpoint": endpoint, "completion_window": "24h"}
        return self._call("POST", "/v1/batches", json=body)

    def batch(self, batch_id: str) -> dict[str, Any] | None:
        """A batch as it is now; None where the server does not know it."""
        try:
            return self._call("GET", f"/v1/batches/{batch_id}")
        except _Refused as refused:
            if refused.status == HTTPStatus.NOT_FOUND:
                return None
            raise

    def lines(self, file_id: str | None) -> Iterator[bytes]:
        """The lines of a file, without their ends; none where there is no file."""
        if file_id is None:
            return
        rest = b""
        with self._http.stream("GET", f"/v1/files/{file_id}/content") as answer:
            if not answer.is_success:
                answer.read()
                raise _refused(answer)
            for chunk in answer.iter_bytes(_CHUNK_BYTES):
                *lines, rest = (rest + chunk).split(b"\n")
                yield from lines
        if rest:
            yield rest

    def _call(self, method: str, path: str, **given: Any) -> dict[str, Any]:
        try:
            answer = self._http.request(method, path, **given)
        except (httpx.TransportError, httpx.InvalidURL) as error:
            raise Unreachable(
                f"No server answers at {self._url} ({error}). Start one with `tidegate serve`, name it with --url, or "
                "run with --local."
            ) from error
        if not answer.is_success:
            raise _refused(answer)
        body: dict[str, Any] = answer.json()
        return body


class Unreachable(click.ClickException):
    """Nobody answers."""


class _Refused(click.ClickException):
    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def _refused(answer: httpx.Response) -> _Refused:
    try:
        message = str(answer.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        message = f"The server answered {answer.status_code}, and not as Tidegate does."
    return _Refused(answer.status_code, message)
