"""What goes into an engine operation and what comes out, free of HTTP machinery and of vLLM."""

from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from server.policy.refusals import Refusal

Frame = str | bytes


@dataclass(frozen=True, slots=True)
class Call:
    """One client call. `route` is the path template; `headers` are lower-case pairs as ASGI gives them."""

    method: str
    route: str
    headers: tuple[tuple[bytes, bytes], ...] = ()
    path_params: Mapping[str, str] = field(default_factory=dict)
    query: Mapping[str, str] = field(default_factory=dict)
    body: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Reply:
    """A complete answer."""

    body: bytes
    media_type: str
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class StreamReply:
    """An answer in frames. Whoever iterates `frames` closes it.

    `refusal_in` tells whether a frame is an error that vLLM wrapped into the stream.
    """

    frames: AsyncGenerator[Frame, None]
    media_type: str
    refusal_in: Callable[[Frame], Refusal | None]
