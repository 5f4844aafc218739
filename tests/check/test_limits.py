"""What real servers say of their limits, and that it is true: so many connections, and one more is refused."""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterator
from contextlib import ExitStack, closing
from typing import Any

import psycopg2
import pytest
from celery import Celery

from demo_tasks.servers import PostgresServer, Workspace
from demo_tasks.servers.binaries import postgres_directory
from tests.support.databases import Database, maintenance
from tests.support.mariadb import MariaDatabase
from tests.support.pgbouncer import PgBouncer, pgbouncer_program
from tests.support.services import require_program
from workerpools import WorkerPools
from workerpools._check.asking import budget_of, planned
from workerpools._check.budget import Row
from workerpools._sql_limits import _pooler
from workerpools.redis import AsyncRedisClient, RedisClient
from workerpools.sqlalchemy import AsyncSQLAlchemyEngine, SQLAlchemyEngine

#: So many slots does the server have, and keeps so many of them from everybody, and so many more from most.
MOST, FOR_SUPERUSERS, FOR_OTHERS = 20, 3, 2


def rows_of(*adapters: Any, workers: int = 1, concurrency: int = 1) -> list[Row]:
    """The budget of planned prefork workers with these resources: db, db1, …."""
    app = Celery("shop", set_as_current=False)
    pools = WorkerPools(app)
    for number, adapter in enumerate(adapters):
        pools.add(adapter, name=f"db{number or ''}")
    found = budget_of(app, planned(app, workers, concurrency))
    assert not any(each.is_open for each in pools.resources)
    return found


@pytest.fixture(scope="module")
def narrow(workspace: Workspace) -> Iterator[PostgresServer]:
    """A PostgreSQL with few slots."""
    require_program(postgres_directory)
    settings = {
        "fsync": "off",
        "max_connections": str(MOST),
        "superuser_reserved_connections": str(FOR_SUPERUSERS),
        "reserved_connections": str(FOR_OTHERS),
        # What would count against max_connections of others, and no more.
        "max_wal_senders": "0",
    }
    with PostgresServer(workspace, settings=settings, name="narrow") as server:
        yield server


@pytest.fixture
def app_role(narrow: PostgresServer) -> Iterator[Database]:
    """A database, and a role that is not a superuser."""
    name, password = f"app_{secrets.token_hex(4)}", secrets.token_urlsafe(12)
    first = maintenance(narrow)
    first.execute(f"CREATE ROLE {name} LOGIN PASSWORD '{password}'")
    first.execute(f"CREATE DATABASE {name}")
    yield Database(narrow.host, narrow.port, name, name, password)
    first.execute(f"DROP DATABASE {name} WITH (FORCE)")
    first.execute(f"DROP ROLE {name}")


def refusal_after(database: Database, count: int) -> str:
    """Open connections, and return with which error one more is refused."""
    with ExitStack() as opened:
        for _ in range(count):
            opened.enter_context(closing(psycopg2.connect(database.dsn)))
        with pytest.raises(psycopg2.OperationalError) as refused:
            opened.enter_context(closing(psycopg2.connect(database.dsn)))
    return str(refused.value)


@pytest.mark.parametrize(
    ("limits", "named", "fits", "refusal"),
    [
        ((), "max_connections", MOST - FOR_SUPERUSERS - FOR_OTHERS, "remaining connection slots are reserved"),
        (("GRANT pg_use_reserved_connections TO {}",), "max_connections", MOST - FOR_SUPERUSERS, "are reserved"),
        (("ALTER ROLE {} CONNECTION LIMIT 7",), "role {}", 7, "too many connections for role"),
        (("ALTER DATABASE {} CONNECTION LIMIT 6",), "database {}", 6, "too many connections for database"),
        (("ALTER ROLE {} SUPERUSER CONNECTION LIMIT 7",), "max_connections", MOST, "too many clients already"),
    ],
)
def test_the_largest_concurrency_fits_and_no_more(
    app_role: Database, limits: tuple[str, ...], named: str, fits: int, refusal: str
) -> None:
    """With one connection per process; a connection of somebody else takes one slot away."""
    first = maintenance_of(app_role)
    for statement in limits:
        first.execute(statement.format(app_role.name))
    with closing(psycopg2.connect(app_role.dsn, application_name="psql")):
        found = rows_of(SQLAlchemyEngine(app_role.url(), pool_size=1, max_overflow=0), concurrency=4)
        tightest = min(found, key=lambda row: row.head_room if row.head_room is not None else 99)
        assert tightest.limit.name == named.format(app_role.name)
        assert re.fullmatch(rf"PostgreSQL \d+\S* at {app_role.host}:{app_role.port}", tightest.limit.server)
        assert (tightest.others, tightest.sum, tightest.head_room) == (1, 4, fits - 1 - 4)
        assert tightest.largest == fits - 1
        assert tightest.limit.clients == ((f"{app_role.user} (psql)", 1),)
        assert refusal in refusal_after(app_role, tightest.largest)


def maintenance_of(database: Database) -> Database:
    return Database(database.host, database.port, "postgres", *_SUPERUSER)


_SUPERUSER: list[str] = []


@pytest.fixture(autouse=True)
def _superuser(narrow: PostgresServer) -> None:
    _SUPERUSER[:] = [narrow.user, narrow.password]


@pytest.mark.parametrize("driver", ["psycopg2", "psycopg", "asyncpg"])
def test_two_engines_of_one_server(app_role: Database, narrow: PostgresServer, driver: str) -> None:
    """They share its slots, whatever the roles, databases, drivers and time zones; ours are no others."""
    app_role.execute(f"ALTER ROLE {app_role.user} SET timezone = 'Asia/Tokyo'")
    adapter: Any = AsyncSQLAlchemyEngine if driver == "asyncpg" else SQLAlchemyEngine
    ours = {"application_name": "workerpools db pid=4711"}
    with closing(psycopg2.connect(app_role.dsn, **ours)), closing(psycopg2.connect(narrow.dsn, **ours)):
        (row,) = rows_of(adapter(app_role.url(driver)), SQLAlchemyEngine(narrow.url()), workers=2, concurrency=2)
    assert (dict(row.resources), row.sum) == ({"db": 8, "db1": 8}, 16)
    # The same name in another database belongs to somebody else's resource.
    assert (row.limit.open, row.limit.own + row.others if row.others is not None else None) == (2, 2)
    assert (row.others, row.head_room) == (1, MOST - FOR_SUPERUSERS - FOR_OTHERS - 1 - 16)


def test_a_server_that_is_full_or_refuses(app_role: Database) -> None:
    """The reason is told, and no password is."""
    first = maintenance_of(app_role)
    first.execute(f"ALTER ROLE {app_role.user} CONNECTION LIMIT 0")
    (row,) = rows_of(SQLAlchemyEngine(app_role.url()))
    assert (row.limit.most, row.head_room) == (None, None)
    assert "too many connections for role" in row.limit.unknown
    (row,) = rows_of(SQLAlchemyEngine(app_role.url().replace(app_role.password, "wr-ong")))
    assert "password authentication failed" in row.limit.unknown
    assert "wr-ong" not in repr(row)


def test_what_cannot_be_asked(app_role: Database) -> None:
    """A pool without a limit, a database in a file, and an error of the user's own."""

    def fails(engine: object) -> None:
        raise ValueError(app_role.password)

    endless, failing = rows_of(
        SQLAlchemyEngine(app_role.url(), max_overflow=-1), SQLAlchemyEngine("sqlite://"),
        SQLAlchemyEngine(app_role.url(), on_open=fails),
    )  # fmt: skip
    assert (dict(endless.resources), endless.sum, endless.largest) == ({"db": None}, None, None)
    assert endless.limit.most == MOST
    assert failing.limit.unknown == "asking for it raised ValueError"
    assert app_role.password not in repr(failing)


def test_mariadb(maria_database: MariaDatabase) -> None:
    """Of the server, and of the account."""
    name, password = f"app_{secrets.token_hex(4)}", secrets.token_urlsafe(12)
    most = int(str(maria_database.execute("SELECT @@max_connections")[0][0]))
    maria_database.execute(
        f"CREATE USER {name}@'{maria_database.host}' IDENTIFIED BY '{password}' WITH MAX_USER_CONNECTIONS 5"
    )
    maria_database.execute(f"GRANT ALL ON {maria_database.name}.* TO {name}@'{maria_database.host}'")
    try:
        own = MariaDatabase(maria_database.host, maria_database.port, maria_database.name, name, password)
        with ExitStack() as opened:
            first = SQLAlchemyEngine(own.url(), pool_size=1, max_overflow=0)
            connect = _pymysql(own)
            opened.enter_context(closing(connect()))
            of_server, of_user = rows_of(first, concurrency=2)
            assert (of_server.limit.name, of_server.limit.most) == ("max_connections", most)
            assert of_server.limit.server.startswith("MariaDB ")
            assert (of_user.limit.name, of_user.limit.most, of_user.others) == (f"user {name}", 5, 1)
            assert (of_user.head_room, of_user.largest) == (5 - 1 - 2, 4)
            for _ in range(of_user.largest or 0):
                opened.enter_context(closing(connect()))
            with pytest.raises(Exception, match="max_user_connections"):
                opened.enter_context(closing(connect()))
            (refused,) = rows_of(first)
            assert "max_user_connections" in refused.limit.unknown
            assert password not in repr(refused)
    finally:
        maria_database.execute(f"DROP USER {name}@'{maria_database.host}'")


def _pymysql(database: MariaDatabase) -> Any:
    import pymysql

    def connect() -> Any:
        return pymysql.connect(
            host=database.host, port=database.port, user=database.user, password=database.password,
            database=database.name, connect_timeout=10,
        )  # fmt: skip

    return connect


@pytest.mark.parametrize("mode", ["transaction", "session"])
def test_pgbouncer(app_role: Database, workspace: Workspace, mode: Any) -> None:
    """Its limit on clients refuses, its pool keeps transactions waiting; in session mode it keeps clients waiting."""
    require_program(pgbouncer_program)
    settings = {"max_client_conn": "9", "stats_users": app_role.user}
    with PgBouncer(
        workspace, app_role, pool_mode=mode, default_pool_size=3, settings=settings, name=f"narrow-{mode}"
    ) as bouncer:
        there = bouncer.database
        with closing(psycopg2.connect(there.dsn)):
            for driver in ("psycopg2", "psycopg"):
                adapter = SQLAlchemyEngine(
                    there.url(driver), pgbouncer=mode == "transaction", pool_size=1, max_overflow=0
                )
                clients, pool = rows_of(adapter, concurrency=4)
                assert (clients.limit.server, clients.limit.name) == (
                    f"PgBouncer at {there.host}:{there.port}",
                    "max_client_conn",
                )
                assert (clients.limit.most, clients.others, clients.head_room, clients.largest) == (9, 1, 4, 8)
                assert (pool.limit.name, pool.limit.most) == (f"pool of {app_role.name}, {app_role.user}", 3)
                assert (pool.limit.waits, pool.head_room) == (mode == "transaction", -1 - (mode == "session"))
        # Once the console's connection has gone.
        assert "no more connections allowed" in refusal_after(there, clients.largest + 1)


def test_pgbouncers_console_is_closed(app_role: Database, workspace: Workspace) -> None:
    """Whoever is not among its users is not told, and that is said; nor that it is PgBouncer."""
    require_program(pgbouncer_program)
    with PgBouncer(workspace, app_role, name="narrow-closed") as bouncer:
        there = bouncer.database
        (row,) = rows_of(SQLAlchemyEngine(there.url(), pgbouncer=True))
    assert row.limit.most is None
    assert row.limit.server == f"a connection pooler at {there.host}:{there.port}"
    assert row.limit.unknown == (
        "it has no console for this user (OperationalError); if it is PgBouncer, add the user to stats_users"
    )


@pytest.mark.parametrize("driver", ["psycopg2", "psycopg"])
def test_a_pooler_that_is_not_pgbouncer(app_role: Database, driver: str) -> None:
    """One that passes the database of the console's name on, as any other; it is not called PgBouncer."""
    first = maintenance_of(app_role)
    first.execute("CREATE DATABASE pgbouncer")
    try:
        (row,) = rows_of(SQLAlchemyEngine(app_role.url(driver), pgbouncer=True))
    finally:
        first.execute("DROP DATABASE pgbouncer WITH (FORCE)")
    assert row.limit.server == f"a connection pooler at {app_role.host}:{app_role.port}"
    assert row.limit.most is None
    assert row.limit.unknown == "it does not tell its version as PgBouncer does (UndefinedObject)"


@pytest.mark.parametrize(("version", "known"), [("PgCat 1.2.0", False), ("PgBouncer 1.24.1", True)])
def test_a_pooler_that_tells_its_version(version: str, known: bool) -> None:
    """PgCat's console has the same name."""

    class Console:
        """Answers one question."""

        description: tuple[tuple[str], ...] = (("version",),)
        closed = False

        def cursor(self) -> closing[Console]:
            return closing(self)

        def execute(self, question: str) -> None:
            if question != "SHOW VERSION":
                raise ValueError(question)

        def fetchall(self) -> list[tuple[str]]:
            return [(version,)]

        def close(self) -> None:
            self.closed = True

    console = Console()
    (limit,) = _pooler(lambda: console, "app", "shop", "db:5432")
    assert (limit.server, limit.most) == ("PgBouncer at db:5432" if known else "a connection pooler at db:5432", None)
    assert console.closed


@pytest.mark.parametrize("adapter", [RedisClient, AsyncRedisClient])
def test_valkey(broker_url: str, adapter: Any) -> None:
    """``maxclients`` and who is connected."""
    (row,) = rows_of(adapter(broker_url, max_connections=7), workers=2, concurrency=3)
    assert (row.limit.name, row.sum) == ("maxclients", 2 * 3 * 7)
    assert row.limit.most is not None
    assert row.limit.most >= 1000
    assert row.others == row.limit.open
    assert ":" + broker_url.split(":")[2].split("@")[0] not in repr(row)
