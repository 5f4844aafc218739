"""Tests for adapters: :class:`AdapterContract` and its building blocks. Requires pytest.

::

    class TestMemcached(AdapterContract):
        @pytest.fixture
        def server(self, memcached: Server) -> tuple[str, int]:
            return memcached.host, memcached.port

        def adapter(self, host: str, port: int) -> Memcached:
            return Memcached(host, port)

        def read(self, value: PooledClient) -> object:
            return value.get("key")
"""

from __future__ import annotations

import pytest

from workerpools.testing._proxy import TcpProxy

# Before the import, so that failed assertions show their operands.
pytest.register_assert_rewrite("workerpools.testing._contract")

from workerpools.testing._contract import AdapterContract, run_attempt  # noqa: E402

__all__ = ["AdapterContract", "TcpProxy", "run_attempt"]
