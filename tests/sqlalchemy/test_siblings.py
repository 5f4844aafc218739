"""One dead connection tells of others; a connection pool without a free one, and a driver on its own, tell of none."""

from __future__ import annotations

import os
from contextlib import ExitStack
from typing import Any

import pytest
import sqlalchemy
from sqlalchemy import text

from tests.support.databases import Database
from tests.support.faults import terminate_backends
from tests.support.shop import Shop, insert
from workerpools import FailureKind, classify
from workerpools.sqlalchemy import SQLAlchemyEngine, TaskSession
from workerpools.sqlalchemy._errors import error_code, is_client_side


def test_one_dead_connection_retires_its_idle_siblings(shop: Shop) -> None:
    """They are of the same age: four were idle when the server ended them, one task finds out, and no other does."""
    engine = shop.engine.get()
    with ExitStack() as held:
        for _ in range(4):
            held.enter_context(engine.connect()).execute(text("select 1"))
    terminate_backends(shop.database)

    @shop.task()
    def task(self: Any) -> None:
        insert(self.session, 1)

    task()
    assert shop.replays() == 1
    with ExitStack() as held:
        assert [held.enter_context(engine.connect()).scalar(text("select 1")) for _ in range(4)] == [1] * 4


def test_a_connection_pool_without_a_free_connection_invalidates_nothing(shop: Shop) -> None:
    """The failure is local: SQLAlchemy's own error comes out, and the connections stay."""
    url = shop.database.url(shop.engine.get().dialect.driver)
    small = shop.pools.add(SQLAlchemyEngine(url, pool_size=1, max_overflow=0, acquire_timeout=0.2), name="small")
    backend = text("select pg_backend_pid()")

    @shop.task(base=type("Small", (shop.base,), {"abstract": True, "session": TaskSession(small)}))
    def task(self: Any) -> Any:
        return self.session.scalar(backend)

    first = task()
    with small.get().connect() as connection:
        assert connection.scalar(backend) == first
        with pytest.raises(sqlalchemy.exc.TimeoutError) as caught:
            task()
    assert task() == first
    failure = classify(caught.value)
    assert failure is not None
    assert (failure.kind, failure.sent.value, failure.phase.value) == (FailureKind.POOL_EXHAUSTED, "nothing", "acquire")
    assert any("acquire of the resource 'small' failed" in note for note in caught.value.__notes__)


def test_a_connection_that_the_driver_alone_knows_to_be_lost_is_replayed(shop: Shop) -> None:
    """Its descriptor was taken away: no server says a word, and SQLAlchemy knows neither the state nor the text."""
    runs: list[int] = []

    @shop.task()
    def task(self: Any) -> None:
        runs.append(1)
        insert(self.session, 1)
        if len(runs) == 1:
            null = os.open(os.devnull, os.O_RDWR)
            os.dup2(null, self.session.connection().connection.dbapi_connection.fileno())
            os.close(null)
        insert(self.session, 2)

    task()
    assert len(runs) == 2
    assert shop.rows() == [1, 2]


@pytest.mark.parametrize(
    ("module", "name", "code", "expected"),
    [
        ("psycopg", "OperationalError", None, True),
        ("psycopg2", "OperationalError", None, True),
        ("psycopg.errors", "OperationalError", "57014", False),
        ("psycopg", "DataError", None, False),
        ("pymysql.err", "OperationalError", None, False),
    ],
)
def test_what_a_driver_says_on_its_own(module: str, name: str, code: str | None, expected: bool) -> None:
    """A server's error has a SQLSTATE."""
    error = type(name, (Exception,), {"__module__": module, "sqlstate": code})("connection socket closed")
    assert is_client_side(error, error_code(error)) is expected


@pytest.mark.parametrize("asked", [b"version()", b"show standard_conforming_strings", b"statement_timeout"])
def test_a_connection_that_is_lost_while_sqlalchemy_asks_its_server_is_a_lost_connection(
    database: Database, shop: Shop, proxy_to: Any, asked: bytes
) -> None:
    """The first connection of an engine is asked for the server's version and more: nothing of the task was sent."""
    proxy = proxy_to(database)
    engine = shop.pools.add(
        SQLAlchemyEngine(database.through(proxy).url(shop.engine.get().dialect.driver)), name="fresh"
    )

    @shop.task(base=type("Fresh", (shop.base,), {"abstract": True, "session": TaskSession(engine)}))
    def task(self: Any) -> None:
        insert(self.session, 1)

    cut = proxy.cut_when(lambda chunk: asked in chunk)
    try:
        task()
    except sqlalchemy.exc.OperationalError as error:
        failure = classify(error)
        assert failure is not None
        assert failure.kind in (FailureKind.UNAVAILABLE, FailureKind.STALE)
        task()
    assert cut.fired == 1
    assert shop.rows() == [1]
