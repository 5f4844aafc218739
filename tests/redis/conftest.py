"""A server, a proxy before it, and clients through the proxy."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest
import redis

from demo_tasks.servers import ValkeyServer
from workerpools import WorkerPools
from workerpools.adapter import current
from workerpools.redis import RedisClient
from workerpools.testing import TcpProxy, run_attempt


class Stage:
    """A database of a server, as the test sees it and as the clients do, through a proxy.

    Attributes:
        own: The test's own client, past the proxy.
        proxy: The proxy.
        pools: What the clients are declared with.
    """

    def __init__(self, server: ValkeyServer, scheme: str, proxy: TcpProxy) -> None:
        self.own = redis.Redis.from_url(server.url())
        self.proxy = proxy
        self.pools = WorkerPools()
        self.scheme = scheme
        self._address = f":{server.password}@{proxy.host}:{proxy.port}/0"

    def declare(self, **options: Any) -> Any:
        """Declare a client."""
        name = options.pop("name", "cache")
        return self.pools.add(RedisClient(f"{self.scheme}://{self._address}", **options), name=name)

    def stats(self) -> Any:
        """The figures of the one resource."""
        (stats,) = self.pools.stats().totals()
        return stats

    def close(self) -> None:
        """Close the clients."""
        self.pools.close(1.0)
        self.own.close()


@pytest.fixture(params=["redis", "valkey"])
def stage(request: pytest.FixtureRequest, valkey_server: ValkeyServer) -> Iterator[Stage]:
    """An empty database, with each driver."""
    server = valkey_server.start()
    with TcpProxy(server.host, server.port) as proxy, closing(Stage(server, request.param, proxy)) as made:
        made.own.flushdb()
        yield made


def effects_of(body: Any) -> list[str]:
    """Run a body, and return the effects that count in the end."""
    found: list[str] = []

    def attempt() -> None:
        body()
        running = current()
        assert running is not None
        found.extend(str(effect) for effect in running.effects)

    run_attempt(attempt)
    return found
