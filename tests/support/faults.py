"""What goes wrong with a real PostgreSQL server while an application uses it.

The functions log in as the role of the `Database` that they are given, which must be a superuser's and lead to the
server itself, not through a PgBouncer.
"""

from __future__ import annotations

import secrets
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from demo_tasks.servers import PortTakenError, PostgresServer, ServerProcess
from demo_tasks.servers.command import Command
from tests.support.databases import Database, maintenance

_SECONDS = 10.0
# A stop, or the death of this process, must not leave the sleep behind. The trap is set before there is one, and its
# signal is one that the child cannot swallow while it is still a copy of the shell.
_LATER = """
trap 'kill -KILL $! 2>/dev/null; exit 1' INT QUIT TERM
sleep "$0" & wait $!
trap - INT QUIT TERM
exec "$@"
"""


def terminate_backends(database: Database, application_name_like: str = "workerpools %") -> int:
    """Terminate sessions of a database and wait until they have ended.

    Args:
        database: The database; sessions of others stay.
        application_name_like: A LIKE pattern for the sessions' application name; by default the sessions that the
            library opened. "%" is every session.

    Returns:
        How many there were.

    Raises:
        TimeoutError: One has not ended within ten seconds.
    """
    rows = database.execute(
        "SELECT pg_terminate_backend(pid, %s) FROM pg_stat_activity WHERE datname = current_database()"
        " AND backend_type = 'client backend' AND pid <> pg_backend_pid() AND application_name LIKE %s",
        int(_SECONDS * 1000),
        application_name_like,
    )
    if not all(ended for (ended,) in rows):
        raise TimeoutError(f"of {len(rows)} terminated sessions some have not ended within {_SECONDS:g} seconds")
    return len(rows)


@contextmanager
def read_only(server: PostgresServer, recovered: Database | None = None) -> Iterator[None]:
    """Inside, transactions that begin on a connected session of the server are read-only, as after a failover.

    Nobody is disconnected: the next write on a session from before fails with SQLSTATE 25006. A transaction that is
    open stays as it is.

    Args:
        server: The server; a session of each of its databases is affected.
        recovered: A database whose new sessions can write, as if they reached the new primary; None for none.
    """
    root = maintenance(server)
    if recovered is not None:
        # What a database sets counts for sessions that begin afterwards, and there above the server's configuration.
        root.execute(f'ALTER DATABASE "{recovered.name}" SET default_transaction_read_only = off')
    try:
        root.execute("ALTER SYSTEM SET default_transaction_read_only = on")
        _reload(root, "on")
        yield
    finally:
        server.start()
        # ALTER SYSTEM is no write in this sense: it works while everything is read-only.
        root.execute("ALTER SYSTEM RESET default_transaction_read_only")
        _reload(root, "off")
        if recovered is not None:
            root.execute(f'ALTER DATABASE "{recovered.name}" RESET default_transaction_read_only')


@contextmanager
def ordinary_role(database: Database) -> Iterator[Database]:
    """Make a role that is no superuser, and yield the database as that role uses it.

    The role may connect, create tables, and read and write all tables. At the end it is dropped with all that it
    owns and its sessions are ended.
    """
    role, password = f"role_{uuid.uuid4().hex[:12]}", secrets.token_urlsafe(24)
    database.execute(f"CREATE ROLE {role} LOGIN NOSUPERUSER PASSWORD '{password}'")
    try:
        database.execute(f"GRANT pg_read_all_data, pg_write_all_data TO {role}")
        database.execute(f"GRANT CREATE, USAGE ON SCHEMA public TO {role}")
        yield replace(database, user=role, password=password)
    finally:
        database.execute(f"ALTER ROLE {role} NOLOGIN")
        database.execute(
            "SELECT pg_terminate_backend(pid, %s) FROM pg_stat_activity WHERE usename = %s", int(_SECONDS * 1000), role
        )
        database.execute(f"DROP OWNED BY {role}")
        database.execute(f"DROP ROLE {role}")


@contextmanager
def connection_limit(database: Database, limit: int) -> Iterator[None]:
    """Inside, a database takes so many sessions of ordinary roles at a time and refuses further ones with 53300.

    A superuser's sessions count, but are not refused. Those that are open stay.

    Args:
        database: The database.
        limit: How many sessions; 0 refuses every new one.
    """
    database.execute(f'ALTER DATABASE "{database.name}" CONNECTION LIMIT {limit:d}')
    try:
        yield
    finally:
        database.execute(f'ALTER DATABASE "{database.name}" CONNECTION LIMIT -1')


def crash(server: ServerProcess) -> None:
    """End a server as a crash does: nobody is told, and nothing is written down."""
    server._end(server.stop_signals[1:])


def restart(server: PostgresServer) -> None:
    """Restart a server as after a crash, and return when it answers again."""
    server.restart("immediate")


@contextmanager
def down_for(server: PostgresServer, seconds: float) -> Iterator[None]:
    """Stop a server as a crash does; it comes back after some seconds by itself, while the caller goes on.

    At the end it is waited for. Do not restart or start the server inside.

    Args:
        server: The server, which runs.
        seconds: How long connections are refused, at least.
    """
    crash(server)
    command = server._command

    def later(port: int) -> Command:
        usual = command(port)
        return replace(usual, argv=("/bin/sh", "-c", _LATER, f"{seconds:g}", *usual.argv))

    # Not a thread that starts it: the kernel would end the server with that thread. The process is started here, and
    # becomes the server when its time has come.
    server._command = later  # type: ignore[method-assign]
    try:
        server._launch(server.port)
    finally:
        del server._command
    try:
        yield
    finally:
        try:
            server.wait_ready(seconds + server.start_timeout)
        except PortTakenError:
            # Somebody borrowed the port meanwhile; a usual start waits for it.
            server.start()


def _reload(root: Database, expected: str) -> None:
    """Have the configuration read again, and wait until every session has been told.

    The postmaster tells its sessions before it makes a new one, and a session that was told looks before its next
    command: a new session that has the setting is the proof for all others.
    """
    root.execute("SELECT pg_reload_conf()")
    deadline = time.monotonic() + _SECONDS
    while root.execute("SHOW default_transaction_read_only") != [(expected,)]:
        if time.monotonic() > deadline:
            raise TimeoutError(f"default_transaction_read_only is not {expected!r} after {_SECONDS:g} seconds")
        time.sleep(0.01)
