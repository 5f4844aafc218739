"""The PgBouncer of the tests, seen through both drivers."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import psycopg
import psycopg2
import pytest

from demo_tasks.servers import ServerError, Workspace
from tests.servers.helpers import NOBODY, eventually, python_for, start_python
from tests.support import pgbouncer as module
from tests.support.databases import Database
from tests.support.inspect import children_of, is_alive, tcp_connections_to
from tests.support.paths import environment
from tests.support.pgbouncer import PgBouncer, pgbouncer_program
from tests.support.services import require

NOWHERE = Database("127.0.0.1", 1, "nowhere", "somebody", "secret")

Make = Callable[..., PgBouncer]


@pytest.fixture(params=["psycopg2", "psycopg"])
def connect(request: pytest.FixtureRequest) -> Callable[[Database], Any]:
    """Open a connection in autocommit with one of the drivers."""
    if request.param == "psycopg":
        return lambda database: psycopg.connect(database.dsn, autocommit=True, prepare_threshold=None)

    def plain(database: Database) -> Any:
        connection = psycopg2.connect(database.dsn)
        connection.autocommit = True
        return connection

    return plain


@pytest.fixture
def program() -> Path:
    """The program, for a test that does without a database."""
    try:
        return pgbouncer_program()
    except ServerError as exc:
        require(False, str(exc))
        raise


def run(connection: Any, statement: str = "SELECT 1") -> Any:
    cursor = connection.cursor()
    cursor.execute(statement)
    return cursor.fetchone()[0] if cursor.description else None


def error_of(function: Callable[[], object]) -> tuple[type[Exception], str | None, str]:
    """Return the class of the driver's error, its SQLSTATE and its text."""
    with pytest.raises((psycopg.Error, psycopg2.Error)) as caught:
        function()
    exc: Any = caught.value
    code = exc.sqlstate if isinstance(exc, psycopg.Error) else exc.pgcode
    return type(exc), code, str(exc)


def assert_lost(connection: Any) -> None:
    """Assert that the connection is found dead, without a reason."""
    kind, code, text = error_of(lambda: run(connection))
    assert issubclass(kind, (psycopg.OperationalError, psycopg2.OperationalError))
    assert (code, "server closed the connection unexpectedly" in text) == (None, True)
    assert connection.closed


def assert_refused_by_bouncer(connection: Any, reason: str) -> None:
    """Assert that PgBouncer ends the connection; psycopg2 does not tell its reason, psycopg 3 has 08P01."""
    kind, code, text = error_of(lambda: run(connection))
    if isinstance(connection, psycopg.Connection):
        assert (kind, code, reason in text) == (psycopg.errors.ProtocolViolation, "08P01", True)
    else:
        assert (kind, code) == (psycopg2.OperationalError, None)
        assert "server closed the connection unexpectedly" in text
    assert connection.closed


def test_clients_share_server_connections(database: Database, pgbouncer_to: Make, connect: Any) -> None:
    """In transaction mode ten clients take turns on one server connection."""
    bouncer = pgbouncer_to(database, default_pool_size=1)
    clients = [connect(bouncer.database) for _ in range(10)]
    assert len({run(client, "SELECT pg_backend_pid()") for client in clients}) == 1
    [pool] = [row for row in bouncer.console("SHOW POOLS") if row["database"] == database.name]
    assert (pool["cl_active"], pool["sv_idle"]) == (10, 1)
    for client in clients:
        client.close()


def test_session_mode_keeps_a_server_connection(database: Database, pgbouncer_to: Make, connect: Any) -> None:
    """In session mode two clients have two server connections, and one more waits until it is disconnected."""
    bouncer = pgbouncer_to(database, pool_mode="session", default_pool_size=2, query_wait_timeout=1)
    with closing(connect(bouncer.database)) as first, closing(connect(bouncer.database)) as second:
        assert run(first, "SELECT pg_backend_pid()") != run(second, "SELECT pg_backend_pid()")
        with pytest.raises(TimeoutError):
            bouncer.pause(timeout=0.2)
        with closing(connect(bouncer.database)) as third:
            assert_refused_by_bouncer(third, "query_wait_timeout")


def test_options_of_the_client_pass(database: Database, pgbouncer_to: Make) -> None:
    """What libpq sends in the startup packet is no reason to refuse; the application's name reaches the server."""
    bouncer = pgbouncer_to(database)
    more = {"application_name": "workerpools db pid=1", "options": "-c extra_float_digits=3", "connect_timeout": 5}
    for driver in (psycopg2, psycopg):
        with closing(driver.connect(bouncer.database.dsn, **more)) as connection:
            assert run(connection, "SELECT current_setting('application_name')") == "workerpools db pid=1"


def test_a_wrong_password_is_refused(database: Database, pgbouncer_to: Make) -> None:
    """PgBouncer checks passwords itself, so a stranger on the machine does not get in."""
    bouncer = pgbouncer_to(database)
    wrong = Database(bouncer.host, bouncer.port, database.name, database.user, "wrong")
    with pytest.raises(psycopg2.OperationalError, match="SASL authentication failed"):
        psycopg2.connect(wrong.dsn)


def test_pause_holds_statements_back(database: Database, pgbouncer_to: Make, connect: Any) -> None:
    """A statement that comes during a pause is answered after it."""
    bouncer = pgbouncer_to(database)
    with closing(connect(bouncer.database)) as connection:
        run(connection)
        bouncer.pause()
        started = time.monotonic()
        later = threading.Timer(0.4, bouncer.resume)
        later.start()
        assert run(connection) == 1
        assert 0.4 <= time.monotonic() - started < 5
        later.join()


def test_query_wait_timeout_ends_the_wait(database: Database, pgbouncer_to: Make, connect: Any) -> None:
    """A pause that is too long costs the connection; a new one works after it."""
    bouncer = pgbouncer_to(database, query_wait_timeout=1)
    with closing(connect(bouncer.database)) as connection:
        run(connection)
        bouncer.pause()
        started = time.monotonic()
        assert_refused_by_bouncer(connection, "query_wait_timeout")
        assert 1 <= time.monotonic() - started < 5
    bouncer.resume()
    with closing(connect(bouncer.database)) as connection:
        assert run(connection) == 1


def test_pause_gives_up_on_an_open_transaction(database: Database, pgbouncer_to: Make, connect: Any) -> None:
    """A pause that cannot begin says so, and holds nobody up afterwards."""
    bouncer = pgbouncer_to(database)
    with closing(connect(bouncer.database)) as busy, closing(connect(bouncer.database)) as other:
        run(busy, "BEGIN")
        with pytest.raises(TimeoutError, match="PAUSE"):
            bouncer.pause(timeout=0.2)
        assert (run(busy), run(other)) == (1, 1)


@pytest.mark.parametrize("how", ["immediate", "graceful", "kill"])
def test_a_restart_ends_idle_clients(database: Database, pgbouncer_to: Make, connect: Any, how: str) -> None:
    """Each way to end it closes idle connections without a word; it comes back on the same port."""
    bouncer = pgbouncer_to(database)
    with closing(connect(bouncer.database)) as connection:
        run(connection)
        port, pid = bouncer.port, bouncer.pid
        if how == "kill":
            bouncer.kill()
            assert not bouncer.running
            kind, code, text = error_of(lambda: connect(bouncer.database))
            assert (kind.__name__, code, "Connection refused" in text) == ("OperationalError", None, True)
            bouncer.start()
        else:
            bouncer.restart(immediate=how == "immediate")
        assert bouncer.port == port
        assert bouncer.pid != pid
        assert_lost(connection)
    with closing(connect(bouncer.database)) as connection:
        assert run(connection) == 1


def test_a_graceful_stop_waits_for_a_transaction(database: Database, pgbouncer_to: Make, connect: Any) -> None:
    """The transaction under way is committed, and the stop takes until then."""
    bouncer = pgbouncer_to(database)
    database.execute("CREATE TABLE t (n int)")
    with closing(connect(bouncer.database)) as connection:
        run(connection, "BEGIN")
        run(connection, "INSERT INTO t VALUES (1)")
        later = threading.Timer(0.4, run, (connection, "COMMIT"))
        started = time.monotonic()
        later.start()
        bouncer.stop(immediate=False)
        assert 0.4 <= time.monotonic() - started < 5
        later.join()
        assert_lost(connection)
    assert database.execute("SELECT n FROM t") == [(1,)]


def test_a_terminated_backend_is_not_seen_by_an_idle_client(
    database: Database, pgbouncer_to: Make, connect: Any
) -> None:
    """PgBouncer replaces a server connection that died idle; one in a transaction takes its client with it."""
    bouncer = pgbouncer_to(database)
    end = "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE datname = current_database()"
    with closing(connect(bouncer.database)) as connection:
        run(connection)
        database.execute(f"{end} AND pid <> pg_backend_pid()")
        assert run(connection) == 1
        run(connection, "BEGIN")
        database.execute(f"{end} AND pid <> pg_backend_pid()")
        kind, code, _ = error_of(lambda: run(connection))
        expected = ("AdminShutdown", "57P01") if "psycopg.errors" in str(kind) else ("OperationalError", None)
        assert (kind.__name__, code) == expected


def test_two_at_once_leave_nothing_behind(database: Database, program: Path, tmp_path_factory: Any) -> None:
    """Two run side by side on ports of their own; afterwards no process, file or connection is left."""
    before = set(children_of())
    with Workspace() as workspace:
        with PgBouncer(workspace, database, name="a") as one, PgBouncer(workspace, database, name="b") as two:
            assert one.port != two.port
            assert [bouncer.database.execute("SELECT 1") for bouncer in (one, two)] == [[(1,)], [(1,)]]
            pids = {one.pid or 0, two.pid or 0}
            for pid in pids:
                assert (
                    psutil.Process(pid).uids().real != 0 or Path(f"/proc/{pid}/uid_map").read_text().split()[0] != "0"
                )
            for path in (one.directory / "userlist.txt", one.directory / "pgbouncer.ini"):
                assert path.stat().st_mode & 0o777 == 0o600
        assert not any(map(is_alive, pids))
        assert not any(connection.pid in pids for connection in tcp_connections_to(database.port))
        assert set(children_of()) <= before
        path = workspace.path
    assert not path.exists()


def test_a_port_that_is_taken_is_no_success(program: Path) -> None:
    """A second one on the same port fails, although somebody answers there."""
    with Workspace() as workspace, PgBouncer(workspace, NOWHERE) as first:
        second = PgBouncer(workspace, NOWHERE, name="second")
        second._port = first.port
        with pytest.raises(ServerError, match="already in use"):
            second.start()
        assert first.console("SHOW VERSION")


def test_a_missing_program_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The message says what to install."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(module, "_DEBIAN", str(tmp_path / "pgbouncer"))
    with pytest.raises(ServerError, match="apt-get install pgbouncer"):
        pgbouncer_program()


_RUN = """
import os, sys, time
from demo_tasks.servers import Workspace
from tests.support.databases import Database
from tests.support.pgbouncer import PgBouncer
with Workspace(sys.argv[1]) as workspace:
    with PgBouncer(workspace, Database("127.0.0.1", 1, "nowhere", "somebody", "secret")) as bouncer:
        bouncer.restart()
        print(bouncer.pid, os.geteuid(), flush=True)
        time.sleep(float(sys.argv[2]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's parent-death signal is Linux's")
@pytest.mark.parametrize("mode", [0o711, 0o700], ids=["shared-tmp", "private-tmp"])
def test_it_ends_with_its_parent(program: Path, mode: int) -> None:
    """SIGKILL of the process that started it ends it, whichever user it runs as."""
    with Workspace() as outer:
        place = outer.path / "place"
        place.mkdir()
        place.chmod(mode)
        command = [sys.executable, "-c", _RUN, str(place), "60"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment()) as parent:
            assert parent.stdout is not None
            pid = int(parent.stdout.readline().split()[0])
            assert is_alive(pid)
            parent.send_signal(signal.SIGKILL)
        assert eventually(lambda: not is_alive(pid), 5)


def test_a_normal_user_can_run_it(program: Path) -> None:
    """A normal user starts it as themselves; root tries that as nobody."""
    if os.geteuid() != 0:
        with Workspace() as workspace, PgBouncer(workspace, NOWHERE) as bouncer:
            assert psutil.Process(bouncer.pid).uids().real == os.geteuid()
        return
    with Workspace() as outer:
        place = outer.path / "place"
        place.mkdir()
        place.chmod(0o1777)
        python, reason = python_for(NOBODY, ("demo_tasks", "psycopg2", "redis"), outer.path)
        if python is None:
            pytest.skip(reason)
        process = start_python(_RUN, place, 0, python=python, user=NOBODY, environ={"TMPDIR": str(place)})
        output, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
        assert output.split()[1] == str(NOBODY)
        assert list(place.iterdir()) == []
