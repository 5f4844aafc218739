"""Each fault of a real PostgreSQL server, as psycopg2 and psycopg 3 see it."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import psycopg
import psycopg2
import pytest

from demo_tasks.servers import PostgresServer, ServerError, Workspace
from tests.servers.helpers import eventually
from tests.support.databases import Database
from tests.support.faults import connection_limit, down_for, ordinary_role, read_only, restart, terminate_backends
from tests.support.inspect import children_of, is_alive
from tests.support.paths import environment

Connect = Callable[..., Any]

INSERT = "INSERT INTO t VALUES (1)"


@pytest.fixture(params=["psycopg2", "psycopg"])
def connect(request: pytest.FixtureRequest) -> Connect:
    """Open a connection in autocommit with one of the drivers."""
    driver = {"psycopg2": psycopg2, "psycopg": psycopg}[request.param]

    def opened(database: Database, **options: Any) -> Any:
        connection = driver.connect(database.dsn, **options)
        connection.autocommit = True
        return connection

    return opened


@pytest.fixture
def table(database: Database) -> Database:
    """The test's database with an empty table `t`."""
    database.execute("CREATE TABLE t (n int)")
    return database


@pytest.fixture
def pooled(table: Database, connect: Connect) -> Iterator[Any]:
    """A connection that was used before the fault."""
    with closing(connect(table, application_name="workerpools db pid=1")) as connection:
        run(connection, INSERT)
        yield connection


def run(connection: Any, statement: str) -> Any:
    cursor = connection.cursor()
    cursor.execute(statement)
    return cursor.fetchone()[0] if cursor.description else None


def error_of(function: Callable[[], object]) -> tuple[str, str | None, str]:
    """Return the name of the driver's error, its SQLSTATE and its text."""
    with pytest.raises((psycopg.Error, psycopg2.Error)) as caught:
        function()
    exc: Any = caught.value
    return type(exc).__name__, exc.sqlstate if isinstance(exc, psycopg.Error) else exc.pgcode, str(exc)


def assert_lost(connection: Any) -> None:
    """Assert that the connection is found dead, without a reason."""
    kind, code, text = error_of(lambda: run(connection, "SELECT 1"))
    assert (kind, code, connection.closed != 0) == ("OperationalError", None, True)
    assert "server closed the connection unexpectedly" in text


def assert_refused_at_connect(connect: Connect, database: Database, text: str) -> None:
    """Assert that no connection is made, for this reason; at connect neither driver carries a SQLSTATE."""
    kind, code, message = error_of(lambda: connect(database))
    assert (kind, code, text in message) == ("OperationalError", None, True), message


def test_terminated_backends(table: Database, pooled: Any, connect: Connect) -> None:
    """The library's idle session is ended, others stay; psycopg 3 alone is told why."""
    with closing(connect(table, application_name="psql")) as other:
        assert terminate_backends(table) == 1
        kind, code, _ = error_of(lambda: run(pooled, "SELECT 1"))
        expected = ("AdminShutdown", "57P01") if isinstance(pooled, psycopg.Connection) else ("OperationalError", None)
        assert (kind, code) == expected
        assert pooled.closed
        assert run(other, "SELECT 1") == 1
        assert terminate_backends(table) == 0
        assert terminate_backends(table, "%") == 1


def test_read_only_on_a_live_session(
    postgres_server: PostgresServer, table: Database, pooled: Any, connect: Connect
) -> None:
    """A session that was used before cannot write any more, stays connected, and can write again afterwards."""
    with read_only(postgres_server):
        for connection in (pooled, connect(table)):
            kind, code, text = error_of(lambda used=connection: run(used, INSERT))  # type: ignore[misc]
            assert (kind, code) == ("ReadOnlySqlTransaction", "25006")
            assert "cannot execute INSERT in a read-only transaction" in text
            assert not connection.closed
            # Why a check at checkout does not find it.
            assert run(connection, "SELECT 1") == 1
        connection.close()
    run(pooled, INSERT)
    assert table.execute("SELECT count(*) FROM t") == [(2,)]


def test_read_only_with_a_new_primary(
    postgres_server: PostgresServer, table: Database, pooled: Any, connect: Connect
) -> None:
    """With `recovered` the old session is read-only while a new one writes."""
    with read_only(postgres_server, recovered=table):
        assert error_of(lambda: run(pooled, INSERT))[1] == "25006"
        with closing(connect(table)) as fresh:
            run(fresh, INSERT)
        assert error_of(lambda: run(pooled, INSERT))[1] == "25006"
    run(pooled, INSERT)
    with closing(connect(table)) as fresh:
        run(fresh, INSERT)
    assert table.execute("SELECT setconfig FROM pg_db_role_setting WHERE setrole = 0") == []


def test_read_only_spares_an_open_transaction(postgres_server: PostgresServer, table: Database, pooled: Any) -> None:
    """A transaction that writes goes on and commits; the next one is read-only."""
    run(pooled, "BEGIN")
    run(pooled, INSERT)
    with read_only(postgres_server):
        run(pooled, INSERT)
        run(pooled, "COMMIT")
        assert error_of(lambda: run(pooled, INSERT))[1] == "25006"
    assert table.execute("SELECT count(*) FROM t") == [(3,)]


def test_read_only_is_undone_after_a_failure_and_a_stop(postgres_server: PostgresServer, table: Database) -> None:
    """The server is as before although the block raised and left it down."""
    with pytest.raises(ZeroDivisionError), read_only(postgres_server, recovered=table):
        postgres_server.stop()
        raise ZeroDivisionError
    table.execute(INSERT)
    assert table.execute("SHOW default_transaction_read_only") == [("off",)]


def test_what_a_database_sets_does_not_reach_a_live_session(
    postgres_server: PostgresServer, table: Database, pooled: Any, connect: Connect
) -> None:
    """ALTER DATABASE is for new sessions: why `read_only` changes the server's configuration."""
    table.execute(f"ALTER DATABASE {table.name} SET default_transaction_read_only = on")
    run(pooled, INSERT)
    with closing(connect(table)) as fresh:
        assert error_of(lambda: run(fresh, INSERT))[1] == "25006"


def test_connection_limit(table: Database, connect: Connect) -> None:
    """An ordinary role is refused, the superuser of the tests is not."""
    with ordinary_role(table) as limited, closing(connect(limited)) as open_before:
        run(open_before, INSERT)
        with connection_limit(table, 1):
            assert_refused_at_connect(connect, limited, f'FATAL:  too many connections for database "{table.name}"')
            run(open_before, INSERT)
            connect(table).close()
        connect(limited).close()


def test_an_ordinary_role_leaves_nothing(table: Database, connect: Connect) -> None:
    """The role uses tables like an application, and is gone with its own ones and its sessions."""
    with ordinary_role(table) as ordinary, closing(connect(ordinary)) as connection:
        assert run(connection, "SELECT rolsuper FROM pg_roles WHERE rolname = current_user") is False
        run(connection, INSERT)
        run(connection, "CREATE TABLE own (id serial)")
        left = connect(ordinary)
    with closing(left):
        assert error_of(lambda: run(left, "SELECT 1"))[0] in ("AdminShutdown", "OperationalError")
    assert_refused_at_connect(connect, ordinary, f'password authentication failed for user "{ordinary.user}"')
    assert table.execute("SELECT to_regclass('own')") == [(None,)]
    assert table.execute("SELECT count(*) FROM pg_roles WHERE rolname = %s", ordinary.user) == [(0,)]


def test_restart(postgres_server: PostgresServer, table: Database, pooled: Any, connect: Connect) -> None:
    """After a crash restart the idle connection is dead and a new one works; what was committed is there."""
    restart(postgres_server)
    assert_lost(pooled)
    with closing(connect(table)) as fresh:
        assert run(fresh, "SELECT count(*) FROM t") == 1


def test_down_for(postgres_server: PostgresServer, table: Database, pooled: Any, connect: Connect) -> None:
    """Connections are refused for so long, and taken again while the block still runs."""
    started = time.monotonic()
    with down_for(postgres_server, 3.0):
        assert_lost(pooled)
        assert_refused_at_connect(connect, table, "Connection refused")
        refusals = set()
        while True:
            try:
                fresh = connect(table)
                break
            except (psycopg.OperationalError, psycopg2.OperationalError) as exc:
                assert time.monotonic() - started < 30
                refusals.add("starting up" if "the database system is starting up" in str(exc) else "refused")
            time.sleep(0.01)
        assert time.monotonic() - started >= 3.0
        assert "refused" in refusals
        with closing(fresh):
            assert run(fresh, "SELECT count(*) FROM t") == 1
    assert postgres_server.running


def test_down_for_waits_at_the_end(postgres_server: PostgresServer, table: Database) -> None:
    """After the block the server answers at once, also when the block was shorter or raised."""
    with pytest.raises(ZeroDivisionError), down_for(postgres_server, 0.5):
        raise ZeroDivisionError
    assert table.execute("SELECT 1") == [(1,)]


def test_a_server_that_is_down_can_be_stopped(postgres_server: PostgresServer) -> None:
    """A stop meanwhile is at once, and leaves no process that waits to become the server."""
    before = set(children_of()) - set(children_of(postgres_server.pid)) - {postgres_server.pid}
    with pytest.raises(ServerError), down_for(postgres_server, 60):
        # Time to become the shell that waits.
        time.sleep(0.5)
        started = time.monotonic()
        postgres_server.stop()
        assert time.monotonic() - started < 5
        assert set(children_of()) <= before
    postgres_server.start()


_DOWN = """
import signal
# As in a test run that a shell started in the background.
for number in (signal.SIGINT, signal.SIGQUIT):
    signal.signal(number, signal.SIG_IGN)
import sys, time, psutil
from demo_tasks.servers import PostgresServer, Workspace
from tests.support.faults import down_for
with Workspace(sys.argv[1]) as workspace, PostgresServer(workspace) as server, down_for(server, 60):
    time.sleep(0.5)
    print(*(child.pid for child in psutil.Process().children(recursive=True)), flush=True)
    time.sleep(60)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's parent-death signal is Linux's")
@pytest.mark.usefixtures("postgres_server")
def test_a_server_that_is_down_ends_with_its_parent() -> None:
    """SIGKILL of the test run while the server is down leaves nothing that would start it later."""
    with Workspace() as outer:
        command = [sys.executable, "-c", _DOWN, str(outer.directory("place"))]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment()) as parent:
            assert parent.stdout is not None
            pids = [int(word) for word in parent.stdout.readline().split()]
            parent.send_signal(signal.SIGKILL)
        assert pids
        assert eventually(lambda: not any(map(is_alive, pids)), 20)
