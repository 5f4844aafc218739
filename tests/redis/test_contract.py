"""The contract of adapters, on a real server, with both drivers, plain and over TLS."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest
import redis

from demo_tasks.servers import ValkeyServer
from workerpools.redis import AsyncRedisClient, RedisClient
from workerpools.testing import AdapterContract

COUNT = "contract"


class _Contract(AdapterContract):
    answer_to = b"INCR"
    scheme = "redis"

    @pytest.fixture
    def server(self, valkey_server: ValkeyServer) -> Iterator[tuple[str, int]]:
        running = valkey_server.start()
        with closing(redis.Redis.from_url(running.url())) as self.own:
            self.own.delete(COUNT)
            self.secret = running.password
            yield running.host, running.port

    def adapter(self, host: str, port: int) -> RedisClient:
        return RedisClient(f"{self.scheme}://:{self.secret}@{host}:{port}/0")

    def read(self, value: Any) -> object:
        return value.get(COUNT)

    def write(self, value: Any) -> object:
        return value.incr(COUNT)

    def written(self) -> int:
        return int(self.own.get(COUNT) or 0)

    def hold(self, value: Any) -> object:
        pipeline = value.pipeline()
        pipeline.watch(COUNT)
        return pipeline


class TestRedis(_Contract):
    """redis-py."""


class TestValkey(_Contract):
    """valkey-py."""

    scheme = "valkey"


class _AsyncContract(_Contract):
    def adapter(self, host: str, port: int) -> Any:
        return AsyncRedisClient(f"{self.scheme}://:{self.secret}@{host}:{port}/0")

    async def read(self, value: Any) -> object:
        return await value.get(COUNT)

    async def write(self, value: Any) -> object:
        return await value.incr(COUNT)

    async def hold(self, value: Any) -> object:
        pipeline = value.pipeline()
        await pipeline.watch(COUNT)
        return pipeline


class TestAsyncRedis(_AsyncContract):
    """redis-py, on the event loop."""


class TestAsyncValkey(_AsyncContract):
    """valkey-py, on the event loop."""

    scheme = "valkey"
