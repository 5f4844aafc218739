"""A migration changes a table whose statements are prepared: PostgreSQL refuses their plans."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from tests.support.databases import Database
from tests.support.shop import Shop, insert
from workerpools import FailureKind, classify

ALL = text("select * from orders")


@pytest.fixture
def shop(database: Database) -> Iterator[Shop]:
    """psycopg 3 prepares a statement that is executed often; psycopg2 never does."""
    with closing(Shop(database, "psycopg")) as made:
        yield made


def prepare(session: Any) -> None:
    """Execute a statement until it is prepared."""
    for _ in range(6):
        session.execute(ALL).all()


def test_the_body_runs_again_once(shop: Shop) -> None:
    """The replay, and every later task, reads the new columns."""
    runs: list[int] = []

    @shop.task()
    def task(self: Any, number: int) -> int:
        runs.append(number)
        insert(self.session, number)
        prepare(self.session)
        return len(self.session.execute(ALL).keys())

    assert task(1) == 1
    shop.database.execute("alter table orders add column note text")
    assert [task(2), task(3)] == [2, 2]
    assert runs == [1, 2, 2, 3]
    assert shop.rows() == [1, 2, 3]
    assert shop.replays() == 1


def test_other_connections_are_replaced_with_it(shop: Shop) -> None:
    """They have prepared the same statement: one replay serves all of them."""
    engine = shop.engine.get()
    with engine.connect() as one, engine.connect() as other, engine.connect() as third:
        for connection in (one, other, third):
            prepare(connection)
            # A rollback has psycopg forget what it has prepared.
            connection.commit()
    shop.database.execute("alter table orders add column note text")
    runs: list[int] = []

    @shop.task()
    def task(self: Any) -> list[int]:
        runs.append(1)
        with self.db.connect() as one, self.db.connect() as other, self.db.connect() as third:
            return [len(connection.execute(ALL).keys()) for connection in (one, other, third)]

    assert task() == [2, 2, 2]
    assert len(runs) == 2


def test_in_autocommit_the_next_task_is_served(shop: Shop) -> None:
    """psycopg forgets its statements at a rollback, and without a transaction there is none."""

    @shop.task()
    def task(self: Any) -> int:
        with self.db.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            prepare(connection)
            return len(connection.execute(ALL).keys())

    assert task() == 1
    shop.database.execute("alter table orders add column note text")
    with pytest.raises(DBAPIError) as caught:
        task()
    failure = classify(caught.value)
    assert failure is not None
    assert failure.kind is FailureKind.ABORTED
    assert task() == 2


def test_other_errors_of_that_code_are_mistakes(shop: Shop) -> None:
    """0A000 stands for every feature that PostgreSQL lacks."""
    with shop.engine.get().connect() as connection, pytest.raises(DBAPIError) as caught:
        connection.execute(text("select * from another_database.public.orders"))
    assert getattr(caught.value.orig, "sqlstate", None) == "0A000"
    assert classify(caught.value) is None
