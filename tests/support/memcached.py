"""A real memcached server."""

from __future__ import annotations

import os
import shutil
import socket
from contextlib import closing
from pathlib import Path
from typing import ClassVar

from demo_tasks.servers import ServerError, Workspace
from demo_tasks.servers.command import Command
from demo_tasks.servers.ports import LOOPBACK
from demo_tasks.servers.process import ServerProcess


def memcached_program() -> Path:
    """Find memcached on PATH.

    Raises:
        ServerError: There is none. The message says what to install.
    """
    found = shutil.which("memcached")
    if found is None:
        raise ServerError("No memcached was found: install it (Debian: apt-get install memcached).")
    return Path(found)


class MemcachedServer(ServerProcess):
    """A memcached on a loopback port that it keeps over stops and restarts.

    Args:
        workspace: Where its log file goes.
        name: The server's name, which must be unique in the workspace.
    """

    start_timeout: ClassVar[float] = 20.0

    def __init__(self, workspace: Workspace, *, name: str = "memcached") -> None:
        super().__init__(workspace, name)
        self.host = LOOPBACK

    def ask(self, command: str) -> str:
        """Return the server's answer to one command of its text protocol, over a connection of its own."""
        with closing(socket.create_connection((self.host, self.port), 2.0)) as connection:
            connection.sendall(f"{command}\r\nquit\r\n".encode())
            return b"".join(iter(lambda: connection.recv(4096), b"")).decode()

    def connections(self) -> int:
        """Return how many clients are connected."""
        stats = dict(line.split(" ", 2)[1:] for line in self.ask("stats").splitlines() if line.startswith("STAT"))
        # But for the one that asks.
        return int(stats["curr_connections"]) - 1

    def _prepare(self) -> None:
        memcached_program()

    def _command(self, port: int) -> Command:
        user = ("-u", "nobody") if os.geteuid() == 0 else ()
        argv = (str(memcached_program()), *user, "-l", LOOPBACK, "-p", str(port), "-U", "0", "-m", "16")
        return Command(argv, self.directory, dict(os.environ))

    def _answers(self) -> bool:
        try:
            return self.ask("version").startswith("VERSION")
        except OSError:
            return False
