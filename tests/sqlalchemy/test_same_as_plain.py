"""An engine of ours does what a plain one does: the same uses of both, compared in results, errors and rows."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from typing import Any

import psycopg2
import pytest
import sqlalchemy
from sqlalchemy import text

from demo_tasks.servers import PostgresServer, Workspace
from tests.sqlalchemy.uses import SCHEMA, USES, Use, caught, plain, told
from tests.support.databases import Database, new_database
from tests.support.pgbouncer import PgBouncer, pgbouncer_program
from tests.support.services import require_program
from tests.support.stand import wait_until
from workerpools import WorkerPools
from workerpools.sqlalchemy import SQLAlchemyEngine
from workerpools.testing import run_attempt

#: How an engine of ours is used: outside a task, in a task, in a task with a time limit.
MODES: dict[str, Callable[[Callable[[], object]], object]] = {
    "outside a task": lambda use: use(),
    "in a task": run_attempt,
    "in a task with a deadline": functools.partial(run_attempt, time_limit=100.0),
}


@dataclass
class Place:
    """Where the engines lead.

    Attributes:
        database: The database as the engines reach it.
        bouncer: The PgBouncer on the way; None for none.
        watch: A connection of the test's own, past the PgBouncer.
    """

    database: Database
    bouncer: PgBouncer | None
    watch: Any

    def clear(self) -> None:
        """End what the last engine has left: sessions, and transactions that were prepared."""
        if self.bouncer is not None:
            self.bouncer.console("RECONNECT")
        others = (
            " from pg_stat_activity"
            " where datname = current_database() and pid <> pg_backend_pid() and backend_type = 'client backend'"
        )
        self._ask("select pg_terminate_backend(pid)" + others)
        # With a time-out the function itself looks only every 0.1 s.
        wait_until(lambda: self._ask("select count(*)" + others) == [(0,)], "no session of the last engine")
        for (identifier,) in self._ask("select gid from pg_prepared_xacts where database = current_database()"):
            with self.watch.cursor() as cursor:
                cursor.execute("rollback prepared %s", (identifier,))

    def renew(self) -> None:
        """Begin with a new schema."""
        self._ask("select lo_unlink(oid) from pg_largeobject_metadata")
        with self.watch.cursor() as cursor:
            cursor.execute(SCHEMA)

    def left_behind(self) -> dict[str, object]:
        """Return the rows of all tables, and what has not ended."""
        tables = self._ask("select tablename from pg_tables where schemaname = 'public' order by 1")
        found: dict[str, object] = {name: self._ask(f'select t::text from "{name}" t order by 1') for (name,) in tables}
        found["prepared"] = self._ask("select count(*) from pg_prepared_xacts where database = current_database()")
        found["large objects"] = self._ask("select count(*) from pg_largeobject_metadata")
        found["in transaction"] = self._ask(
            "select count(*) from pg_stat_activity where datname = current_database() and state like 'idle in%'"
        )
        return found

    def _ask(self, question: str) -> list[Any]:
        with self.watch.cursor() as cursor:
            cursor.execute(question)
            return list(cursor.fetchall())


@pytest.fixture(scope="module")
def database(postgres_server: PostgresServer) -> Iterator[Database]:
    with new_database(postgres_server, "compared") as made:
        made.execute("create schema extensions")
        available = made.execute("select 1 from pg_available_extensions where name = 'hstore'")
        if available:
            made.execute("create extension hstore schema extensions")
        yield made


@pytest.fixture(scope="module", params=["directly", "through PgBouncer"])
def place(request: pytest.FixtureRequest, database: Database) -> Iterator[Place]:
    with ExitStack() as stack:
        bouncer = None
        if request.param == "through PgBouncer":
            require_program(pgbouncer_program)
            bouncer = stack.enter_context(PgBouncer(stack.enter_context(Workspace()), database))
        watch = stack.enter_context(closing(psycopg2.connect(database.dsn, options="-c lock_timeout=2s")))
        watch.autocommit = True
        yield Place(database if bouncer is None else bouncer.database, bouncer, watch)


def observed(
    place: Place, use: Use, engine: sqlalchemy.Engine, mode: Callable[[Callable[[], object]], object]
) -> list[dict[str, object]]:
    """Return what a use gives and leaves behind, over a new connection and again over pooled ones."""
    found = []
    for _ in range(2):
        place.renew()
        try:
            result = mode(lambda: plain(use.run(engine)))
        except Exception as error:
            result = {"raised": told(error)}
        assert isinstance(engine.pool, sqlalchemy.pool.QueuePool)
        found.append({"result": result, "left": place.left_behind(), "in use": engine.pool.checkedout()})
    return found


def on_a_plain_engine(place: Place, use: Use, driver: str) -> list[dict[str, object]]:
    options = {"pool_use_lifo": True, **use.options}
    if place.bouncer is not None and driver == "psycopg":
        # PgBouncer before 1.21 knows no prepared statements.
        options["connect_args"] = {"prepare_threshold": None, **options.get("connect_args", {})}
    engine = sqlalchemy.create_engine(place.database.url(driver), **options)
    try:
        return observed(place, use, engine, lambda action: action())
    finally:
        engine.dispose()
        place.clear()


def on_an_engine_of_ours(place: Place, use: Use, driver: str, mode: Any) -> list[dict[str, object]]:
    pools = WorkerPools()
    declared = SQLAlchemyEngine(place.database.url(driver), pgbouncer=place.bouncer is not None, **use.options)
    engine = pools.add(declared, name="compared")
    try:
        return observed(place, use, engine.get(), mode)
    finally:
        pools.close()
        place.clear()


@pytest.mark.parametrize(
    ("driver", "use"),
    [pytest.param(driver, use, id=f"{driver}-{use.name}") for use in USES for driver in use.drivers],
)
def test_an_engine_of_ours_does_what_a_plain_one_does(place: Place, driver: str, use: Use) -> None:
    expected = on_a_plain_engine(place, use, driver)
    assert not any(isinstance(run["result"], dict) and "raised" in run["result"] for run in expected), (
        "a use that fails"
    )
    for name, mode in MODES.items():
        assert (name, on_an_engine_of_ours(place, use, driver, mode)) == (name, expected)


@pytest.mark.parametrize("driver", ["psycopg2", "psycopg"])
def test_a_task_does_not_commit_a_failed_transaction_in_silence(place: Place, driver: str) -> None:
    """The one difference that is meant: PostgreSQL answers such a COMMIT with ROLLBACK, and SQLAlchemy says nothing."""

    def commits(engine: sqlalchemy.Engine) -> object:
        with engine.connect() as connection:
            connection.execute(text("insert into orders (sku) values ('lost')"))
            caught(connection.execute, text("select 1/0"))
            return caught(connection.commit)

    use = Use(commits)
    expected = on_a_plain_engine(place, use, driver)
    assert expected[0]["result"] is None
    for name, mode in MODES.items():
        found = on_an_engine_of_ours(place, use, driver, mode)
        if name != "outside a task":
            for run in found:
                result = run["result"]
                assert isinstance(result, dict)
                assert result["class"] == "sqlalchemy.exc.PendingRollbackError"
                run["result"] = None
        assert (name, found) == (name, expected)
