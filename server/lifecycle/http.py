"""The HTTP server of a process."""

import asyncio
import contextlib
import socket
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import uvicorn

from server.lifecycle.accepting import Acceptor, Counted, Shares
from server.settings import Settings
from server.store.beats import until_beat

# Longer than proxies keep theirs (nginx: 60 s): a connection that both may close is closed under a request some day.
_KEEP_ALIVE_S: Final = 75
_HTTP_STOP_TIMEOUT_S: Final = 5
# How old the `date` of an answer may be.
_TICK_S: Final = 1.0


@dataclass(frozen=True, slots=True)
class Share:
    """Front-end `index` of several that listen on the same socket."""

    shares: Shares
    index: int


class HttpServer(uvicorn.Server):
    """uvicorn without its signal handlers: a signal drains first and stops HTTP last.

    uvicorn itself looks ten times a second whether it is to end. This one is told, and wakes up for the clock alone.
    With a `share` it takes no more connections than the other front-ends.
    """

    def __init__(self, config: uvicorn.Config, share: Share | None = None) -> None:
        super().__init__(config)
        self._stopping = asyncio.Event()
        self._share = share

    def stop(self) -> None:
        """Take no more connections, and let `serve` return when those that are open have ended."""
        self.should_exit = True
        self._stopping.set()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to listen."""
        if (share := self._share) is None:
            await super().startup(sockets)
            return
        await super().startup([])
        self.server_state.connections = Counted(lambda held: share.shares.tell(share.index, held))
        for listener in sockets or ():
            acceptor: Any = Acceptor(listener, share.shares, share.index, self._protocol, self.config.ssl)
            self.servers.append(acceptor)

    def _protocol(self) -> asyncio.Protocol:
        kind: Any = self.config.http_protocol_class
        made: asyncio.Protocol = kind(self.config, self.server_state, self.lifespan.state)
        return made

    async def main_loop(self) -> None:
        """Keep the headers of every answer up to date until told to stop."""
        while not await self.on_tick(0):  # each of uvicorn's tens of ticks begins with the one that sets them
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(until_beat(_TICK_S)):
                    await self._stopping.wait()

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield


def public_config(settings: Settings, application: Any) -> uvicorn.Config:
    """For the address that clients call."""
    return _config(
        application,
        settings.forwarded_allow_ips,
        ssl_keyfile=settings.ssl_keyfile,
        ssl_certfile=settings.ssl_certfile,
        ssl_ca_certs=settings.ssl_ca_certs,
        ssl_cert_reqs=settings.ssl_cert_reqs,
        ssl_ciphers=settings.ssl_ciphers,
    )


def private_config(application: Any) -> uvicorn.Config:
    """For a socket that only the server's own processes can open: what they say of the client is true."""
    return _config(application, ("*",))


def _config(application: Any, forwarded_allow_ips: Sequence[str], **tls: Any) -> uvicorn.Config:
    return uvicorn.Config(
        application,
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=_KEEP_ALIVE_S,
        timeout_graceful_shutdown=_HTTP_STOP_TIMEOUT_S,
        forwarded_allow_ips=list(forwarded_allow_ips),
        **tls,
    )
