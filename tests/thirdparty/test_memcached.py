"""An adapter that is written from the documentation alone is as good as the built-in ones."""

from __future__ import annotations

import pytest
from pymemcache.client.base import PooledClient

from tests.support.memcached import MemcachedServer
from tests.thirdparty.memcached import Memcached
from workerpools.testing import AdapterContract


class TestContract(AdapterContract):
    """The whole of it."""

    @pytest.fixture
    def server(self, memcached: MemcachedServer) -> tuple[str, int]:
        memcached.ask("flush_all")
        assert memcached.ask("set count 0 0 1\r\n0").startswith("STORED")
        self.memcached = memcached
        return memcached.host, memcached.port

    def adapter(self, host: str, port: int) -> Memcached:
        return Memcached(host, port)

    def read(self, value: PooledClient) -> object:
        return value.get("key")

    def write(self, value: PooledClient) -> object:
        return value.incr("count", 1)

    def written(self) -> int:
        return int(self.memcached.ask("get count").splitlines()[1])

    def hold(self, value: PooledClient) -> object:
        connection = value.client_pool.get()
        connection.get("key")
        return connection
