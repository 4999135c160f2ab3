"""Every form of URL, against real servers: plain, TLS, Sentinel, Cluster."""

import contextlib
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import aclosing, contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest
from redis import Redis as SyncRedis
from redis.asyncio import Redis, RedisCluster, SSLConnection
from redis.asyncio.sentinel import SentinelManagedSSLConnection
from redis.exceptions import RedisError

from server.policy.limits import Cost, Scope
from server.policy.tenants import Key, Limits, Tenant
from server.store.connection import BadRedisUrl, connect
from server.store.limit_script import LimitScript
from server.store.redis_server import find_program
from server.store.tenants import TenantRecords
from server.store.usage import TokenCounts, UsageBook, UsageEntry
from tests.store.running_redis import until

pytestmark = pytest.mark.anyio

UP_WITHIN_S = 20.0
PATIENT_S = 5.0


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
    return port


@contextmanager
def running(folder: Path, *options: str, client: SyncRedis) -> Iterator[SyncRedis]:
    """A server of the kind that the options make it, and its client once it answers."""
    process = subprocess.Popen(
        [str(find_program()), *options, "--dir", str(folder), "--daemonize", "no"],
        stdout=subprocess.DEVNULL,
    )
    try:
        with contextlib.closing(client):
            until_up(client)
            yield client
    finally:
        process.kill()
        process.wait()


def until_up(client: SyncRedis) -> None:
    deadline_s = time.monotonic() + UP_WITHIN_S
    while True:
        try:
            client.ping()
        except RedisError:
            assert time.monotonic() < deadline_s
            time.sleep(0.05)
        else:
            return


async def serves(url: str) -> None:
    """Limits and usage work through this URL."""
    client = connect(url, PATIENT_S)
    async with aclosing(client):
        script = LimitScript(client)
        scopes = [
            Scope("tenant", "{team}", Limits(tokens_per_minute=100, concurrency=2)),
            Scope("end_user", "{team}:user:a", Limits(tokens_per_minute=50)),
        ]
        assert (await script.charge(scopes, Cost(1, 50), "a")).refused is None
        assert (await script.charge(scopes, Cost(1, 50), "b")).refused is not None
        at = UsageEntry("team", "m", TokenCounts(1, 2, 0, 3), now())
        await script.settle(scopes, Cost(0, -50), "a", at, "one")
        assert (await script.charge(scopes, Cost(1, 50), "b")).refused is None
        assert await script.alive("a-replica", 60_000_000) == 1
        assert (await UsageBook(client).read("team", at.at)).month == {"m": TokenCounts(1, 2, 0, 3)}
        await keeps_tenants(TenantRecords(client))


async def keeps_tenants(records: TenantRecords) -> None:
    """Steps of several commands work through this URL as well."""
    assert await records.create(Tenant("team"))
    key = Key("an-id", "team", 1)
    assert await records.add_key(key, "a-digest")
    await records.expire_keys("team", [key], 5)
    assert await records.keys_of("team") == [replace(key, expires_s=5)]
    await records.drop_keys("team", ["an-id"])
    assert await records.find_key("a-digest") is None
    await records.delete("team")
    assert await records.all() == []


def now() -> datetime:
    return datetime(2026, 11, 22, tzinfo=UTC)


async def test_a_server_with_a_password_and_one_of_its_databases(tmp_path: Path) -> None:
    port = free_port()
    with running(tmp_path, "--port", str(port), "--requirepass", "p@ss", client=SyncRedis(port=port, password="p@ss")):
        await serves(f"redis://:p%40ss@127.0.0.1:{port}/1")


async def test_a_cluster(tmp_path: Path) -> None:
    port = free_port()
    options = ("--port", str(port), "--cluster-enabled", "yes")
    with running(tmp_path, *options, client=SyncRedis(port=port)) as client:
        client.execute_command("CLUSTER", "ADDSLOTSRANGE", 0, 16383)  # type: ignore[no-untyped-call]
        await until(lambda: b"cluster_state:ok" in client.execute_command("CLUSTER", "INFO"))  # type: ignore[no-untyped-call]
        await serves(f"redis+cluster://127.0.0.1:{port},127.0.0.1:{free_port()}")


async def test_a_service_behind_sentinels(tmp_path: Path) -> None:
    port, sentinel_port = free_port(), free_port()
    file = tmp_path / "sentinel.conf"
    file.write_text(f"port {sentinel_port}\nsentinel monitor tidegate 127.0.0.1 {port} 1\n")
    with (
        running(tmp_path, "--port", str(port), client=SyncRedis(port=port)),
        running(tmp_path, str(file), "--sentinel", client=SyncRedis(port=sentinel_port)),
    ):
        await serves(f"redis+sentinel://127.0.0.1:{free_port()},127.0.0.1:{sentinel_port}/tidegate/2")


def test_tls_is_for_every_kind_of_url() -> None:
    plain = connect("rediss://redis.example.org/1")
    behind = connect("rediss+sentinel://user:secret@redis.example.org/tidegate")
    assert isinstance(plain, Redis)
    assert isinstance(behind, Redis)
    assert plain.connection_pool.connection_class is SSLConnection
    assert behind.connection_pool.connection_class is SentinelManagedSSLConnection
    assert behind.connection_pool.connection_kwargs["username"] == "user"
    cluster = connect("rediss+cluster://redis.example.org")
    assert isinstance(cluster, RedisCluster)
    assert cluster.connection_kwargs["connection_class"] is SSLConnection


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("localhost:6379", "unknown form"),
        ("http://localhost", "unknown form"),
        ("redis+sentinel://localhost:26379", "names no service"),
        ("redis+cluster://", "names no host"),
        ("redis+sentinel://localhost:26379/service/first", "not valid"),
        ("redis://localhost:port", "not valid"),
    ],
)
def test_a_url_of_no_known_form_is_a_sentence(url: str, words: str) -> None:
    with pytest.raises(BadRedisUrl, match=words):
        connect(url)
