"""Reads a request's body once, under a byte cap."""

import json
from typing import Any

from starlette.datastructures import Headers
from starlette.types import Receive

from server.policy.refusals import BodyTooLarge, InvalidRequest


class ClientLeft(Exception):
    """The client went away before its body was complete."""


async def read_body(receive: Receive, headers: Headers, max_bytes: int) -> bytes:
    """The whole body. Raises `BodyTooLarge` as soon as the cap is known to be passed, and `ClientLeft`."""
    declared = headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > max_bytes:
        raise _too_large(max_bytes)
    chunks: list[bytes] = []
    size, more = 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientLeft
        chunks.append(message.get("body", b""))
        size += len(chunks[-1])
        if size > max_bytes:
            raise _too_large(max_bytes)
        more = message.get("more_body", False)
    return b"".join(chunks)


def _too_large(max_bytes: int) -> BodyTooLarge:
    return BodyTooLarge(f"The request body is larger than this server accepts ({max_bytes} bytes).")


def parse_json_object(raw: bytes, headers: Headers) -> dict[str, Any]:
    """The body as a JSON object. Raises `InvalidRequest` with the place where the JSON breaks."""
    media_type = headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        raise InvalidRequest("The body must be JSON: send the header `Content-Type: application/json`.")
    try:
        body = json.loads(raw)
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"The body is not valid UTF-8 (byte {error.start}).") from error
    except json.JSONDecodeError as error:
        raise InvalidRequest(f"The body is not valid JSON: {error.msg} at character {error.pos}.") from error
    except ValueError as error:  # a number with more digits than Python reads
        raise InvalidRequest("The body holds a number that is too long.") from error
    except RecursionError as error:
        raise InvalidRequest("The body is nested too deeply.") from error
    if not isinstance(body, dict):
        raise InvalidRequest("The body must be a JSON object.")
    return body
