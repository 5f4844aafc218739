"""Listeners of the user's: attached in on_open they are on every engine, elsewhere a handle or a warning says so."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest
import sqlalchemy
from sqlalchemy import event, text
from sqlalchemy.engine.events import ConnectionEvents, DialectEvents
from sqlalchemy.orm import Session
from sqlalchemy.pool import NullPool
from sqlalchemy.pool.events import PoolEvents

from tests.support.databases import Database
from tests.support.forking import run_in_fork
from workerpools import ConfigurationError, PooledTask, WorkerPools
from workerpools.sqlalchemy import SQLAlchemyEngine, TaskSession


@pytest.fixture
def pools() -> Iterator[WorkerPools]:
    with WorkerPools() as made:
        yield made


class Handles(PooledTask):
    abstract = True
    pools = WorkerPools()
    db = pools.add(SQLAlchemyEngine("sqlite://"))
    session = TaskSession(db)


NAMES = [
    name
    for events in (ConnectionEvents, DialectEvents, PoolEvents)
    for name in dir(events)
    if not name.startswith("_") and name != "dispatch"
]


@pytest.mark.parametrize("name", NAMES)
def test_listening_to_a_handle_says_on_open(name: str) -> None:
    """For every event of an engine, in place of "No such event"."""
    with pytest.raises(ConfigurationError, match=r"Handles\.db is the handle.*SQLAlchemyEngine\(on_open=…\)"):
        event.listen(Handles.db, name, print)


def test_listening_to_a_sessions_declaration() -> None:
    """Sessions are made anew for each run."""
    with pytest.raises(ConfigurationError, match=r"Handles\.session is the declaration.*listen to sqlalchemy\.orm"):
        event.listen(Handles.session, "after_commit", print)


def path_of(engine: sqlalchemy.Engine) -> str:
    with engine.connect() as connection:
        return str(connection.scalar(text("show search_path")))


def set_path(dbapi_connection: Any, record: object) -> None:
    with dbapi_connection.cursor() as cursor:
        cursor.execute("set search_path to tenant_a, public")
    dbapi_connection.commit()


@pytest.mark.parametrize("driver", ["psycopg2", "psycopg"])
def test_listeners_of_on_open_are_in_every_process(pools: WorkerPools, database: Database, driver: str) -> None:
    """They run after our own, and on each connection."""

    def prepare(engine: sqlalchemy.Engine) -> None:
        event.listen(engine, "connect", set_path)

    resource = pools.add(SQLAlchemyEngine(database.url(driver), on_open=prepare), name="db")
    assert path_of(resource.get()) == "tenant_a, public"
    assert run_in_fork(lambda: path_of(resource.get())) == "tenant_a, public"


def test_on_open_may_connect(pools: WorkerPools, database: Database) -> None:
    """Its connections are the engine's, and are closed if it fails."""
    backends: list[int] = []

    def prepare(engine: sqlalchemy.Engine) -> None:
        with engine.connect() as connection:
            backends.append(connection.scalar(text("select pg_backend_pid()")))
            if len(backends) == 1:
                raise ValueError("mine")

    resource = pools.add(SQLAlchemyEngine(database.url(), on_open=prepare), name="db")
    with pytest.raises(ValueError, match="mine"):
        resource.get()
    assert database.execute("select count(*) from pg_stat_activity where pid = %s", backends[0]) in ([(0,)], [(1,)])
    with resource.get().connect() as connection:
        assert connection.scalar(text("select pg_backend_pid()")) == backends[1]
    assert [row.open for row in pools.stats().totals()] == [1]


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def test_listeners_of_the_live_engine_are_missed(
    pools: WorkerPools, database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    """The warning names the resource, the events and on_open, but none of ours, of SQLAlchemy's or of a class."""
    resource = pools.add(SQLAlchemyEngine(database.url()), name="shop_db")
    engine = resource.get()
    event.listen(engine, "connect", set_path)
    event.listen(engine.pool, "checkin", lambda *_: None)
    event.listen(engine, "before_cursor_execute", lambda *_: None)
    event.listen(engine, "do_connect", lambda *_: None)
    event.listen(sqlalchemy.Engine, "after_cursor_execute", everywhere)
    try:
        path_of(engine)

        def child() -> list[str]:
            assert path_of(resource.get()) != "tenant_a, public"
            resource.close()
            resource.get()
            return warnings_of(caplog)

        (warning,) = run_in_fork(child)
    finally:
        event.remove(sqlalchemy.Engine, "after_cursor_execute", everywhere)
    assert "'shop_db'" in warning
    assert "SQLAlchemyEngine(on_open=…)" in warning
    named = warning.partition("(")[2].partition(")")[0].split(", ")
    assert sorted(named) == ["before_cursor_execute", "checkin", "connect", "do_connect"]


def everywhere(*_: object) -> None:
    """A listener of a class, which forks inherit."""


@pytest.mark.parametrize("options", [{}, {"poolclass": NullPool}, {"credentials": lambda: ("workerpools", "")}])
def test_an_engine_that_was_only_used_is_not_warned_of(
    pools: WorkerPools, database: Database, caplog: pytest.LogCaptureFixture, options: dict[str, Any]
) -> None:
    """What we, SQLAlchemy, its ORM, and dispose() attach is nobody's loss."""
    credentials = options.get("credentials") and (lambda: (database.user, database.password))
    declared = SQLAlchemyEngine(database.url(), **{**options, **({"credentials": credentials} if credentials else {})})
    resource = pools.add(declared, name="db")
    engine = resource.get()
    path_of(engine)
    with Session(engine) as session:
        session.scalar(text("select 1"))
    engine.dispose()
    path_of(engine.execution_options(isolation_level="AUTOCOMMIT"))

    def child() -> list[str]:
        path_of(resource.get())
        return warnings_of(caplog)

    assert run_in_fork(child) == []
