"""Recycling on real servers: new connections afterwards, and what is under way ends undisturbed on the old ones."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from typing import Any

import httpx
import pytest
import sqlalchemy
from sqlalchemy import event, text
from sqlalchemy.pool import NullPool, QueuePool, StaticPool

from tests.sqlalchemy.test_counted import closed, eventually, stats
from tests.support.databases import Database
from tests.support.faults import terminate_backends
from tests.support.shop import Shop, insert
from tests.support.upstream import EchoUpstream
from workerpools import WorkerPools
from workerpools.httpx import HttpxClient
from workerpools.sqlalchemy import SQLAlchemyEngine

BACKEND = text("select pg_backend_pid()")


@pytest.fixture
def pools() -> Iterator[WorkerPools]:
    with closing(Shop()) as shop:
        yield shop.pools


def alive(database: Database) -> set[int]:
    """Return the backends of the library's connections, as the server knows them."""
    rows = database.execute(
        "select pid from pg_stat_activity where datname = %s and application_name like 'workerpools %%'", database.name
    )
    return {int(pid) for (pid,) in rows}  # type: ignore[call-overload]


def eventually_alive(database: Database, expected: set[int]) -> None:
    """A server takes a moment to see that its client is gone."""
    deadline = time.monotonic() + 30
    while alive(database) != expected:
        assert time.monotonic() < deadline, (alive(database), expected)
        time.sleep(0.01)


def backend_of(connection: sqlalchemy.Connection) -> int:
    return int(connection.scalar(BACKEND) or 0)


# Databases.


def test_every_idle_connection_is_closed_at_the_next_use(shop: Shop) -> None:
    """Not the one alone that would be used: four were idle, and the server has one afterwards, a new one."""
    url = shop.database.url(shop.engine.get().dialect.driver)
    engine = shop.pools.add(SQLAlchemyEngine(url, pool_size=4, max_overflow=1), name="four").get()
    shop.engine.close()
    with ExitStack() as held:
        before = {backend_of(held.enter_context(engine.connect())) for _ in range(4)}
    assert len(before) == 4
    shop.pools.recycle("four")
    assert alive(shop.database) == before
    with engine.connect() as connection:
        now = backend_of(connection)
    assert now not in before
    eventually_alive(shop.database, {now})
    assert closed(shop.pools, "four") == {"recycled": 4}
    assert stats(shop.pools, "four").open == 1
    assert isinstance(engine.pool, QueuePool)
    # The pool has the size that it had: five may be out, and a sixth waits.
    assert (engine.pool.checkedin(), engine.pool.checkedout()) == (4, 0)
    with ExitStack() as held:
        all_of_them = {backend_of(held.enter_context(engine.connect())) for _ in range(5)}
        assert now in all_of_them
        assert not all_of_them & before
        assert engine.pool.checkedout() == 5
    assert (engine.pool.checkedin(), engine.pool.checkedout()) == (4, 0)


def test_an_open_transaction_is_undisturbed(shop: Shop) -> None:
    """It is committed on the connection that it began on, which is closed when it comes back; the next one is new."""
    seen: list[int] = []

    @shop.task()
    def task(self: Any, number: int) -> None:
        insert(self.session, number)
        seen.append(self.session.scalar(BACKEND))
        shop.pools.recycle()
        # A second connection of the same attempt is a new one already.
        with self.db.connect() as connection:
            seen.append(backend_of(connection))
        insert(self.session, number + 1)
        assert self.session.scalar(BACKEND) == seen[0]

    task(1)
    assert shop.rows() == [1, 2]
    old, new = seen
    assert new != old
    # The task's own connection is gone as well: it came back after the other one.
    eventually_alive(shop.database, {new})
    assert closed(shop.pools, "db") == {"recycled": 1}
    assert shop.replays() == 0


def test_a_connection_that_comes_back_is_seen_open_by_every_listener(pools: WorkerPools, database: Database) -> None:
    """One that says something to the server as a connection comes back still can."""
    engine = pools.add(SQLAlchemyEngine(database.url()), name="db").get()
    told = []

    @event.listens_for(engine, "checkin")
    def comes_back(connection: Any, record: Any) -> None:
        with connection.cursor() as cursor:
            cursor.execute("select pg_backend_pid()")
            told.append(cursor.fetchone()[0])
        connection.rollback()

    with engine.connect() as connection:
        old = backend_of(connection)
        pools.recycle()
        with engine.connect() as other:
            new = backend_of(other)
    assert told == [new, old]
    eventually_alive(database, {new})


def test_a_connection_that_was_being_made_is_replaced(pools: WorkerPools, database: Database) -> None:
    """Who had begun to log in before may have done so with the old password; it is used once, and not kept."""
    begun, go_on = threading.Event(), threading.Event()
    adapter = SQLAlchemyEngine(database.url(), credentials=lambda: wait())
    resource = pools.add(adapter, name="db")

    def wait() -> tuple[str, str]:
        begun.set()
        assert go_on.wait(30)
        url = sqlalchemy.make_url(database.url())
        return url.username or "", url.password or ""

    def work() -> int:
        with resource.get().connect() as connection:
            return backend_of(connection)

    with ThreadPoolExecutor(1) as threads:
        first = threads.submit(work)
        assert begun.wait(30)
        pools.recycle()
        go_on.set()
        used = first.result(30)
    with resource.get().connect() as connection:
        assert backend_of(connection) != used
    assert closed(pools, "db") == {"recycled": 1}


@pytest.mark.parametrize("concurrency", [1, 6])
def test_recycled_over_and_over_under_load(pools: WorkerPools, database: Database, concurrency: int) -> None:
    """No statement fails, nobody waits in vain, and no connection is lost or left over."""
    engine = pools.add(SQLAlchemyEngine(database.url(), pool_size=concurrency, max_overflow=1), name="db").get()
    seen, over = set[int](), threading.Event()

    def work() -> None:
        while not over.is_set():
            with engine.begin() as connection:
                seen.add(backend_of(connection))
                connection.scalar(BACKEND)

    with ThreadPoolExecutor(concurrency) as threads:
        working = [threads.submit(work) for _ in range(concurrency)]
        try:
            for _ in range(2_000):
                pools.recycle()
                if over.wait(0.02) or len(seen) >= 40:
                    break
        finally:
            over.set()
        for each in working:
            each.result(60)
    assert len(seen) >= 40
    assert isinstance(engine.pool, QueuePool)
    assert engine.pool.checkedout() == 0
    pools.recycle()
    with engine.connect() as connection:
        now = backend_of(connection)
    assert now not in seen
    eventually_alive(database, {now})
    counted = stats(pools, "db")
    assert (counted.open, counted.in_use, counted.pending) == (1, 0, 0)
    assert counted.value("closed") == counted.value("closed", "recycled") == counted.value("opened") - 1


def test_a_pool_that_hides_its_idle_connections_replaces_each_as_it_is_taken(
    pools: WorkerPools, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a SQLAlchemy of the future may."""
    engine = pools.add(SQLAlchemyEngine(database.url(), pool_size=2), name="db").get()
    with engine.connect() as one, engine.connect() as two:
        before = {backend_of(one), backend_of(two)}
    monkeypatch.setattr("workerpools.sqlalchemy._pool.QueuePool", NullPool)
    pools.recycle()
    with engine.connect() as one:
        assert backend_of(one) not in before
        with engine.connect() as two:
            assert backend_of(two) not in before
    assert closed(pools, "db") == {"recycled": 2}


def test_pools_of_other_kinds(pools: WorkerPools, database: Database) -> None:
    """One that keeps nothing has nothing to replace; a pool object of the user's is recycled like any other; and a
    database that lives in its connection's memory is left alone."""
    none = pools.add(SQLAlchemyEngine(database.url(), poolclass=NullPool), name="none").get()
    made = sqlalchemy.create_engine(database.url(), pool_size=2)
    own = pools.add(SQLAlchemyEngine(database.url(), pool=made.pool), name="own").get()
    memory = pools.add(SQLAlchemyEngine("sqlite://", poolclass=StaticPool), name="memory").get()
    with none.connect() as connection, own.connect() as one, own.connect() as other:
        connection.execute(text("select 1"))
        before = {backend_of(one), backend_of(other)}
    with memory.begin() as connection:
        connection.execute(text("create table here (id int)"))
    pools.recycle()
    with none.connect() as connection, own.connect() as other:
        connection.execute(text("select 1"))
        assert backend_of(other) not in before
        # The idle sibling is gone as well.
        gone = "select count(*) from pg_stat_activity where pid = any(%s)"
        eventually(lambda: database.execute(gone, list(before)) == [(0,)])
    with memory.connect() as connection:
        assert connection.execute(text("select * from here")).all() == []
    assert closed(pools, "memory") == {}


def test_mariadb_connections_are_recycled(maria_shop: Shop) -> None:
    """In the middle of a task, undisturbed; and the next one has another connection."""
    connection_id = text("select connection_id()")
    seen: list[int] = []

    @maria_shop.task()
    def task(self: Any, number: int) -> None:
        insert(self.session, number)
        seen.append(self.session.scalar(connection_id))
        maria_shop.pools.recycle()
        assert self.session.scalar(connection_id) == seen[-1]

    task(1)
    task(2)
    assert maria_shop.rows() == [1, 2]
    assert seen[0] != seen[1]


# HTTP.


def test_the_next_request_goes_over_a_new_connection(pools: WorkerPools, echo: EchoUpstream) -> None:
    """Wherever the client is kept; and the old one is closed."""
    api = pools.add(HttpxClient(base_url=echo.url), name="api").get()
    for _ in range(3):
        api.get("/echo/x")
    assert echo.accepted == 1
    pools.recycle("api")
    assert echo.open_connections() == 1
    for _ in range(3):
        api.get("/echo/y")
    echo.wait_for_open(1)
    assert {request.connection for request in echo.requests() if request.path == "/echo/y"} == {2}
    assert closed(pools, "api") == {"recycled": 1}


def test_a_streaming_response_is_undisturbed(pools: WorkerPools, echo: EchoUpstream) -> None:
    """It is read to its end on the old connection, which is closed then; other requests go over a new one."""
    api = pools.add(HttpxClient(base_url=echo.url), name="api").get()
    with api.stream("GET", "/stream", params={"n": "20000"}) as response:
        lines = response.iter_lines()
        first = next(lines)
        pools.recycle()
        assert api.get("/echo/x").text == "x"
        assert echo.open_connections() == 2
        rest = list(lines)
    assert [first, *rest] == [f"chunk {number}" for number in range(20000)]
    echo.wait_for_open(1)
    assert [request.connection for request in echo.requests()] == [1, 2]
    assert closed(pools, "api") == {"recycled": 1}


def test_every_transport_of_a_client_is_recycled_at_once(
    pools: WorkerPools, echo: EchoUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That of a proxy, too, though the next request does not go there."""
    with EchoUpstream() as proxy:
        monkeypatch.setenv("http_proxy", proxy.url)
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        api = pools.add(HttpxClient(), name="api").get()
        api.get("http://elsewhere.test/echo/x")
        api.get(f"{echo.url}/echo/x")
        assert (proxy.open_connections(), echo.open_connections()) == (1, 1)
        pools.recycle()
        api.get(f"{echo.url}/echo/x")
        proxy.wait_for_open(0)
        assert echo.accepted == 2


def test_a_transport_of_the_users_own_is_left_alone(pools: WorkerPools) -> None:
    """Nothing tells how to make another one."""
    transport = httpx.MockTransport(lambda request: httpx.Response(200))
    api = pools.add(HttpxClient(transport=transport), name="api").get()
    api.get("http://api.test/")
    pools.recycle()
    assert api.get("http://api.test/").status_code == 200


def test_a_failure_after_recycling_is_replayed_as_ever(shop: Shop) -> None:
    """A connection that was recycled is not mistaken for a dead one, nor a dead one for a recycled one."""

    @shop.task()
    def task(self: Any, number: int) -> None:
        insert(self.session, number)

    task(1)
    shop.pools.recycle()
    task(2)
    assert shop.replays() == 0
    terminate_backends(shop.database)
    task(3)
    assert shop.replays() == 1
    assert shop.rows() == [1, 2, 3]
    assert closed(shop.pools, "db") == {"recycled": 1, "stale": 1}
