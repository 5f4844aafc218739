"""What the adapters count agrees with what the servers saw."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import httpx
import pytest
import sqlalchemy
from celery import Celery
from sqlalchemy import text
from sqlalchemy.pool import NullPool, StaticPool

from tests.adapters.shop import NUMBERS, Shop, insert
from tests.support.databases import Database
from tests.support.faults import terminate_backends
from tests.support.proxy import TcpProxy
from tests.support.tls import TlsProxy
from tests.support.upstream import EchoUpstream
from workerpools import PooledTask, RetryPolicy, WorkerPools
from workerpools._core.stats import ResourceStats
from workerpools.httpx import HttpxClient
from workerpools.sqlalchemy import SQLAlchemyEngine

ONE = text("select 1")


@pytest.fixture
def pools() -> Iterator[WorkerPools]:
    app = Celery(f"counted{next(NUMBERS)}", set_as_current=False, backend="cache+memory://")
    app.conf.task_always_eager = True
    with WorkerPools(app) as made:
        yield made


def stats(pools: WorkerPools, name: str) -> ResourceStats:
    (process,) = pools.stats().processes
    return next(each for each in process.resources if each.name == name)


def closed(pools: WorkerPools, name: str) -> dict[str, float]:
    return {reason: count for reason, count in stats(pools, name).labelled("closed").items() if count}


def eventually(condition: Callable[[], Any], timeout: float = 30.0) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


# Databases.


def engine_of(pools: WorkerPools, database: Database, **options: Any) -> sqlalchemy.Engine:
    return pools.add(SQLAlchemyEngine(database.url(), **options), name="db").get()


def test_a_connection_is_opened_once_and_reused(pools: WorkerPools, database: Database) -> None:
    """Opened, reused, used: each time counted, with the time it took."""
    engine = engine_of(pools, database, pool_size=2, max_overflow=1)
    for _ in range(5):
        with engine.connect() as connection:
            connection.execute(ONE)
            now = stats(pools, "db")
            assert (now.open, now.in_use, now.idle, now.limit) == (1, 1, 0, 3)
    now = stats(pools, "db")
    assert (now.kind, now.open, now.in_use, now.idle, now.pending) == ("database", 1, 0, 1, 0)
    assert (now.value("opened"), now.value("reused"), now.reuse_ratio) == (1, 4, 0.8)
    histograms = {name: now.histogram(name) for name in ("acquire_wait", "create_time", "use_time")}
    assert {name: each.count for name, each in histograms.items()} == {
        "acquire_wait": 5,
        "create_time": 1,
        "use_time": 5,
    }
    assert 0 < histograms["create_time"].max < 30
    pools.close()
    assert closed(pools, "db") == {"shutdown": 1}
    assert stats(pools, "db").open == 0


def test_a_wait_is_that_for_a_connection_and_not_for_the_server(pools: WorkerPools, database: Database) -> None:
    """One connection, two threads: the second waits, is pending meanwhile, and the wait is told in full."""
    engine = engine_of(pools, database, pool_size=1, max_overflow=0)

    def wait() -> None:
        with engine.connect() as connection:
            connection.execute(ONE)

    with engine.connect() as connection:
        connection.execute(ONE)
        assert stats(pools, "db").histogram("acquire_wait").max < 10
        thread = threading.Thread(target=wait)
        thread.start()
        eventually(lambda: stats(pools, "db").pending == 1)
        held = time.monotonic()
        eventually(lambda: time.monotonic() - held > 0.2)
        assert stats(pools, "db").value("longest_use") > 0.2
    thread.join(30)
    now = stats(pools, "db")
    assert now.histogram("acquire_wait").max >= 0.2
    assert (now.pending, now.value("opened"), now.value("reused")) == (0, 1, 1)


def test_a_wait_in_vain_is_a_time_out_and_a_failure(pools: WorkerPools, database: Database) -> None:
    """Of the kind that never reached the server."""
    engine = engine_of(pools, database, pool_size=1, max_overflow=0, acquire_timeout=0.1)
    with engine.connect(), pytest.raises(sqlalchemy.exc.TimeoutError):
        engine.connect()
    now = stats(pools, "db")
    assert (now.pending, now.value("acquire_timeouts"), now.value("failures", "pool_exhausted")) == (0, 1, 1)
    assert now.value("failures") == 1


@pytest.mark.parametrize("option", ["max_lifetime", "max_idle"])
def test_a_connection_that_was_replaced_for_its_age(pools: WorkerPools, database: Database, option: str) -> None:
    """By how old it is, or by how long it was idle."""
    options = {"max_lifetime": None, "max_idle": None, option: 0.5}
    engine = engine_of(pools, database, check_after=None, max_lifetime_jitter=0.0, **options)
    with engine.connect():
        pass
    since = time.monotonic()
    eventually(lambda: time.monotonic() - since > 0.6)
    with engine.connect():
        pass
    assert closed(pools, "db") == {option.removeprefix("max_"): 1}
    assert (stats(pools, "db").open, stats(pools, "db").value("opened")) == (1, 2)


def test_a_connection_beyond_what_the_pool_keeps(pools: WorkerPools, database: Database) -> None:
    """It is closed when it comes back."""
    engine = engine_of(pools, database, pool_size=1, max_overflow=5)
    with engine.connect(), engine.connect():
        pass
    assert closed(pools, "db") == {"other": 1}
    assert stats(pools, "db").open == 1


def test_a_check_that_fails_retires_its_siblings(shop: Shop) -> None:
    """Each of the three is stale; the one that was checked is the one failed check."""
    shop.pools.close()
    url = shop.database.through(shop.proxy).url(shop.engine.get().dialect.driver)
    engine = shop.pools.add(SQLAlchemyEngine(url, check_after=0.0), name="checked").get()
    with ExitStack() as held:
        for _ in range(3):
            held.enter_context(engine.connect()).execute(ONE)
    terminate_backends(shop.database)
    with ExitStack() as held:
        for _ in range(3):
            held.enter_context(engine.connect()).execute(ONE)
    now = stats(shop.pools, "checked")
    assert now.value("failed_checks") == 1
    assert closed(shop.pools, "checked") == {"stale": 3}
    assert (now.open, now.value("opened")) == (3, 6)
    assert now.value("failures") == 0


def test_a_lost_connection_is_a_failure_and_a_replay(shop: Shop) -> None:
    """A trusted one that is dead: the task runs again, and the dead connection was stale."""
    shop.pools.close()
    before = stats(shop.pools, "db")

    @shop.task()
    def task(self: Any) -> None:
        insert(self.session, next(NUMBERS))

    task()
    terminate_backends(shop.database)
    task()
    now = stats(shop.pools, "db")
    assert shop.replays() == 1
    assert now.value("replays") == 1
    assert now.labelled("failures") == {**before.labelled("failures"), "stale": 1}
    assert now.value("closed", "stale") == 1
    assert now.value("attempts") == 3
    assert (now.open, now.in_use) == (1, 0)


def test_a_failure_that_is_not_run_again_is_counted(shop: Shop) -> None:
    """The server is away: the task fails, and there is nothing that may wait for it."""
    shop.pools.close()

    @shop.task(replay=RetryPolicy(max_retries=0))
    def task(self: Any) -> None:
        insert(self.session, 1)

    shop.proxy.stop()
    shop.proxy.close_all()
    with pytest.raises(sqlalchemy.exc.OperationalError):
        task()
    now = stats(shop.pools, "db")
    assert (now.value("failures", "unavailable"), now.value("refused_replays")) == (1, 1)
    assert (now.open, now.in_use, now.pending) == (0, 0, 0)


def test_a_connection_that_a_body_keeps_is_a_leak(pools: WorkerPools, database: Database) -> None:
    """It is still in use when the attempt has ended: it is counted, and given back."""
    engine = pools.add(SQLAlchemyEngine(database.url()), name="db")
    kept: list[Any] = []

    class Base(PooledTask):
        abstract = True
        db = engine

    (app,) = pools._apps

    @app.task(base=Base, bind=True, name=f"leaks{next(NUMBERS)}")
    def task(self: Any, keep: bool) -> None:
        connection = self.db.connect()
        connection.execute(ONE)
        (kept.append if keep else lambda each: each.close())(connection)

    task(False)
    assert stats(pools, "db").value("leaks") == 0
    task(True)
    task(False)
    now = stats(pools, "db")
    assert (now.value("leaks"), now.in_use, now.value("attempts")) == (1, 0, 3)
    assert kept.pop().closed


def test_a_detached_connection_stays_open_and_is_not_in_use(pools: WorkerPools, database: Database) -> None:
    """The pool has nothing to do with it any more."""
    engine = engine_of(pools, database)
    connection = engine.connect()
    connection.detach()
    assert (stats(pools, "db").open, stats(pools, "db").in_use) == (1, 0)
    connection.close()
    assert stats(pools, "db").open == 0


@pytest.mark.parametrize("pool", [NullPool, StaticPool])
def test_other_connection_pools_are_counted_too(pools: WorkerPools, database: Database, pool: Any) -> None:
    """They keep their class's name, and have no limit."""
    engine = engine_of(pools, database, poolclass=pool)
    for _ in range(3):
        with engine.connect() as connection:
            connection.execute(ONE)
    now = stats(pools, "db")
    assert type(engine.pool).__name__ == pool.__name__
    assert isinstance(engine.pool, pool)
    assert (now.value("opened"), now.limit) == (3 if pool is NullPool else 1, 0)
    assert (now.histogram("acquire_wait").count, now.in_use) == (3, 0)


def test_a_database_without_sockets_is_counted(pools: WorkerPools, tmp_path: Any) -> None:
    """SQLite has files."""
    engine = pools.add(SQLAlchemyEngine(f"sqlite:///{tmp_path}/shop.db"), name="db").get()
    for _ in range(2):
        with engine.connect() as connection:
            connection.execute(ONE)
    now = stats(pools, "db")
    assert (now.open, now.value("opened"), now.value("reused")) == (1, 1, 1)


# HTTP.


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
