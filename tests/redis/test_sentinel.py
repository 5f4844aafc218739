"""A service behind Sentinels: its primary is found, and a failover is followed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from demo_tasks.servers import Workspace
from demo_tasks.servers.binaries import valkey_program
from tests.redis.sentinels import Service, service
from tests.support.services import require_program
from workerpools import FailureKind, WorkerPools, classify
from workerpools.redis import AsyncRedisClient, RedisClient
from workerpools.testing import run_attempt


@pytest.fixture(scope="module")
def shop(workspace: Workspace) -> Iterator[Service]:
    require_program(valkey_program)
    with service(workspace) as made:
        yield made


@pytest.mark.slow
@pytest.mark.parametrize(
    ("scheme", "declared"), [("redis", RedisClient), ("valkey", RedisClient), ("redis", AsyncRedisClient)]
)
def test_a_failover_is_followed(shop: Service, scheme: str, declared: Any) -> None:
    """A write reaches the new primary, and is done once; what the old one refuses is done by the replay."""
    with WorkerPools() as pools:
        password = shop.sentinel.password
        cache = pools.add(declared(shop.url(scheme), sentinel_credentials=password), name="cache")
        key = f"failover-{scheme}-{declared.__name__}"
        assert run_attempt(lambda: cache.get().incr(key)) == 1
        before = shop.primary()
        after = shop.fail_over()
        assert after is not before
        assert run_attempt(lambda: cache.get().incr(key)) == 2
        assert shop.client(after).get(key) == b"2"
        assert password not in repr((cache, cache.get(), cache.adapter.describe()))


@pytest.mark.parametrize("scheme", ["redis", "valkey"])
def test_a_replica_that_was_the_primary_is_left(shop: Service, scheme: str) -> None:
    """Its connections need not end: it refuses to write, has done nothing, and the replay asks Sentinel again."""
    with WorkerPools() as pools:
        cache = pools.add(RedisClient(shop.url(scheme), sentinel_credentials=shop.sentinel.password), name="cache")
        key = f"left-{scheme}"
        run_attempt(lambda: cache.get().get(key))
        replica = next(each for each in shop.members if each is not shop.primary())
        # As if the open connection led to what is a replica now.
        pool = cache.get().connection_pool
        connection = pool.get_connection("_")
        connection.disconnect()
        sentinel, pool.sentinel = pool.sentinel, None
        connection.host, connection.port = replica.host, replica.port
        connection.connect()
        pool.sentinel = sentinel
        pool.release(connection)
        bodies = []

        def body() -> object:
            bodies.append(True)
            return cache.get().incr(key)

        assert run_attempt(body) == 1
        assert len(bodies) == 2
        (stats,) = pools.stats().totals()
        assert (stats.value("failures", "stale"), stats.in_use) == (1, 0)


@pytest.mark.parametrize("declared", [RedisClient, AsyncRedisClient])
def test_a_service_that_no_sentinel_knows_is_unavailable(shop: Service, declared: Any) -> None:
    """A Sentinel may learn of it yet."""
    with WorkerPools() as pools:
        url = shop.url(path="unknown/0")
        cache = pools.add(declared(url, sentinel_credentials=shop.sentinel.password), name="cache")
        with pytest.raises(Exception, match="no Sentinel names a primary of 'unknown'") as caught:
            run_attempt(lambda: cache.get().incr("n"))
        failure = classify(caught.value)
        assert failure is not None
        assert failure.kind is FailureKind.UNAVAILABLE
