"""The SQLAlchemy adapter: bounded waits by default, the user's options first, sizes from the execution pool."""

from __future__ import annotations

import os
import threading
import time
from typing import Any

import pytest
import sqlalchemy
from sqlalchemy import make_url, text
from sqlalchemy.exc import OperationalError
from sqlalchemy.pool import NullPool, QueuePool

from tests.support.databases import Database
from tests.support.inspect import backends
from workerpools import ConfigurationError, WorkerPools
from workerpools._pools.shared import ExecutionPool
from workerpools.sqlalchemy import LIBPQ_DEFAULTS, MYSQL_DEFAULTS, SQLAlchemyEngine, connect_defaults, pool_defaults

DRIVERS = ["psycopg2", "psycopg"]


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        (
            "postgresql+psycopg2://db/shop",
            {"connect_timeout": 5, "application_name": f"workerpools db pid={os.getpid()}", **LIBPQ_DEFAULTS},
        ),
        (
            "postgresql+psycopg://db/shop",
            {"connect_timeout": 5, "application_name": f"workerpools db pid={os.getpid()}", **LIBPQ_DEFAULTS},
        ),
        (
            "postgresql+psycopg2://db/shop?keepalives=0&application_name=mine&connect_timeout=9",
            {key: value for key, value in LIBPQ_DEFAULTS.items() if key != "keepalives"},
        ),
        ("mysql+pymysql://db/shop", {"connect_timeout": 5, **MYSQL_DEFAULTS}),
        ("mysql+mysqldb://db/shop?read_timeout=600", {"connect_timeout": 5, "write_timeout": 30}),
        ("sqlite://", {}),
        (
            "postgresql+asyncpg://db/shop",
            {"timeout": 5.0, "server_settings": {"application_name": f"workerpools db pid={os.getpid()}"}},
        ),
        ("oracle+oracledb://db/shop", {}),
    ],
)
def test_connect_defaults(url: str, expected: dict[str, Any]) -> None:
    """What bounds every wait, and nothing that the URL sets already."""
    assert connect_defaults(make_url(url), resource="db", connect_timeout=5.0) == expected


@pytest.mark.parametrize(("seconds", "whole"), [(0.1, 2), (2.4, 2), (3.6, 4)])
def test_connect_timeouts_are_whole_seconds(seconds: float, whole: int) -> None:
    """As libpq counts them, which takes less than 2 for 2."""
    assert (
        connect_defaults(make_url("postgresql://db"), resource="db", connect_timeout=seconds)["connect_timeout"]
        == whole
    )


def test_a_long_name_fits_the_servers_limit() -> None:
    """PostgreSQL cuts application_name at 63 bytes, with a notice."""
    defaults = connect_defaults(make_url("postgresql://db"), resource="x" * 100, connect_timeout=5)
    assert len(defaults["application_name"]) == 63
    assert defaults["application_name"].endswith(f"xxx pid={os.getpid()}")


def test_a_name_that_is_not_ascii_is_no_longer_than_it_looks() -> None:
    """The server counts bytes, and shows a question mark for each character that is not ASCII."""
    defaults = connect_defaults(make_url("postgresql://db"), resource="Bestände" * 9, connect_timeout=5)
    name = defaults["application_name"]
    assert len(name.encode()) == 63
    assert name.startswith("workerpools Best?ndeBest?nde")


@pytest.mark.parametrize(
    ("execution_pool", "expected"),
    [
        (ExecutionPool("prefork", 1), {"pool_size": 1, "max_overflow": 1}),
        (ExecutionPool("solo", 1), {"pool_size": 1, "max_overflow": 1}),
        (ExecutionPool("threads", 8), {"pool_size": 8, "max_overflow": 1}),
        (ExecutionPool(), {}),
    ],
)
def test_sizes_follow_the_execution_pool(execution_pool: ExecutionPool, expected: dict[str, int]) -> None:
    """A connection for each task that runs at a time, and one to spare; outside a worker SQLAlchemy's sizes."""
    assert pool_defaults(execution_pool, 10.0) == {"pool_timeout": 10.0, "pool_use_lifo": True, **expected}


@pytest.mark.parametrize("driver", DRIVERS)
def test_the_server_sees_the_defaults(database: Database, driver: str) -> None:
    """The session has the resource's name, and the socket has keepalives."""
    with WorkerPools() as pools:
        engine = pools.add(SQLAlchemyEngine(database.url(driver)), name="orders").get()
        with engine.connect() as connection:
            connection.execute(text("select 1"))
            assert [backend.application_name for backend in backends(database.dsn, "workerpools %")] == [
                f"workerpools orders pid={os.getpid()}"
            ]
            parameters = _parameters(connection)
            assert {key: parameters[key] for key in LIBPQ_DEFAULTS} == {
                key: str(value) for key, value in LIBPQ_DEFAULTS.items()
            }
    assert backends(database.dsn, "workerpools %") == []


def _parameters(connection: sqlalchemy.Connection) -> dict[str, str]:
    driver_connection: Any = connection.connection.driver_connection
    parameters: dict[str, str] = (
        driver_connection.info.dsn_parameters
        if hasattr(driver_connection.info, "dsn_parameters")
        else driver_connection.info.get_parameters()
    )
    return parameters


def test_options_of_the_user_win(database: Database) -> None:
    """Those of create_engine, of connect_args, and of the URL."""
    with WorkerPools() as pools:
        engine = pools.add(
            SQLAlchemyEngine(
                database.url(),
                pool_size=3,
                max_overflow=4,
                pool_timeout=0.5,
                connect_args={"application_name": "mine"},
                isolation_level="REPEATABLE READ",
            ),
            name="db",
        ).get()
        assert isinstance(engine.pool, QueuePool)
        assert (engine.pool.size(), engine.pool.timeout()) == (3, 0.5)
        with engine.connect() as connection:
            assert connection.get_isolation_level() == "REPEATABLE READ"
            assert [backend.application_name for backend in backends(database.dsn, "mine")] == ["mine"]


@pytest.mark.parametrize("url", ["sqlite://", "sqlite:///{path}/shop.db"])
def test_sqlite_works(url: str, tmp_path: Any) -> None:
    """In memory, whose pool takes no sizes, and in a file."""
    with WorkerPools() as pools:
        engine = pools.add(SQLAlchemyEngine(url.format(path=tmp_path)), name="db").get()
        with engine.begin() as connection:
            assert connection.execute(text("select 1")).scalar() == 1


def test_other_pools_are_left_alone(database: Database) -> None:
    """NullPool refuses the options of a queue."""
    with WorkerPools() as pools:
        engine = pools.add(SQLAlchemyEngine(database.url(), poolclass=NullPool), name="db").get()
        with engine.connect() as connection:
            assert connection.execute(text("select 1")).scalar() == 1
        assert backends(database.dsn, "workerpools %") == []


def test_a_wrong_url_is_refused_without_showing_it() -> None:
    """SQLAlchemy's own message repeats the whole text."""
    with pytest.raises(ConfigurationError) as caught:
        SQLAlchemyEngine("postgresql:/app:secret@db")
    assert "secret" not in str(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__


def test_the_resource_tells_no_secret() -> None:
    """Neither the repr nor the description holds the password, wherever the URL has it."""
    adapter = SQLAlchemyEngine("postgresql://app:secret@db/shop?password=secret&sslpassword=secret")
    assert adapter.describe() == "SQLAlchemyEngine postgresql://app@db/shop"


@pytest.mark.parametrize("driver", DRIVERS)
def test_a_silent_server_is_given_up(database: Database, driver: str, proxy_to: Any) -> None:
    """Connecting to a server that accepts and never answers ends by the connect timeout."""
    proxy = proxy_to(database)
    proxy.blackhole()
    with WorkerPools() as pools:
        engine = pools.add(SQLAlchemyEngine(database.through(proxy).url(driver), connect_timeout=2), name="db").get()
        begun = time.monotonic()
        with pytest.raises(OperationalError) as caught:
            engine.connect()
        assert time.monotonic() - begun < 30
        assert "'db'" in caught.value.__notes__[0]


def test_waiting_for_a_connection_is_bounded(database: Database) -> None:
    """A pool without a free connection fails in time."""
    with WorkerPools() as pools:
        adapter = SQLAlchemyEngine(database.url(), pool_size=1, max_overflow=0, acquire_timeout=0.1)
        engine = pools.add(adapter, name="db").get()
        with engine.connect(), pytest.raises(sqlalchemy.exc.TimeoutError) as caught:
            engine.connect()
    assert str(caught.value).startswith(
        "QueuePool limit of size 1 overflow 0 reached, connection timed out, timeout 0.10; all connections of the "
        "resource 'db' are in use: raise its max_overflow or pool_size, or have them given back sooner"
    )


def test_a_full_pool_from_settings_names_the_settings(database: Database) -> None:
    """By the names that the user wrote."""
    settings = {"database_url": database.url(), "database_pool_size": 1, "database_max_overflow": 0}
    with WorkerPools() as pools:
        adapter = SQLAlchemyEngine.from_settings({**settings, "database_acquire_timeout": 0.1})
        engine = pools.add(adapter, name="engine").get()
        with (
            engine.connect(),
            pytest.raises(
                sqlalchemy.exc.TimeoutError,
                match=r"'engine' .*raise its workerpools_database_max_overflow or workerpools_database_pool_size",
            ),
        ):
            engine.connect()


def test_closing_waits_for_connections_in_use(database: Database) -> None:
    """A transaction of another thread ends before its connection is closed, and nothing is left on the server."""
    with WorkerPools() as pools:
        resource = pools.add(SQLAlchemyEngine(database.url()), name="db")
        engine = resource.get()
        begun = threading.Event()
        outcome: list[object] = []

        def transaction() -> None:
            with engine.begin() as connection:
                begun.set()
                outcome.append(connection.execute(text("select pg_sleep(0.5)")).rowcount)

        thread = threading.Thread(target=transaction)
        thread.start()
        begun.wait(30)
        resource.close(timeout=10)
        assert outcome == [1]
        assert backends(database.dsn, "workerpools %") == []
        thread.join()
