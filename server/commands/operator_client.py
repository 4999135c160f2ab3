"""The operator API as seen from the command line."""

import functools
from collections.abc import Callable
from http import HTTPStatus
from pathlib import Path
from typing import Any, Final

import click
import httpx
from platformdirs import user_data_path

from server.store.operator_key import OperatorKeyUnavailable, read_operator_key

_DEFAULT_URL: Final = "http://127.0.0.1:8000"
_TIMEOUT_S: Final = 30.0


class OperatorClient:
    """Calls one server. What goes wrong ends the command with a sentence."""

    def __init__(self, url: str, key: str | None, data_folder: Path | None) -> None:
        self._url = url.rstrip("/").removesuffix("/v1")
        self._key = key
        self._folder = data_folder or user_data_path("tidegate")

    def call(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """The answer's JSON object. Raises `click.ClickException`."""
        try:
            answer = httpx.request(method, f"{self._url}{path}", json=body, headers=self._headers(), timeout=_TIMEOUT_S)
        except (httpx.TransportError, httpx.InvalidURL) as error:
            raise click.ClickException(
                f"No server answers at {self._url} ({error}). Start one with `tidegate serve`, or name it with --url."
            ) from error
        if answer.is_success:
            return self._object(answer)
        raise CallRefused(answer.status_code, self._reason(answer))

    def _headers(self) -> dict[str, str]:
        try:
            key = self._key or read_operator_key(self._folder)
        except OperatorKeyUnavailable as error:
            raise click.ClickException(f"{error} Give the key with --operator-key.") from error
        if key is None:
            raise click.ClickException(
                f"There is no operator key in {self._folder}. Give it with --operator-key or TIDEGATE_OPERATOR_KEY, or "
                "name the server's data folder with --data-folder."
            )
        return {"authorization": f"Bearer {key}"}

    def _object(self, answer: httpx.Response) -> dict[str, Any]:
        try:
            body = answer.json()
        except ValueError as error:
            raise click.ClickException(f"What answers at {self._url} is not Tidegate.") from error
        if not isinstance(body, dict):
            raise click.ClickException(f"What answers at {self._url} is not Tidegate.")
        return body

    def _reason(self, answer: httpx.Response) -> str:
        error = self._object(answer).get("error")
        message = str(error.get("message")) if isinstance(error, dict) else answer.text
        if answer.status_code == HTTPStatus.UNAUTHORIZED:
            return f"The server at {self._url} does not take this operator key."
        return message


class CallRefused(click.ClickException):
    """The server said no; `status` is its HTTP status."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def operator_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options with which it finds its server, and that server as `client`."""

    @click.option("--url", default=_DEFAULT_URL, show_default=True, help="Address of the server.")
    @click.option(
        "--operator-key", envvar="TIDEGATE_OPERATOR_KEY", help="Operator key [default: the one in the data folder]."
    )
    @click.option(
        "--data-folder",
        type=click.Path(path_type=Path),
        envvar="TIDEGATE_DATA_FOLDER",
        help="Folder where the server keeps the operator key, if it is not the default one.",
    )
    @functools.wraps(command)
    def with_client(url: str, operator_key: str | None, data_folder: Path | None, **given: Any) -> None:
        command(client=OperatorClient(url, operator_key, data_folder), **given)

    return with_client
