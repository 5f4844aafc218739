"""What the adapter for httpx, and one for a function, count agrees with what the servers saw."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from sqlalchemy import text

from tests.stats.counting import closed, counted_pools, engine_of, eventually, stats
from tests.support.databases import Database
from tests.support.proxy import TcpProxy
from tests.support.tls import TlsProxy
from tests.support.upstream import EchoUpstream
from workerpools import WorkerPools
from workerpools.httpx import HttpxClient

ONE = text("select 1")


@pytest.fixture
def pools() -> Iterator[WorkerPools]:
    with counted_pools() as made:
        yield made


def client_of(pools: WorkerPools, url: str, **options: Any) -> httpx.Client:
    return pools.add(HttpxClient(base_url=url, trust_env=False, **options), name="api").get()


def test_requests_reuse_one_connection(pools: WorkerPools, echo: EchoUpstream) -> None:
    """As the server saw it."""
    api = client_of(pools, echo.url, max_connections=3)
    for number in range(5):
        api.get(f"/echo/{number}")
    with api.stream("GET", "/stream", params={"n": "3"}) as response:
        now = stats(pools, "api")
        assert (now.open, now.in_use, now.idle, now.limit) == (1, 1, 0, 3)
        response.read()
    now = stats(pools, "api")
    assert (now.kind, now.open, now.in_use, now.idle, now.pending) == ("http", 1, 0, 1, 0)
    assert (now.value("opened"), now.value("reused")) == (echo.accepted, 5)
    assert [now.histogram(name).count for name in ("acquire_wait", "create_time", "use_time")] == [6, 1, 6]
    pools.close()
    assert closed(pools, "api") == {"shutdown": 1}


@pytest.mark.parametrize("what", ["http", "https", "database", "function"])
def test_how_long_a_connection_was_open(
    what: str, pools: WorkerPools, echo: EchoUpstream, tls_echo: TlsProxy, database: Database
) -> None:
    """Told once, when it is closed, and by the clock from when it was opened."""
    begun = time.monotonic()
    if what == "database":
        with engine_of(pools, database).connect() as connection:
            connection.execute(ONE)
    elif what == "function":
        pools.add(lambda: httpx.Client(), name="db").get()
    else:
        url = echo.url if what == "http" else f"https://{tls_echo.host}:{tls_echo.port}"
        client = HttpxClient(base_url=url, trust_env=False, verify=tls_echo.client_context())
        pools.add(client, name="db").get().get("/echo/1")
    opened = time.monotonic()
    time.sleep(0.05)
    assert stats(pools, "db").histogram("open_time").count == 0
    waited = time.monotonic() - opened
    pools.close()
    now = stats(pools, "db").histogram("open_time")
    assert now.count == stats(pools, "db").value("closed") == 1
    assert waited <= now.sum <= time.monotonic() - begun


def test_tls_is_a_part_of_opening(pools: WorkerPools, tls_echo: TlsProxy) -> None:
    """One connection, one time; it is closed once."""
    api = client_of(pools, f"https://{tls_echo.host}:{tls_echo.port}", verify=tls_echo.client_context())
    api.get("/echo/x")
    now = stats(pools, "api")
    assert (now.value("opened"), now.open, now.histogram("create_time").count) == (1, 1, 1)
    pools.close()
    assert closed(pools, "api") == {"shutdown": 1}


def test_a_wait_for_a_free_connection(pools: WorkerPools, echo: EchoUpstream) -> None:
    """Pending while it waits; a wait in vain is a time-out."""
    api = client_of(pools, echo.url, max_connections=1, timeout=httpx.Timeout(30.0, pool=2.0))

    def wait() -> None:
        with pytest.raises(httpx.PoolTimeout):
            api.get("/echo/x")

    with api.stream("GET", "/stream", params={"n": "3"}) as response:
        thread = threading.Thread(target=wait)
        thread.start()
        eventually(lambda: stats(pools, "api").pending == 1)
        thread.join(30)
        response.read()
    now = stats(pools, "api")
    assert (now.pending, now.value("acquire_timeouts"), now.value("failures", "pool_exhausted")) == (0, 1, 1)
    assert now.histogram("acquire_wait").max >= 0.2
    assert api.get("/echo/x").text == "x"
    assert echo.accepted == 1


def test_a_connection_that_the_server_closed_was_stale(pools: WorkerPools, echo: EchoUpstream) -> None:
    """httpx sees that before it is used again."""
    api = client_of(pools, echo.url)
    api.get("/echo/x")
    echo.close_idle()
    echo.wait_for_open(0)
    api.get("/echo/x")
    assert closed(pools, "api") == {"stale": 1}
    assert (stats(pools, "api").value("opened"), stats(pools, "api").open) == (2, 1)


def test_a_connection_that_was_idle_for_too_long(pools: WorkerPools, echo: EchoUpstream) -> None:
    """By httpx's own keep-alive expiry."""
    api = client_of(pools, echo.url, limits=httpx.Limits(keepalive_expiry=0.05))
    api.get("/echo/x")
    since = time.monotonic()
    eventually(lambda: time.monotonic() - since > 0.1)
    api.get("/echo/x")
    assert closed(pools, "api") == {"idle": 1}


def test_a_connection_on_which_a_request_fails_was_not_idle(pools: WorkerPools, echo: EchoUpstream) -> None:
    """Though the request waits for longer than an idle connection is kept."""
    limits = httpx.Limits(keepalive_expiry=1.0)
    api = client_of(pools, echo.url, limits=limits, timeout=httpx.Timeout(30.0, read=1.5))
    api.get("/echo/x")
    with pytest.raises(httpx.ReadTimeout):
        api.post("/echo/x", params={"delay": "5"})
    # On a slow machine the first one may have been idle for too long before the second.
    reasons = closed(pools, "api")
    assert reasons.pop("other") == 1
    assert set(reasons) <= {"idle"}
    assert stats(pools, "api").value("opened") == 1 + sum(reasons.values())
    assert (stats(pools, "api").in_use, stats(pools, "api").open) == (0, 0)


def test_a_connection_that_reached_its_age(pools: WorkerPools, echo: EchoUpstream) -> None:
    """It is replaced between two requests."""
    api = client_of(pools, echo.url, max_lifetime=0.0)
    api.get("/echo/x")
    api.get("/echo/x")
    assert set(closed(pools, "api")) == {"lifetime"}


def test_a_request_that_was_lost_and_sent_again(pools: WorkerPools, echo: EchoUpstream, proxy_to: Any) -> None:
    """A stale failure, a replay, and the answer of the second one."""
    proxy: TcpProxy = proxy_to(echo)
    host, port = proxy.address
    api = client_of(pools, f"http://{host}:{port}")
    api.get("/echo/x")
    proxy.cut_when(lambda data: b"GET" in data, times=1)
    assert api.get("/echo/x").text == "x"
    now = stats(pools, "api")
    assert (now.value("failures", "stale"), now.value("replays"), now.value("opened")) == (1, 1, 2)
    assert (now.open, now.in_use, now.pending) == (1, 0, 0)


def test_a_server_that_refuses(pools: WorkerPools, echo: EchoUpstream, proxy_to: Any) -> None:
    """Nothing was opened, nothing is pending, and it is a failure."""
    proxy: TcpProxy = proxy_to(echo)
    host, port = proxy.address
    api = client_of(pools, f"http://{host}:{port}")
    proxy.stop()
    with pytest.raises(httpx.ConnectError):
        api.get("/echo/x")
    now = stats(pools, "api")
    assert (now.open, now.pending, now.in_use, now.value("opened")) == (0, 0, 0, 0)
    assert now.value("failures", "unavailable") == 1


def test_a_transport_of_the_users_own(pools: WorkerPools) -> None:
    """It tells nothing of its connections; what is in use is known all the same."""
    seen: list[int] = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(stats(pools, "api").in_use)
        return httpx.Response(200, text="x")

    api = client_of(pools, "http://upstream", transport=httpx.MockTransport(answer))
    api.get("/echo/x")
    assert seen == [1]
    now = stats(pools, "api")
    assert (now.in_use, now.open, now.limit, now.histogram("use_time").count) == (0, 0, 0, 1)


# Anything else.


def test_a_function_makes_one_connection(pools: WorkerPools) -> None:
    """Its value counts as one."""
    resource = pools.add(lambda: object(), name="thing")
    resource.get()
    assert (stats(pools, "thing").open, stats(pools, "thing").value("opened")) == (1, 1)
    resource.close()
    assert closed(pools, "thing") == {"shutdown": 1}
