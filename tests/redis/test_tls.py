"""TLS: certificates are checked, and the context is built once."""

from __future__ import annotations

import ssl
from collections.abc import Iterator
from typing import Any

import pytest

from demo_tasks.servers import ValkeyServer
from tests.support.tls import TlsProxy
from workerpools import FailureKind, WorkerPools, classify
from workerpools.redis import AsyncRedisClient, RedisClient
from workerpools.testing import TcpProxy, run_attempt


@pytest.fixture
def encrypted(valkey_server: ValkeyServer) -> Iterator[TlsProxy]:
    server = valkey_server.start()
    with TlsProxy(server.host, server.port) as proxy:
        yield proxy


@pytest.mark.parametrize("declared", [RedisClient, AsyncRedisClient])
@pytest.mark.parametrize("scheme", ["rediss", "valkeys"])
def test_tls(
    valkey_server: ValkeyServer, encrypted: TlsProxy, scheme: str, declared: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the authority's certificate it works, and dead connections are seen; without it the task is told."""
    built = []
    context = ssl.create_default_context
    monkeypatch.setattr(ssl, "create_default_context", lambda: built.append(True) or context())
    with WorkerPools() as pools, TcpProxy(encrypted.host, encrypted.port) as proxy:
        url = f"{scheme}://:{valkey_server.password}@{proxy.host}:{proxy.port}/0"
        cache = pools.add(declared(url, ssl_ca_certs=str(encrypted.ca_file)), name="cache")
        for _ in range(3):
            run_attempt(lambda: cache.get().set("tls", 1))
        assert proxy.accepted == 1
        proxy.cut()
        run_attempt(lambda: cache.get().incr("tls"))
        assert run_attempt(lambda: cache.get().get("tls")) == b"2"
        assert (proxy.accepted, len(built)) == (2, 1)
        (stats,) = pools.stats().totals()
        assert stats.value("failures") == 0

        proxy.lose_answer()
        with pytest.raises(Exception, match="onnection"):
            run_attempt(lambda: cache.get().incr("tls"))
        assert run_attempt(lambda: cache.get().get("tls")) == b"3"

        untrusted = pools.add(declared(url), name="untrusted")
        with pytest.raises(Exception) as caught:
            run_attempt(lambda: untrusted.get().get("tls"))
        failure = classify(caught.value)
        assert failure is not None
        assert failure.kind is FailureKind.PERMANENT
