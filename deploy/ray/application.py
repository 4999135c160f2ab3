"""The Ray Serve application that `tidegate.yaml` and `many-nodes.yaml` name, for `serve deploy` or `serve run`.

A replica is a whole Tidegate server; Ray Serve brings requests to it, watches it, and sets the number of replicas.
"""

from typing import Any, Final

from pydantic import BaseModel, ConfigDict, Field
from ray import serve
from starlette.types import ASGIApp

from deploy.ray.replica import Server, settings_for_ray

# Ray holds what is above it back, out of sight. Requests wait in our queue, by class, fairness and deadline.
_MOST_REQUESTS: Final = 100_000


class Arguments(BaseModel):
    """What the application takes in `args`."""

    model_config = ConfigDict(extra="forbid")

    flags: list[str] = Field(default_factory=list, description="What follows `tidegate serve`, word by word.")


class Replica:
    """What Ray starts, calls, watches and stops."""

    def __init__(self, flags: list[str]) -> None:
        """Raises `CannotServe`."""
        self._server = Server(*settings_for_ray(flags))

    async def __serve_build_asgi_app__(self) -> ASGIApp:
        """What Ray calls for each request, once the model serves. Raises `CannotServe`."""
        await self._server.loaded()
        return self._server.asgi

    async def check_health(self) -> None:
        """A replica whose server has ended is replaced. Raises `CannotServe`."""
        self._server.check()

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """What `deploy.ray.scaling:QueueWait` decides by."""
        return self._server.wait_counts()

    async def __del__(self) -> None:
        """Called when no request is left here, or when `graceful_shutdown_timeout_s` is over."""
        if hasattr(self, "_server"):
            await self._server.stop()


Tidegate: Any = serve.deployment(name="Tidegate", max_ongoing_requests=_MOST_REQUESTS)(serve.ingress()(Replica))


def build(arguments: Arguments) -> serve.Application:
    """The application, for `import_path` in a configuration file."""
    return Tidegate.bind(arguments.flags)
