"""One way to reach Redis, whatever stands behind the URL: a server, a socket, TLS, Sentinel or Cluster."""

from typing import Final
from urllib.parse import SplitResult, unquote, urlsplit

from redis.asyncio import Redis, RedisCluster, Sentinel
from redis.asyncio.cluster import ClusterNode
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

Client = Redis | RedisCluster

TIMEOUT_S: Final = 0.05
# What a call raises when Redis does not do it; a timeout of the socket comes as Python's own.
FAILURES: Final = (RedisError, OSError)
_PLAIN_SCHEMES: Final = ("redis", "rediss", "unix")
_SENTINEL: Final = "+sentinel"
_CLUSTER: Final = "+cluster"
_REDIS_PORT: Final = 6379
_SENTINEL_PORT: Final = 26379
_FORMS: Final = (
    "redis://HOST:PORT/DB, rediss://HOST:PORT/DB, unix:///PATH, redis+sentinel://HOST:PORT,HOST:PORT/SERVICE/DB or "
    "redis+cluster://HOST:PORT,HOST:PORT (rediss+… for TLS)"
)


class BadRedisUrl(Exception):
    """A URL of no known form; the message is one sentence for the operator."""


def connect(url: str, timeout_s: float = TIMEOUT_S) -> Client:
    """A client that connects on first use. It waits `timeout_s` for each step and never tries twice: the caller knows
    what to do without Redis. Raises `BadRedisUrl`.

    A connection says nothing about the client, which would cost two more round trips. It speaks RESP2, because with
    RESP3 the client leaves out the check that drops a connection whose server has restarted.
    """
    scheme = urlsplit(url).scheme
    try:
        if scheme in _PLAIN_SCHEMES:
            return Redis.from_url(
                url,
                socket_timeout=timeout_s,
                socket_connect_timeout=timeout_s,
                retry=_no_retry(),
                protocol=2,
                driver_info=None,
            )
        if scheme in ("redis" + _SENTINEL, "rediss" + _SENTINEL):
            return _through_sentinel(urlsplit(url), timeout_s)
        if scheme in ("redis" + _CLUSTER, "rediss" + _CLUSTER):
            return _to_cluster(urlsplit(url), timeout_s)
    except ValueError as error:
        raise BadRedisUrl(f"The Redis URL is not valid: {error}.") from error
    raise BadRedisUrl(f"The Redis URL has an unknown form. Write {_FORMS}.")


def _through_sentinel(url: SplitResult, timeout_s: float) -> Redis:
    """`/SERVICE` or `/SERVICE/DB` after the sentinels. User and password are those of Redis itself."""
    service, _, db = url.path.strip("/").partition("/")
    if not service:
        raise BadRedisUrl("The Redis URL names no service after its sentinels: redis+sentinel://HOST:PORT/SERVICE.")
    sentinels = Sentinel(  # type: ignore[no-untyped-call]
        _hosts(url, _SENTINEL_PORT),
        sentinel_kwargs={
            "socket_timeout": timeout_s,
            "socket_connect_timeout": timeout_s,
            "retry": _no_retry(),
            "protocol": 2,
        },
    )
    master: Redis = sentinels.master_for(
        service,
        db=int(db or 0),
        username=_part(url.username),
        password=_part(url.password),
        ssl=url.scheme.startswith("rediss"),
        socket_timeout=timeout_s,
        socket_connect_timeout=timeout_s,
        retry=_no_retry(),
        protocol=2,
        driver_info=None,
    )
    return master


def _to_cluster(url: SplitResult, timeout_s: float) -> RedisCluster:
    return RedisCluster(
        startup_nodes=[ClusterNode(host, port) for host, port in _hosts(url, _REDIS_PORT)],
        username=_part(url.username),
        password=_part(url.password),
        ssl=url.scheme.startswith("rediss"),
        socket_timeout=timeout_s,
        socket_connect_timeout=timeout_s,
        retry=_no_retry(),
        protocol=2,
        driver_info=None,
    )


def _hosts(url: SplitResult, default_port: int) -> list[tuple[str, int]]:
    """The hosts of a URL that names several, separated by commas."""
    parts = [urlsplit(f"//{host}") for host in url.netloc.rpartition("@")[2].split(",")]
    hosts = [(part.hostname, part.port or default_port) for part in parts]
    if any(not host for host, _ in hosts):
        raise BadRedisUrl("The Redis URL names no host.")
    return [(host, port) for host, port in hosts if host]


def _part(text: str | None) -> str | None:
    return None if text is None else unquote(text)


def _no_retry() -> Retry:
    return Retry(NoBackoff(), 0)
