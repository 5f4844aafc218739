"""A real MariaDB server for a session's tests, and a database of a test's own on it."""

from __future__ import annotations

import importlib.util
import os
import secrets
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import ClassVar

from demo_tasks.servers import ServerError, Workspace
from demo_tasks.servers.command import Command, Identity
from demo_tasks.servers.identity import unprivileged_identity
from demo_tasks.servers.ports import LOOPBACK
from demo_tasks.servers.process import ServerProcess
from tests.support.databases import Database

# mysqlclient has no wheels for Linux: it is tried where somebody has built it.
DRIVERS = ["pymysql"] + ["mysqldb"] * (importlib.util.find_spec("MySQLdb") is not None)

# Not on every user's PATH.
_DEBIAN = "/usr/sbin/mariadbd"
_SCRIPTS = ("mysql_system_tables.sql", "mysql_performance_tables.sql", "mysql_system_tables_data.sql")
_BOOTSTRAP_SECONDS = 120.0
_END_SECONDS = 10.0


def mariadb_program() -> Path:
    """Find MariaDB's server on PATH, or where Debian puts it.

    Raises:
        ServerError: There is none. The message says what to install.
    """
    found = shutil.which("mariadbd") or shutil.which(_DEBIAN)
    if found is None:
        raise ServerError("No MariaDB was found: install it (Debian: apt-get install mariadb-server-core).")
    return Path(found)


class MariaDatabase(Database):
    """A database on a MariaDB server."""

    def url(self, driver: str = "pymysql") -> str:
        return self._url(f"mysql+{driver}")

    def execute(self, statement: str, *parameters: object) -> list[tuple[object, ...]]:
        import pymysql

        with (
            closing(
                pymysql.connect(
                    host=self.host,
                    port=self.port,
                    user=self.user,
                    password=self.password,
                    database=self.name or None,
                    autocommit=True,
                    connect_timeout=10,
                    read_timeout=60,
                )
            ) as connection,
            connection.cursor() as cursor,
        ):
            cursor.execute(statement, parameters or None)
            return list(cursor.fetchall())

    def kill_sessions(self) -> int:
        """End the sessions that use this database, wait until they have ended, and return how many there were."""
        import pymysql

        ids = self._sessions()
        for number in ids:
            with suppress(pymysql.err.OperationalError):
                # 1094: it has ended by itself.
                self.execute(f"KILL {number:d}")
        deadline = time.monotonic() + _END_SECONDS
        while set(self._sessions()) & set(ids):
            if time.monotonic() > deadline:
                raise TimeoutError(f"of the sessions {ids} some have not ended within {_END_SECONDS:g} seconds")
            time.sleep(0.02)
        return len(ids)

    def _sessions(self) -> list[int]:
        rows = self.execute(
            "SELECT id FROM information_schema.processlist WHERE db = %s AND id <> connection_id()", self.name
        )
        return [int(str(number)) for (number,) in rows]


class MariaDBServer(ServerProcess):
    """A MariaDB server of this run's own, on a loopback port that it keeps over stops and restarts.

    Args:
        workspace: Where its data and its log file go.
        name: The server's name, which must be unique in the workspace.
    """

    start_timeout: ClassVar[float] = 60.0

    def __init__(self, workspace: Workspace, name: str = "mariadb") -> None:
        super().__init__(workspace, name)
        self.host = LOOPBACK
        self._password = secrets.token_urlsafe(24)
        self._program: Path | None = None
        self._identity = Identity()

    @property
    def maintenance(self) -> MariaDatabase:
        """The server without a database, for a user who may do everything."""
        return MariaDatabase(self.host, self.port, "", "workerpools", self._password)

    @contextmanager
    def new_database(self) -> Iterator[MariaDatabase]:
        """Make an empty database; at the end its sessions are ended and it is dropped."""
        name = f"test_{uuid.uuid4().hex[:12]}"
        self.start().maintenance.execute(f"CREATE DATABASE {name}")
        made = MariaDatabase(self.host, self.port, name, "workerpools", self._password)
        yield made
        self.start()
        # A transaction that is still open would keep DROP waiting.
        made.kill_sessions()
        self.maintenance.execute(f"DROP DATABASE {name}")

    def _prepare(self) -> None:
        if self._program is not None:
            return
        program = mariadb_program()
        self._identity = unprivileged_identity(program, self.directory, self._environment())
        # What a start that was interrupted may have left.
        data = self.directory / "data"
        shutil.rmtree(data, ignore_errors=True)
        data.mkdir(mode=0o700)
        self._give(data)
        self._bootstrap(program)
        # Last: until the data are complete, the next start makes them again.
        self._program = program

    def _bootstrap(self, program: Path) -> None:
        # What mariadb-install-db does; it needs a program of the client's package.
        script = self.directory / "bootstrap.sql"
        tables = "".join((_share(program) / name).read_text() for name in _SCRIPTS)
        statements = (
            "CREATE DATABASE mysql;\nUSE mysql;\n",
            tables,
            # There is none without a password.
            "\nDELETE FROM global_priv WHERE User <> 'mariadb.sys';\nFLUSH PRIVILEGES;\n",
            f"CREATE USER workerpools@'{self.host}' IDENTIFIED BY '{self._password}';\n",
            f"GRANT ALL ON *.* TO workerpools@'{self.host}' WITH GRANT OPTION;\n",
        )
        descriptor = os.open(script, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with open(descriptor, "w") as file:
            file.writelines(statements)
        self._give(script)
        argv = ("/bin/sh", "-c", 'exec "$0" "$@" <bootstrap.sql', *self._arguments(program), "--bootstrap")
        try:
            with self.log_path.open("ab") as log:
                self._log_start = log.seek(0, os.SEEK_END)
                status = Command(argv, self.directory, self._environment(), self._identity).run(log, _BOOTSTRAP_SECONDS)
        finally:
            script.unlink()
        if status != 0:
            raise ServerError(self._with_log(f"The bootstrap of {self.name!r} ended with status {status}."))

    def _give(self, path: Path) -> None:
        if self._identity.owner is not None:
            os.chown(path, *self._identity.owner)

    def _arguments(self, program: Path) -> tuple[str, ...]:
        return (
            *(str(program), "--no-defaults", f"--datadir={self.directory / 'data'}", "--skip-log-bin"),
            *("--innodb-buffer-pool-size=16M", "--innodb-log-file-size=8M"),
            # No test pulls the plug of the machine: the disk need not keep up.
            "--innodb-flush-log-at-trx-commit=0",
        )

    def _command(self, port: int) -> Command:
        assert self._program is not None
        argv = (
            *self._arguments(self._program),
            # Relative to the data: a socket's path may have 107 bytes.
            *("--socket=sock", f"--pid-file={self.directory / 'data' / 'pid'}"),
            *(f"--bind-address={self.host}", f"--port={port}", "--skip-name-resolve", "--skip-ssl"),
        )
        return Command(argv, self.directory, self._environment(), self._identity)

    def _environment(self) -> dict[str, str]:
        kept = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH") if name in os.environ}
        # Not the session's TMPDIR, which the server's user may not write to.
        return {**kept, "LC_ALL": "C", "TZ": "UTC", "HOME": str(self.directory), "TMPDIR": str(self.directory)}

    def _answers(self) -> bool:
        import pymysql

        # Not before it says so itself: a stranger may listen on a port that it failed to bind.
        if "ready for connections" not in self._log_of_this_start():
            return False
        try:
            return self.maintenance.execute("SELECT 1") == [(1,)]
        except pymysql.Error:
            return False


def _share(program: Path) -> Path:
    """Return where the program's SQL scripts are: beside its bin or sbin."""
    for name in ("mariadb", "mysql"):
        found = program.resolve().parent.parent / "share" / name
        if (found / _SCRIPTS[0]).exists():
            return found
    raise ServerError(f"The scripts that belong to {program} were not found.")
