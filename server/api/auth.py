"""API keys: who may call. With no key configured the server is open."""

import hashlib
import secrets
from collections.abc import Sequence

from fastapi import Request

from server.policy.refusals import InvalidApiKey


class ApiKeys:
    """The configured keys, kept as digests and compared in constant time."""

    def __init__(self, keys: Sequence[str]) -> None:
        self._digests = tuple(_digest(key) for key in keys)

    async def __call__(self, request: Request) -> None:
        """A FastAPI dependency. Raises `InvalidApiKey`."""
        if not self._digests:
            return
        given = _digest(presented_key(request))
        matches = [secrets.compare_digest(given, digest) for digest in self._digests]  # all of them, every time
        if not any(matches):
            raise InvalidApiKey("Incorrect API key provided. Send a valid key as `Authorization: Bearer <key>`.")


def presented_key(request: Request) -> str:
    """The bearer token, or Anthropic's `x-api-key`; empty when there is none."""
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return token.strip()
    return request.headers.get("x-api-key", "")


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()
