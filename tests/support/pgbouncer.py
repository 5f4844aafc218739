"""A real PgBouncer before a test's database."""

from __future__ import annotations

import os
import re
import secrets
import select
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import ClassVar, Literal

from demo_tasks.servers import ServerError, Workspace
from demo_tasks.servers.command import Command, Identity
from demo_tasks.servers.identity import unprivileged_identity
from demo_tasks.servers.ports import LOOPBACK
from demo_tasks.servers.process import ServerProcess
from tests.support.databases import Database

_DEBIAN = "/usr/sbin/pgbouncer"
_CONSOLE = "console"
_GRACE = 10.0
# Up to 1.22 SIGTERM ends PgBouncer at once and SIGQUIT has no handler; from 1.23 on SIGTERM waits for the clients.
_QUIT_SINCE = (1, 23)


def pgbouncer_program() -> Path:
    """Find PgBouncer on PATH, or where Debian puts it, which is not on every user's PATH.

    Raises:
        ServerError: There is none. The message says what to install.
    """
    found = shutil.which("pgbouncer") or shutil.which(_DEBIAN)
    if found is None:
        raise ServerError("No PgBouncer was found: install it (Debian: apt-get install pgbouncer).")
    return Path(found)


class PgBouncer(ServerProcess):
    """A PgBouncer of one test's own, on a loopback port that it keeps over stops and restarts.

    Clients log in as the database's role, with its password, and so does PgBouncer at the server. It starts whether
    or not the server answers. In transaction mode psycopg 3 needs `prepare_threshold=None` before PgBouncer 1.21. As
    every server here it is started from the main thread.

    Args:
        workspace: Where the configuration and the log file go.
        database: The database behind, directly or through a proxy.
        pool_mode: What a client keeps a server connection for.
        default_pool_size: How many server connections there are at most.
        query_wait_timeout: Whole seconds that a client waits for a server connection before it is disconnected.
        server_login_retry: Seconds without a further attempt after a failed login at the server.
        settings: Further settings by name, over those above.
        name: The name of the instance, which must be unique in the workspace.
    """

    start_timeout: ClassVar[float] = 20.0

    def __init__(
        self,
        workspace: Workspace,
        database: Database,
        *,
        pool_mode: Literal["session", "transaction"] = "transaction",
        default_pool_size: int = 5,
        query_wait_timeout: int = 10,
        server_login_retry: float = 1.0,
        settings: Mapping[str, str] | None = None,
        name: str = "pgbouncer",
    ) -> None:
        super().__init__(workspace, name)
        self.host = LOOPBACK
        self._database = database
        self._console_password = secrets.token_urlsafe(24)
        self._settings = {
            "pool_mode": pool_mode,
            "default_pool_size": str(default_pool_size),
            "query_wait_timeout": str(query_wait_timeout),
            "server_login_retry": str(server_login_retry),
            # What drivers and users' URLs send in the startup packet; PgBouncer refuses what it does not know.
            "ignore_startup_parameters": "extra_float_digits,options",
            "max_client_conn": "500",
            **(settings or {}),
        }
        self._program: Path | None = None
        self._at_once = signal.SIGTERM
        self._identity = Identity()

    @property
    def database(self) -> Database:
        """The database as it is reached through this PgBouncer."""
        return self._database.through(self)

    def stop(self, immediate: bool = True) -> None:
        """Stop it, and with it every connection; one that does not run is left alone.

        Args:
            immediate: Without regard to what is under way. Otherwise wait until the server connections are free, at
                the end of the transactions or, in session mode, of the clients; but for ten seconds at most.
        """
        self._end(((self._at_once, 5.0),) if immediate else ((signal.SIGINT, _GRACE), (self._at_once, 5.0)))

    def restart(self, immediate: bool = True) -> None:
        """Stop it as `stop` does, and start it again on the same port."""
        self.stop(immediate)
        self.start()

    def kill(self) -> None:
        """End it with SIGKILL and wait for its end."""
        self._end(())

    def pause(self, timeout: float = 5.0) -> None:
        """Keep statements waiting, until `resume`, once the server connections are free.

        Args:
            timeout: How long to wait for the transactions under way (in session mode: for the clients), in seconds.

        Raises:
            TimeoutError: Some did not end; PgBouncer is not paused.
        """
        try:
            self.console("PAUSE", timeout=timeout)
        except TimeoutError:
            # It goes on pausing although nobody waits for the answer any more.
            self.resume()
            raise

    def resume(self) -> None:
        """Let the statements go on that `pause` keeps waiting."""
        self.console("RESUME")

    def console(self, command: str, timeout: float = 5.0) -> list[dict[str, object]]:
        """Run a command of PgBouncer's administration console, such as SHOW POOLS, and return its rows.

        Args:
            command: The command.
            timeout: How long to wait for its end, in seconds.

        Raises:
            psycopg2.Error: PgBouncer is down, or refuses the command.
            TimeoutError: It has not ended.
        """
        import psycopg2

        dsn = Database(self.host, self.port, "pgbouncer", _CONSOLE, self._console_password).dsn
        deadline = time.monotonic() + timeout
        # Asynchronous, for the sake of the timeout: the console knows no statement_timeout.
        with closing(psycopg2.connect(dsn, sslmode="disable", gssencmode="disable", async_=True)) as connection:
            _wait(connection, deadline, command)
            cursor = connection.cursor()
            cursor.execute(command)
            _wait(connection, deadline, command)
            if cursor.description is None:
                return []
            return [dict(zip([column.name for column in cursor.description], row, strict=True)) for row in cursor]

    def _prepare(self) -> None:
        if self._program is None:
            program = pgbouncer_program()
            self._identity = unprivileged_identity(program, self.directory, self._environment())
            if _version(program) >= _QUIT_SINCE:
                self._at_once = signal.SIGQUIT
            self._program = program
        behind = self._database
        users = {_CONSOLE: self._console_password, behind.user: behind.password}
        self._write("userlist.txt", "".join(f"{_quoted(user)} {_quoted(users[user])}\n" for user in users))

    def _command(self, port: int) -> Command:
        assert self._program is not None
        behind = self._database
        settings = {
            "listen_addr": self.host,
            "listen_port": str(port),
            # Debian's default is a directory of the system.
            "unix_socket_dir": "",
            "auth_type": "scram-sha-256",
            "auth_file": "userlist.txt",
            "admin_users": _CONSOLE,
            **self._settings,
        }
        lines = "".join(f"{name} = {value}\n" for name, value in settings.items())
        where = f"host={behind.host} port={behind.port} dbname={behind.name}"
        self._write("pgbouncer.ini", f"[databases]\n{behind.name} = {where}\n[pgbouncer]\n{lines}")
        argv = (str(self._program), "pgbouncer.ini")
        return Command(argv, self.directory, self._environment(), self._identity)

    def _answers(self) -> bool:
        import psycopg2

        # Not before it says so itself: a stranger may listen on a port that it failed to bind.
        if "process up" not in self.log_tail(50):
            return False
        try:
            return bool(self.console("SHOW VERSION", timeout=2.0))
        except (psycopg2.Error, TimeoutError):
            return False

    def _environment(self) -> dict[str, str]:
        # Without the PG… variables of the user's shell: PgBouncer is a client as well.
        kept = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH") if name in os.environ}
        return {**kept, "LC_ALL": "C", "TZ": "UTC", "HOME": str(self.directory)}

    def _write(self, name: str, text: str) -> None:
        path = self.directory / name
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with open(descriptor, "w") as file:
            file.write(text)
        if self._identity.owner is not None:
            os.chown(path, *self._identity.owner)


def _wait(connection: object, deadline: float, command: str) -> None:
    from psycopg2 import extensions

    assert isinstance(connection, extensions.connection)
    while (state := connection.poll()) != extensions.POLL_OK:
        watched = [connection.fileno()]
        reading, writing = (watched, []) if state == extensions.POLL_READ else ([], watched)
        left = deadline - time.monotonic()
        if left <= 0 or not any(select.select(reading, writing, [], left)):
            raise TimeoutError(f"PgBouncer has not ended {command!r} in time.")


def _version(program: Path) -> tuple[int, ...]:
    answer = subprocess.run([str(program), "--version"], capture_output=True, text=True, timeout=30, check=True).stdout
    found = re.search(r"(\d+)\.(\d+)", answer)
    return tuple(map(int, found.groups())) if found else (0,)


def _quoted(value: str) -> str:
    return '"' + value.replace('"', '""') + '"'
