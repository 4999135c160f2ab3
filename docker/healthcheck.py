"""The container's health check: exits 0 if the server in it answers chats now. Uses the standard library only."""

import http.client
import os
import socket
import ssl
import sys

TIMEOUT_S = 4.0


def main() -> int:
    """Ask `/health/ready` the way the server listens: over HTTP, TLS or a Unix socket."""
    try:
        connection = _connection()
        connection.request("GET", "/health/ready")
        answer = connection.getresponse()
        print(answer.read().decode(errors="replace"))  # `docker inspect` shows it: the stage of loading, in words
    except (OSError, http.client.HTTPException, ValueError) as error:
        print(f"No answer: {error}")
        return 1
    return 0 if answer.status == http.client.OK else 1


def _connection() -> http.client.HTTPConnection:
    if path := os.environ.get("TIDEGATE_UDS"):
        return _UnixConnection(path)
    port = int(os.environ.get("TIDEGATE_PORT") or 8000)
    if os.environ.get("TIDEGATE_SSL_CERTFILE"):
        # It talks to itself over loopback: the certificate names another host, and its trust is not at stake.
        unchecked = ssl._create_unverified_context()  # noqa: S323
        return http.client.HTTPSConnection("127.0.0.1", port, timeout=TIMEOUT_S, context=unchecked)
    return http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT_S)


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=TIMEOUT_S)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


if __name__ == "__main__":
    sys.exit(main())
