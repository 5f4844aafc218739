"""Copies of a PostgreSQL server's files, as a backup or a snapshot of its disk makes them."""

from __future__ import annotations

import itertools
import shutil
import subprocess
from pathlib import Path

from demo_tasks.servers import PostgresServer

_NUMBERS = itertools.count(1)


class CopiedServer(PostgresServer):
    """A server with the files that another one has when this one is first started.

    Args:
        original: The other server, of the same workspace. While it runs the copy is one of a crashed server.
        standby: Whether it starts as a standby, which `pg_promote` promotes.
    """

    def __init__(self, original: PostgresServer, *, standby: bool = False) -> None:
        super().__init__(original.workspace, name=f"copy-{next(_NUMBERS)}")
        self.password = original.password
        self._original = original
        self._standby = standby

    def copy(self) -> CopiedServer:
        """Copy now, without a start."""
        self._prepare()
        return self

    def _initdb(self, programs: Path) -> None:
        subprocess.run(["cp", "-a", str(self._original._cluster), str(self._cluster)], check=True)
        (self._cluster / "postmaster.pid").unlink(missing_ok=True)
        if self._standby:
            shutil.copy(self._cluster / "PG_VERSION", self._cluster / "standby.signal")
