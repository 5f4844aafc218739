"""Through a real PgBouncer in transaction mode: sessions are nobody's, and yet deadlines and resolving work."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest
from celery.exceptions import SoftTimeLimitExceeded
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from tests.support.databases import Database
from tests.support.shop import Shop, insert
from workerpools.events import EventKind
from workerpools.sqlalchemy import AsyncSQLAlchemyEngine, AsyncTaskSession, SQLAlchemyEngine, TaskSession


@pytest.fixture(params=["psycopg2", "psycopg"])
def shop(request: pytest.FixtureRequest, database: Database, pgbouncer_to: Any, proxy_to: Any) -> Iterator[Shop]:
    """An app whose database is behind a PgBouncer with one server connection, and that behind a proxy."""
    made = Shop(database, request.param)
    bouncer = pgbouncer_to(database, default_pool_size=1)
    made.proxy = proxy_to(bouncer)
    url = bouncer.database.through(made.proxy).url(request.param)
    engine = made.pools.add(SQLAlchemyEngine(url, pgbouncer=True, check_after=0.0), name="bounced")
    made.base = type("Bounced", (made.base,), {"abstract": True, "db": engine, "session": TaskSession(engine)})
    yield made
    made.pools.close()


def test_nothing_is_kept_in_a_session(shop: Shop) -> None:
    """Two client connections share one server connection, with and without a deadline, with statements repeated often
    enough to be prepared: no task is in another one's way."""

    def body(self: Any, number: int) -> Any:
        insert(self.session, number)
        for _ in range(8):
            self.session.execute(text("select count(*) from orders"))
        return self.session.scalar(text("select setting from pg_settings where name = 'statement_timeout'"))

    limited = shop.task(soft_time_limit=20)(body)
    free = shop.task()(body)
    other = shop.base.db.get().connect()
    for number in range(6):
        task = limited if number % 2 else free
        found = int(task.apply((number,)).get())
        assert found == 0 if task is free else 15_000 < found < 22_000
        assert other.execute(text("show statement_timeout")).scalar() == "0"
        other.commit()
    other.close()
    assert shop.rows() == list(range(6))


def test_a_statement_ends_at_the_deadline(shop: Shop) -> None:
    """By a timeout of the transaction: the next one on the same server connection has none."""

    @shop.task(soft_time_limit=1)
    def task(self: Any) -> None:
        insert(self.session, 1)
        self.session.execute(text("select pg_sleep(20)"))

    started = time.monotonic()
    with pytest.raises(SoftTimeLimitExceeded):
        task.apply().get()
    assert time.monotonic() - started < 3

    @shop.task()
    def after(self: Any) -> str:
        return str(self.session.scalar(text("show statement_timeout")))

    assert after() == "0"
    assert shop.rows() == []


@pytest.mark.parametrize("deliver", [False, True], ids=["server never got it", "server got it"])
def test_a_lost_commit_is_resolved(shop: Shop, deliver: bool) -> None:
    """The connection to PgBouncer is lost during COMMIT; the database behind it is asked."""
    runs: list[int] = []

    @shop.task()
    def task(self: Any) -> None:
        runs.append(1)
        insert(self.session, 1)

    with shop.base.db.get().connect() as connection:
        connection.scalar(text("select 1"))
    shop.proxy.cut_when(lambda chunk: b"COMMIT" in chunk, deliver=deliver)
    task()
    assert len(runs) == (1 if deliver else 2)
    assert shop.rows() == [1]
    outcomes = [event.detail for event in shop.events if event.kind is EventKind.COMMIT_RESOLVED]
    assert outcomes == ["outcome=committed" if deliver else "outcome=aborted"]


@pytest.mark.parametrize("deliver", [False, True], ids=["server never got it", "server got it"])
def test_asyncpg_undeclared(database: Database, pgbouncer_to: Any, proxy_to: Any, deliver: bool) -> None:
    """Declared it is refused. Undeclared, a statement that was prepared on another server connection is the driver's
    error, and runs once; a lost COMMIT is resolved."""
    pytest.importorskip("sqlalchemy", minversion="2.1")
    database.execute("create table orders (id int primary key)")
    bouncer = pgbouncer_to(database, default_pool_size=2)
    proxy = proxy_to(bouncer)
    with closing(Shop()) as shop:
        shop.database = database
        url = bouncer.database.through(proxy).url("asyncpg")
        engine: Any = shop.pools.add(AsyncSQLAlchemyEngine(url, check_after=600.0, pool_size=2), name="bounced")
        shop._extend(db=engine, session=AsyncTaskSession(engine))
        runs: list[int] = []

        @shop.task()
        async def task(self: Any, number: int) -> None:
            runs.append(number)
            await self.session.execute(text("insert into orders values (:number)"), {"number": number})

        task(1)
        proxy.cut_when(lambda chunk: b"COMMIT" in chunk, deliver=deliver)
        task(2)
        assert runs == ([1, 2] if deliver else [1, 2, 2])
        outcomes = [event.detail for event in shop.events if event.kind is EventKind.COMMIT_RESOLVED]
        assert outcomes == ["outcome=committed" if deliver else "outcome=aborted"]

        runs.clear()
        holder = SQLAlchemyEngine(bouncer.database.url("psycopg2"), pgbouncer=True)
        other: Any = shop.pools.add(holder, name="holder").get()
        task(3)
        with other.connect() as connection:
            # The one that the statement was prepared on.
            connection.execute(text("select 1"))
            with pytest.raises(DBAPIError, match="does not exist"):
                task(4)
        assert runs == [3, 4]
        assert shop.rows() == [1, 2, 3]
