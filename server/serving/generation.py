"""The story of one generation: the file to read to know what the server does between tokens and outputs."""

from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any, Protocol, TypeVar

from server.policy.refusals import Refusal
from server.serving.requests import OpenRequest, current_request

Output = TypeVar("Output")
Rendered = TypeVar("Rendered")


class EngineDemand(Protocol):
    """What an engine request asks for, in exact tokens."""

    @property
    def prompt_tokens(self) -> int: ...
    @property
    def max_tokens(self) -> int: ...
    @property
    def n(self) -> int: ...


class Generation:
    """What happens at the engine's two seams, for every endpoint alike."""

    async def render(self, messages: list[Any], render: Callable[[list[Any]], Awaitable[Rendered]]) -> Rendered:
        """Seam 1: messages become tokens."""
        return await render(messages)

    async def generate(
        self, demand: EngineDemand, outputs: Callable[[], AsyncGenerator[Output, None]]
    ) -> AsyncGenerator[Output, None]:
        """Seam 2: tokens become outputs. Leaving it closes the engine's generator, which frees its KV blocks."""
        request = current_request() or OpenRequest(request_id="", path="")  # the server's own work has no client
        request.prompt_tokens += demand.prompt_tokens
        running = outputs()
        request.running.add(running)
        try:
            async for output in running:
                request.producing = True
                yield output
        except Refusal as refusal:
            request.refusal = refusal
            raise
        finally:
            await request.close(running)
