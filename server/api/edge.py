"""Guards the edge where no tenant is known yet: failed logins, the model list and the operator's routes.

Counts are kept in memory for each client address, and start anew with each minute. Tenants have limits of their own.
"""

import hashlib
import ipaddress
import math
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

from cachetools import LRUCache
from limits import RateLimitItemPerMinute
from slowapi import Limiter
from slowapi.errors import RateLimitExceeded
from starlette.requests import Request

from server.policy.refusals import RateLimited

_FAILED_LOGINS: Final = "failed-logins"
_REMEMBERED_LOGINS: Final = 20_000
# Who has one IPv6 address has at least 2^64 of them.
_IPV6_PREFIX: Final = 64
_LOCAL: Final = "local"
_WINDOW_S: Final = 60.0


@dataclass(frozen=True, slots=True)
class EdgeLimits:
    """Per client address and minute."""

    failed_logins: int
    model_lists: int
    operator_requests: int


class Edge:
    """One process's counts."""

    def __init__(self, limits: EdgeLimits) -> None:
        self._limiter = Limiter(key_func=client_address, strategy="fixed-window", storage_uri="memory://")
        self._logins = RateLimitItemPerMinute(limits.failed_logins)
        self._worked: LRUCache[tuple[str, bytes], bool] = LRUCache(_REMEMBERED_LOGINS)
        self._failures_end_s = -math.inf  # on the clock of `time.monotonic`
        self.model_list = self._guard(limits.model_lists, "model lists")
        self.operator_request = self._guard(limits.operator_requests, "operator requests")

    def before_login(self, request: Request, key: str) -> None:
        """Raise `RateLimited` for an address with too many failed logins.

        A key that has worked from there passes: one program with a wrong key must not lock out its neighbours behind
        the same proxy.
        """
        if time.monotonic() > self._failures_end_s:
            return
        address = client_address(request)
        if (address, _fingerprint(key)) in self._worked:
            return
        if not self._limiter.limiter.test(self._logins, _FAILED_LOGINS, address):
            raise self._too_many("failed logins", self._logins, _FAILED_LOGINS, address)

    def login_worked(self, request: Request, key: str) -> None:
        self._worked[client_address(request), _fingerprint(key)] = True

    def login_failed(self, request: Request) -> None:
        self._failures_end_s = time.monotonic() + _WINDOW_S
        self._limiter.limiter.hit(self._logins, _FAILED_LOGINS, client_address(request))

    def _guard(self, per_minute: int, what: str) -> Callable[[Request], Awaitable[None]]:
        """A dependency that raises `RateLimited`."""

        async def uncounted(request: Request) -> None:
            del request

        uncounted.__name__ = what  # slowapi keeps its limits by the name of the function
        counted = self._limiter.shared_limit(f"{per_minute}/minute", scope=what)(uncounted)

        async def guard(request: Request) -> None:
            try:
                await counted(request=request)
            except RateLimitExceeded as error:
                item, names = request.state.view_rate_limit
                raise self._too_many(what, item, *names) from error

        return guard

    def _too_many(self, what: str, item: RateLimitItemPerMinute, *names: str) -> RateLimited:
        ends_s = self._limiter.limiter.get_window_stats(item, *names).reset_time
        wait_s = max(ends_s - time.time(), 1.0)
        message = f"Too many {what} from your address. Please try again in {wait_s:.0f} seconds."
        return RateLimited(message, retry_after_s=wait_s)


def client_address(request: Request) -> str:
    """The address that counts as one client: IPv4 as it is, of IPv6 the network."""
    client = request.client
    return _LOCAL if client is None or not client.host else _network(client.host)


@lru_cache(_REMEMBERED_LOGINS)
def _network(host: str) -> str:
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is None:
        return str(ipaddress.IPv6Network((int(address), _IPV6_PREFIX), strict=False))
    return str(getattr(address, "ipv4_mapped", None) or address)


def _fingerprint(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
