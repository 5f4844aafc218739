"""What the adapter for SQLAlchemy counts agrees with what the servers saw."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import sqlalchemy
from sqlalchemy import text
from sqlalchemy.pool import NullPool, StaticPool

from tests.stats.counting import closed, counted_pools, engine_of, eventually, stats
from tests.support.databases import Database
from tests.support.faults import terminate_backends
from tests.support.shop import NUMBERS, Shop, insert
from workerpools import PooledTask, RetryPolicy, WorkerPools
from workerpools.sqlalchemy import SQLAlchemyEngine

ONE = text("select 1")


@pytest.fixture
def pools() -> Iterator[WorkerPools]:
    with counted_pools() as made:
        yield made


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


def test_the_pools_logger_has_the_name_of_sqlalchemys(
    pools: WorkerPools, database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    """Which is silent unless it is asked for: at INFO a pool tells of each connection that it replaces."""
    engine = engine_of(pools, database, pool_logging_name="shop")
    assert engine.pool.logger.name == "sqlalchemy.pool.impl.QueuePool.shop"
    with caplog.at_level(logging.INFO), engine.connect() as connection:
        connection.invalidate()
    assert caplog.records == []


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


def test_a_connection_beyond_it_goes_to_whoever_waits(pools: WorkerPools, database: Database) -> None:
    """Two are checked in before either of two waiting callers takes one: both are served without a new connection."""
    pool: Any = engine_of(pools, database, pool_size=1, max_overflow=1).pool
    held = [pool.connect(), pool.connect()]
    waiting = [threading.Thread(target=lambda: pool.connect().close()) for _ in held]
    for each in waiting:
        each.start()
    eventually(lambda: len(pool._waiters) == 2)
    with pool._lock:
        for connection in held:
            connection.close()
    for each in waiting:
        each.join(10)
    now = stats(pools, "db")
    assert (now.value("opened"), now.value("reused"), now.in_use, now.open) == (2, 2, 0, 1)


def test_a_connection_that_nobody_takes_after_all_is_closed(pools: WorkerPools, database: Database) -> None:
    """Those that waited for it were interrupted."""
    pool: Any = engine_of(pools, database, pool_size=1, max_overflow=1).pool
    held = [pool.connect(), pool.connect()]
    another = threading.Lock()
    another.acquire()

    def interrupted(waiter: Any, seconds: float) -> None:
        pool._waiters.append(another)
        for connection in held:
            connection.close()
        assert pool.checkedin() == 2
        raise KeyboardInterrupt

    pool._wait = interrupted
    with pytest.raises(KeyboardInterrupt):
        pool.connect()
    now = stats(pools, "db")
    assert (pool.checkedin(), now.in_use, now.pending, now.open) == (1, 0, 0, 1)


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
