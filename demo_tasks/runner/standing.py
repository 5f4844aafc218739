"""``./demo --servers``: the servers alone, for the tasks of somebody who has just read the README."""

from __future__ import annotations

import contextlib
import os
import shlex
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from demo_tasks.database import Database
from demo_tasks.runner.errors import DemoError
from demo_tasks.runner.signals import Interrupted, Stop
from demo_tasks.runner.stage import Processes
from demo_tasks.servers import HttpUpstream, PostgresServer, ValkeyServer, Workspace

if TYPE_CHECKING:
    from demo_tasks.runner.screen import Screen

__all__ = ["TABLE", "StandingServers"]

#: The table of the README's and the quickstart's example.
TABLE = "CREATE TABLE orders (id integer PRIMARY KEY, sku text NOT NULL, quantity integer NOT NULL DEFAULT 1)"


class StandingServers(Processes):
    """PostgreSQL, Valkey and the HTTP server, until Ctrl-C. Servers of the environment are left alone.

    Args:
        screen: Where the user reads what is started, and where it is.
        stop: Tells of Ctrl-C.
        env_file: Where to write the addresses for a shell to source; None to show them alone.
    """

    def __init__(self, screen: Screen, stop: Stop, env_file: Path | None) -> None:
        super().__init__(screen)
        self._stop_signal = stop
        self._env_file = env_file

    def run(self) -> None:
        """Start the servers, say where they are, and stop them on Ctrl-C.

        Raises:
            ServerError: A server does not start.
            DemoError: A server ended by itself, or the file cannot be written.
            Interrupted: The user wants it to end before everything runs.
        """
        self._stop_signal.hurry = self.hurry
        with ExitStack() as stack:
            try:
                addresses = self._start_all(stack)
                self._tell(stack, addresses)
                self._stay()
            finally:
                self._stop_signal.tidy_up()

    def _start_all(self, stack: ExitStack) -> dict[str, str]:
        workspace = stack.enter_context(Workspace())
        # Idle connections live as long as behind a usual proxy: time to read between two tasks.
        postgres, valkey, api = (
            PostgresServer(workspace),
            ValkeyServer(workspace),
            HttpUpstream(workspace, keepalive=75),
        )
        self._start(stack, "PostgreSQL", postgres)
        self._start(stack, "Redis", valkey)
        self._start(stack, "HTTP server", api)
        Database(postgres.url()).execute(TABLE)
        return {"BROKER_URL": valkey.url(), "DATABASE_URL": postgres.url("psycopg2"), "API_URL": api.url()}

    def _tell(self, stack: ExitStack, addresses: dict[str, str]) -> None:
        lines = [f"export {name}={shlex.quote(value)}" for name, value in addresses.items()]
        if self._env_file is None:
            self._screen.say("\nFor the terminals that use them:\n", "bold")
        else:
            _write(self._env_file, lines)
            # The addresses are worth nothing without the servers.
            stack.callback(_remove, self._env_file.resolve())
            where = shlex.quote(str(self._env_file))
            # Without a slash `.` looks along PATH.
            where = where if "/" in where else f"./{where}"
            self._screen.say(f"\nIn each terminal that uses them:  . {where}   It says:\n", "bold")
        for line in lines:
            self._screen.say(line)
        self._screen.say("\nThe database has the table orders; the API answers GET /orders/7.")
        self._screen.say("Everything stays up until Ctrl-C.")

    def _stay(self) -> None:
        with contextlib.suppress(Interrupted):
            while True:
                time.sleep(0.5)
                self._stop_signal.check()
                self.check_alive()
        self._screen.say("")


def _write(path: Path, lines: list[str]) -> None:
    try:
        # The password in it is this user's affair.
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with open(descriptor, "w") as file:
            file.write("\n".join(lines) + "\n")
    except OSError as error:
        raise DemoError(f"The addresses cannot be written to {path}: {error.strerror}.") from error


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink()
