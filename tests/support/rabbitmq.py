"""A real RabbitMQ, with a port mapper of its own."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from typing import IO, ClassVar

from demo_tasks.servers import ServerError, Workspace
from demo_tasks.servers.command import Command
from demo_tasks.servers.ports import LOOPBACK, free_port
from demo_tasks.servers.process import ServerProcess


def rabbitmq_programs() -> tuple[Path, Path]:
    """Find RabbitMQ's own script and Erlang's port mapper: Debian's command in PATH would change the user.

    Raises:
        ServerError: There is none. The message says what to install.
    """
    scripts = sorted(Path("/usr/lib/rabbitmq/lib").glob("rabbitmq_server-*/sbin/rabbitmq-server"))
    mapper = shutil.which("epmd")
    if not scripts or mapper is None:
        raise ServerError("No RabbitMQ was found: install it (Debian: apt-get install rabbitmq-server).")
    return scripts[-1], Path(mapper)


class RabbitServer(ServerProcess):
    """A RabbitMQ on a loopback port that it keeps over stops and restarts, with its queues.

    Args:
        workspace: Where its files go.
        name: The server's name, which must be unique in the workspace.
    """

    start_timeout: ClassVar[float] = 90.0

    def __init__(self, workspace: Workspace, *, name: str = "rabbitmq") -> None:
        super().__init__(workspace, name)
        self.host = LOOPBACK
        self._mapper: subprocess.Popen[bytes] | None = None
        self._mapper_port = free_port()
        self._distribution = free_port()

    def url(self) -> str:
        """Return its URL for Celery."""
        return f"amqp://guest:guest@{self.host}:{self.port}//"

    def close(self) -> None:
        """Stop the server and its port mapper."""
        self.stop()
        if self._mapper is not None:
            self._mapper.kill()
            self._mapper.wait()
            self._mapper = None

    def _spawn(self, port: int | None, log: IO[bytes]) -> tuple[int, subprocess.Popen[bytes]]:
        _, mapper = rabbitmq_programs()
        if self._mapper is None:
            # Erlang would start one as a daemon, which outlives everything.
            command = [str(mapper), "-address", LOOPBACK, "-port", str(self._mapper_port)]
            self._mapper = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
            self._wait_for_mapper()
        return super()._spawn(port, log)

    def _wait_for_mapper(self) -> None:
        deadline = time.monotonic() + 10.0
        while time.monotonic() < deadline:
            with suppress(OSError), socket.create_connection((LOOPBACK, self._mapper_port), 1.0):
                return
            time.sleep(0.02)
        raise ServerError("Erlang's port mapper did not answer within 10 seconds.")

    def _prepare(self) -> None:
        rabbitmq_programs()
        (self.directory / "plugins").write_text("[].\n")
        (self.directory / "rabbitmq.conf").write_text("log.console = true\nlog.file = false\n")

    def _command(self, port: int) -> Command:
        script, _ = rabbitmq_programs()
        folder = str(self.directory)
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("RABBITMQ_", "ERL_"))},
            "HOME": folder,
            "ERL_EPMD_ADDRESS": LOOPBACK,
            "ERL_EPMD_PORT": str(self._mapper_port),
            "RABBITMQ_NODENAME": f"{self.name}-{port}@localhost",
            "RABBITMQ_NODE_IP_ADDRESS": LOOPBACK,
            "RABBITMQ_NODE_PORT": str(port),
            "RABBITMQ_DIST_PORT": str(self._distribution),
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "-kernel inet_dist_use_interface {127,0,0,1}",
            "RABBITMQ_MNESIA_BASE": f"{folder}/data",
            "RABBITMQ_LOG_BASE": f"{folder}/log",
            "RABBITMQ_PID_FILE": f"{folder}/pid",
            "RABBITMQ_ENABLED_PLUGINS_FILE": f"{folder}/plugins",
            "RABBITMQ_CONFIG_FILE": f"{folder}/rabbitmq.conf",
            "RABBITMQ_CONF_ENV_FILE": os.devnull,
        }
        return Command([str(script)], self.directory, environment)

    def _answers(self) -> bool:
        try:
            with socket.create_connection((self.host, self.port), 2.0) as connection:
                # AMQP 0-9-1, 4.2.2: the server answers the header with Connection.Start.
                connection.sendall(b"AMQP\x00\x00\x09\x01")
                connection.settimeout(2.0)
                return connection.recv(1) == b"\x01"
        except OSError:
            return False
