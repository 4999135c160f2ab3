"""What goes into an engine operation and what comes out, free of HTTP machinery and of vLLM."""

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from server.policy.refusals import Refusal

Frame = str | bytes


class Frames(Protocol):
    """An answer's frames, as an async generator gives them."""

    def __aiter__(self) -> AsyncIterator[Frame]: ...

    def __anext__(self) -> Awaitable[Frame]: ...

    def aclose(self) -> Awaitable[None]: ...


# Writes a frame at once; what is left to be awaited before the next one, if its connection is full. Raises what sending
# raises.
Write = Callable[[bytes], Awaitable[None] | None]


class DirectFrames(ABC):
    """Frames that need not all come through `__anext__`."""

    @abstractmethod
    def flow_to(self, write: Write) -> None:
        """Called between two frames, when the last one is sent: frames may be written from now on while the next one
        is awaited."""


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
    """A complete answer. `status` is 200 but for the words of a fallback upstream that are passed on."""

    body: bytes
    media_type: str
    headers: Mapping[str, str] = field(default_factory=dict)
    status: int = 200


@dataclass(frozen=True, slots=True)
class StreamReply:
    """An answer in frames. Whoever iterates `frames` closes it.

    `refusal_in` tells whether a frame is an error that vLLM wrapped into the stream.
    """

    frames: Frames
    media_type: str
    refusal_in: Callable[[Frame], Refusal | None]
