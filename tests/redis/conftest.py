"""A server, a proxy before it, and clients through the proxy."""

from __future__ import annotations

import contextlib
import inspect
import re
from collections.abc import AsyncIterator, Iterator
from contextlib import closing
from typing import Any

import pytest
import redis

from demo_tasks.servers import ValkeyServer
from tests.support.stand import wait_until
from workerpools import WorkerPools
from workerpools.adapter import current, run_coroutine
from workerpools.redis import AsyncRedisClient, RedisClient
from workerpools.testing import TcpProxy, run_attempt


class Bridged:
    """What an asynchronous client gives, for tests that are written for a synchronous one: each call is awaited."""

    def __init__(self, value: Any) -> None:
        object.__setattr__(self, "_value", value)

    def __getattr__(self, name: str) -> Any:
        return bridged(getattr(self._value, name))

    def __setattr__(self, name: str, value: object) -> None:
        setattr(self._value, name, value)

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        given = [each._value if isinstance(each, Bridged) else each for each in arguments]

        async def call() -> Any:
            result = self._value(*given, **options)
            return await result if inspect.iscoroutine(result) else result

        return bridged(call())

    def __enter__(self) -> Any:
        return bridged(self._value.__aenter__())

    def __exit__(self, *error: object) -> None:
        bridged(self._value.__aexit__(*error))

    def __iter__(self) -> Iterator[Any]:
        async def step() -> list[Any]:
            return [each async for each in _first(self._value)]

        while found := bridged(step()):
            yield bridged(found[0])

    def __hash__(self) -> int:
        return hash(self._value)


async def _first(values: Any) -> AsyncIterator[Any]:
    with contextlib.suppress(StopAsyncIteration):
        yield await values.__anext__()


def bridged(value: Any) -> Any:
    """Return what a call has given, awaited where it is to be, in the place of what only a coroutine can use."""
    if inspect.iscoroutine(value):
        value = run_coroutine(value)
    if inspect.isasyncgen(value):
        return Bridged(value)
    own = type(value).__module__.partition(".")[0] in ("redis", "valkey", "workerpools")
    return Bridged(value) if (own and not isinstance(value, BaseException)) or callable(value) else value


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
        self.scheme, _, kind = scheme.partition(" ")
        self.is_async = bool(kind)
        self._address = f":{server.password}@{proxy.host}:{proxy.port}/0"

    def url(self, port: int, number: int = 0) -> str:
        """Return the address of a database of the server by way of another port."""
        return re.sub(r":\d+/0$", f":{port}/{number}", f"{self.scheme}://{self._address}")

    def declare(self, **options: Any) -> Any:
        """Declare a client."""
        return self.add(f"{self.scheme}://{self._address}", **options)

    def add(self, url: str, *, name: str = "cache", **options: Any) -> Any:
        """Declare a client of another server."""
        if self.is_async:
            return Bridged(self.pools.add(AsyncRedisClient(url, **options), name=name))
        return self.pools.add(RedisClient(url, **options), name=name)

    def stats(self) -> Any:
        """The figures of the one resource."""
        (stats,) = self.pools.stats().totals()
        return stats

    def close(self) -> None:
        """Close the clients."""
        self.pools.close(1.0)
        if self.is_async:
            wait_until(lambda: not any(stats.open for stats in self.pools.stats().totals()), "no connection")
        self.own.close()


@pytest.fixture(params=["redis", "valkey", "redis async", "valkey async"])
def stage(request: pytest.FixtureRequest, valkey_server: ValkeyServer) -> Iterator[Stage]:
    """An empty database, with each driver's synchronous and asynchronous client."""
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
