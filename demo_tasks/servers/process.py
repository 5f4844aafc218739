"""A server as a child process: started, waited for, stopped, and gone when this process dies."""

from __future__ import annotations

import abc
import os
import signal
import subprocess
import time
from typing import IO, TYPE_CHECKING, ClassVar

from demo_tasks.servers.errors import PortTakenError, ServerError
from demo_tasks.servers.ports import free_port, is_port_conflict

if TYPE_CHECKING:
    from pathlib import Path
    from types import TracebackType

    from typing_extensions import Self

    from demo_tasks.servers.command import Command
    from demo_tasks.servers.workspace import Workspace

_POLL_SECONDS = 0.02
_START_ATTEMPTS = 10
_KILL_SECONDS = 10.0


class ServerProcess(abc.ABC):
    """One server, owned by the process that starts it.

    A subclass says what to run and when it is ready. The port is chosen at the first start and kept from then
    on, so that a restarted server is found where it was.

    Args:
        workspace: Where the server's directory and log file go.
        name: The server's name, which must be unique in the workspace.
    """

    managed: ClassVar[bool] = True
    """True: this server can be stopped and restarted; False for one that belongs to somebody else."""

    start_timeout: ClassVar[float] = 30.0
    """How long a start may take, in seconds."""

    stop_signals: ClassVar[tuple[tuple[signal.Signals, float], ...]] = ((signal.SIGTERM, 8.0),)
    """The signals of a stop with the seconds to wait after each; SIGKILL follows the last."""

    def __init__(self, workspace: Workspace, name: str) -> None:
        self.workspace = workspace
        self.name = name
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0
        self._directory: Path | None = None
        self._log_start = 0
        self._port: int | None = None

    def __repr__(self) -> str:
        state = f"running pid={self.pid} port={self._port}" if self.running else "stopped"
        return f"<{type(self).__name__} {self.name!r} {state}>"

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def pid(self) -> int | None:
        """The process id of the running server, or None."""
        return self._process.pid if self._process is not None and self.running else None

    @property
    def running(self) -> bool:
        """Whether the server's process is alive; a zombie is not."""
        # poll() reaps a process that has ended, so it cannot be taken for a live one.
        return self._process is not None and self._process.poll() is None

    @property
    def port(self) -> int:
        """The port on 127.0.0.1.

        Raises:
            ServerError: The server was never started.
        """
        if self._port is None:
            raise ServerError(f"The server {self.name!r} has no port before its first start.")
        return self._port

    @property
    def directory(self) -> Path:
        """The server's own directory in the workspace, created on first use."""
        if self._directory is None:
            self._directory = self.workspace.directory(self.name)
        return self._directory

    @property
    def log_path(self) -> Path:
        """The file that takes the server's output."""
        # Beside the directory and not in it: the directory may belong to another user.
        return self.directory.with_name(f"{self.name}.log")

    def start(self) -> Self:
        """Start the server and wait until it answers; a running server is left alone.

        Returns:
            The server itself.

        Raises:
            ServerError: It cannot be found or run, or does not answer in time. The message ends with its last
                log lines.
        """
        if self.running:
            return self
        self._prepare()
        chosen = self._port
        for attempt in range(1, _START_ATTEMPTS + 1):
            try:
                self._port = self._launch(chosen)
                self.wait_ready(self.start_timeout)
                return self
            except PortTakenError:
                self.stop()
                self._port = chosen
                if attempt == _START_ATTEMPTS:
                    raise
                if chosen is not None:
                    # The port is known to clients by now: wait for whoever borrowed it.
                    time.sleep(0.2)
            except BaseException:
                self.stop()
                self._port = chosen
                raise
        raise AssertionError("unreachable")

    def wait_ready(self, timeout: float) -> None:
        """Wait until the server answers.

        Args:
            timeout: How long to wait, in seconds.

        Raises:
            PortTakenError: The server ended because its port was taken.
            ServerError: The server ended, or did not answer in time. The message shows the last lines of its
                log.
        """
        deadline = time.monotonic() + timeout
        while True:
            if not self.running:
                status = self._process.returncode if self._process is not None else None
                error = PortTakenError if is_port_conflict(self._log_of_this_start()) else ServerError
                raise error(self._with_log(f"The server {self.name!r} ended with status {status}."))
            if self._answers() and self.running:
                return
            if time.monotonic() >= deadline:
                message = f"The server {self.name!r} did not answer within {timeout:g} seconds."
                raise ServerError(self._with_log(message))
            time.sleep(_POLL_SECONDS)

    def stop(self) -> None:
        """Stop the server, gracefully at first; one that is stopped, or another process's, is left alone."""
        self._end(self.stop_signals)

    def restart(self) -> None:
        """Stop the server and start it again on the same port."""
        self.stop()
        self.start()

    def send_signal(self, number: signal.Signals) -> None:
        """Send a signal to the server's main process.

        Args:
            number: The signal.

        Raises:
            ServerError: The server is not running.
        """
        if self._process is None or not self.running:
            raise ServerError(f"The server {self.name!r} is not running.")
        self._process.send_signal(number)

    def log_tail(self, lines: int = 20) -> str:
        """Return the last lines of the server's log.

        Args:
            lines: How many lines to return at most.
        """
        return "\n".join(self._log_of_this_start().splitlines()[-lines:])

    def _end(self, signals: tuple[tuple[signal.Signals, float], ...]) -> None:
        process = self._process
        # In a forked child this is the parent's server.
        if process is None or self._owner != os.getpid():
            return
        for number, seconds in signals:
            if process.poll() is not None:
                break
            process.send_signal(number)
            try:
                process.wait(seconds)
            except subprocess.TimeoutExpired:
                continue
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(_KILL_SECONDS)
        self._process = None

    def _launch(self, port: int | None) -> int:
        with self.log_path.open("ab") as log:
            self._log_start = log.seek(0, os.SEEK_END)
            self._owner = os.getpid()
            port, self._process = self._spawn(port, log)
            return port

    def _spawn(self, port: int | None, log: IO[bytes]) -> tuple[int, subprocess.Popen[bytes]]:
        port = port if port is not None else free_port()
        return port, self._command(port).launch(log)

    @abc.abstractmethod
    def _prepare(self) -> None:
        """Find the program and write its files, before the first start and before every later one."""

    @abc.abstractmethod
    def _command(self, port: int) -> Command:
        """Return what runs the server on a port."""

    @abc.abstractmethod
    def _answers(self) -> bool:
        """Tell whether the server answers a client that knows its secrets; waits for two seconds at most."""

    def _log_of_this_start(self) -> str:
        try:
            with self.log_path.open("rb") as log:
                log.seek(self._log_start)
                return log.read().decode(errors="replace")
        except OSError:
            return ""

    def _with_log(self, message: str) -> str:
        tail = self.log_tail()
        return f"{message} Its last log lines:\n{tail}" if tail else f"{message} It wrote nothing to its log."
