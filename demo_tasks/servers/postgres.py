"""A PostgreSQL server on 127.0.0.1 with its own cluster, password and settings."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
from typing import TYPE_CHECKING, ClassVar, Literal
from urllib.parse import quote

from demo_tasks.servers.binaries import postgres_directory
from demo_tasks.servers.command import Command, Identity
from demo_tasks.servers.errors import ServerError
from demo_tasks.servers.identity import unprivileged_identity
from demo_tasks.servers.ports import LOOPBACK
from demo_tasks.servers.process import ServerProcess

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from demo_tasks.servers.workspace import Workspace

_INITDB_SECONDS = 120.0

_SETTINGS: Mapping[str, str] = {
    "listen_addresses": LOOPBACK,
    # TCP only: a socket's path may have 107 bytes, and a temporary directory's may be longer.
    "unix_socket_directories": "",
    "shared_buffers": "32MB",
    "huge_pages": "off",
    # Shared memory in the cluster's directory is removed with it, whatever ended the server.
    "dynamic_shared_memory_type": "mmap",
    "password_encryption": "scram-sha-256",
    "lc_messages": "C",
    "timezone": "UTC",
    "log_timezone": "UTC",
}


class PostgresServer(ServerProcess):
    """A PostgreSQL server of this run's own.

    The cluster is created at the first start and kept across stops and restarts until the workspace is
    closed.

    Args:
        workspace: Where the cluster and the log file go.
        settings: Server settings by name, over the defaults; `fsync` and all other settings of durability
            stay as PostgreSQL has them unless they are given here.
        name: The server's name, which must be unique in the workspace.

    Attributes:
        host: The address that the server listens on.
        user: The superuser's name.
        password: The superuser's random password.
        database: The database that exists from the start.
    """

    start_timeout: ClassVar[float] = 60.0
    # Fast shutdown, then immediate; killing a postmaster would leave its shared memory behind.
    stop_signals: ClassVar[tuple[tuple[signal.Signals, float], ...]] = (
        (signal.SIGINT, 8.0),
        (signal.SIGQUIT, 6.0),
    )

    def __init__(
        self, workspace: Workspace, *, settings: Mapping[str, str] | None = None, name: str = "postgres"
    ) -> None:
        super().__init__(workspace, name)
        self.host = LOOPBACK
        self.user = "workerpools"
        self.password = secrets.token_urlsafe(24)
        self.database = "postgres"
        self._settings = {**_SETTINGS, **(settings or {})}
        self._programs: Path | None = None
        self._identity = Identity()

    @property
    def dsn(self) -> str:
        """The libpq URL of the first database, with the password."""
        return self._url("postgresql", self.database)

    def url(self, driver: str = "psycopg2", *, database: str | None = None) -> str:
        """Return a SQLAlchemy URL, with the password.

        Args:
            driver: The driver's name in SQLAlchemy.
            database: The database; the first one by default.
        """
        return self._url(f"postgresql+{driver}", database or self.database)

    def restart(self, mode: Literal["immediate", "fast"] = "immediate") -> None:
        """Stop the server and start it again on the same port.

        Args:
            mode: `immediate` ends the server without a goodbye, as a crash does, and recovers at the start;
                `fast` rolls back what is open, tells the clients and shuts down in order.
        """
        if mode not in ("immediate", "fast"):
            raise ValueError(f"mode must be 'immediate' or 'fast', not {mode!r}")
        self._end(self.stop_signals[1:] if mode == "immediate" else self.stop_signals)
        self.start()

    def create_database(self, name: str) -> str:
        """Create a database.

        Args:
            name: The name of the database, which must be new.

        Returns:
            The libpq URL of the new database, with the password.
        """
        import psycopg2
        from psycopg2 import sql

        connection = psycopg2.connect(self.dsn, sslmode="disable", gssencmode="disable", connect_timeout=10)
        try:
            connection.autocommit = True
            with connection.cursor() as cursor:
                cursor.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
        finally:
            connection.close()
        return self._url("postgresql", name)

    def _url(self, scheme: str, database: str) -> str:
        return f"{scheme}://{self.user}:{self.password}@{self.host}:{self.port}/{quote(database, safe='')}"

    @property
    def _cluster(self) -> Path:
        return self.directory / "data"

    def _prepare(self) -> None:
        if self._programs is not None:
            return
        programs = postgres_directory()
        self._identity = unprivileged_identity(programs / "postgres", self.directory, self._environment())
        # What a start that was interrupted may have left.
        shutil.rmtree(self._cluster, ignore_errors=True)
        self._initdb(programs)
        settings = "".join(f"{name} = {_quoted(value)}\n" for name, value in self._settings.items())
        with (self._cluster / "postgresql.conf").open("a") as file:
            file.write(settings)
        # Last: until the cluster is complete, the next start creates it again.
        self._programs = programs

    def _initdb(self, programs: Path) -> None:
        password_file = self.directory / "password"
        command = Command(
            [
                *(str(programs / "initdb"), "--pgdata", str(self._cluster), "--username", self.user),
                *("--auth", "scram-sha-256", "--pwfile", str(password_file)),
                # A cluster that is thrown away with the run need not reach the disk before its first use.
                *("--encoding", "UTF8", "--no-locale", "--no-sync"),
            ],
            self.directory,
            self._environment(),
            self._identity,
        )
        descriptor = os.open(password_file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        try:
            with open(descriptor, "w") as file:
                file.write(f"{self.password}\n")
            if self._identity.owner is not None:
                os.chown(password_file, *self._identity.owner)
            with self.log_path.open("ab") as log:
                self._log_start = log.seek(0, os.SEEK_END)
                status = command.run(log, _INITDB_SECONDS)
        finally:
            password_file.unlink()
        if status != 0:
            raise ServerError(self._with_log(f"initdb for {self.name!r} ended with status {status}."))

    def _command(self, port: int) -> Command:
        assert self._programs is not None
        return Command(
            (str(self._programs / "postgres"), "-D", str(self._cluster), "-p", str(port)),
            self.directory,
            self._environment(),
            self._identity,
            # Immediate shutdown: when the parent is dead, nobody needs the data.
            death_signal=signal.SIGQUIT,
        )

    def _environment(self) -> dict[str, str]:
        # Without the PG… variables of the user's shell, which are about another server.
        kept = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH") if name in os.environ}
        return {**kept, "LC_ALL": "C", "TZ": "UTC", "HOME": str(self.directory)}

    def _answers(self) -> bool:
        import psycopg2

        # Not before the server says so itself: a stranger may listen on a port that it failed to bind.
        if not self._says_ready():
            return False
        try:
            psycopg2.connect(self.dsn, sslmode="disable", gssencmode="disable", connect_timeout=2).close()
        except psycopg2.OperationalError:
            return False
        return True

    def _says_ready(self) -> bool:
        # The lock file is what pg_ctl reads: the postmaster's process id first, its state in the eighth line.
        try:
            lines = (self._cluster / "postmaster.pid").read_text().splitlines()
        except FileNotFoundError:
            return False
        return len(lines) >= 8 and lines[0] == str(self.pid) and lines[7].strip() == "ready"


def _quoted(value: str) -> str:
    return "'" + value.replace("\\", "\\\\").replace("'", "''") + "'"
