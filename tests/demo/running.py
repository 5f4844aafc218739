"""The demo as a user starts it: a process of its own, with or without a terminal."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.support.inspect import children_of, is_alive
from tests.support.paths import environment

COMMAND = (sys.executable, "-m", "demo_tasks")

# A slow machine that runs other tests at the same time.
RUN_TIMEOUT = 100.0

_ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


class DemoRun:
    """`python -m demo_tasks` as a process, whose output is read as it comes.

    Args:
        arguments: The command line's arguments.
        cwd: Where it is started.
        env: Variables to add to this process's environment.
        terminal: Whether it has a terminal of its own, of 100 columns.
    """

    def __init__(
        self, *arguments: str, cwd: Path, env: Mapping[str, str] | None = None, terminal: bool = False
    ) -> None:
        # Servers of the developer's are not for the tests.
        for name in ("DATABASE_URL", "REDIS_URL", "UPSTREAM_URL"):
            env = {name: "", **(env or {})}
        self._chunks: list[bytes] = []
        self._master: int | None = None
        command: Sequence[str] = (*COMMAND, *arguments)
        full_env = environment({"COLUMNS": "100", "TERM": "xterm-256color", **(env or {})})
        if terminal:
            self._master, slave = os.openpty()
            termios.tcsetwinsize(slave, (40, 100)) if hasattr(termios, "tcsetwinsize") else None
            # The terminal's Ctrl-C reaches only the processes that it controls.
            self.process = subprocess.Popen(
                command,
                cwd=cwd,
                env=full_env,
                stdin=slave,
                stdout=slave,
                stderr=slave,
                start_new_session=True,
                preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
            )
            os.close(slave)
            source = self._master
        else:
            self.process = subprocess.Popen(
                command,
                cwd=cwd,
                env=full_env,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            assert self.process.stdout is not None
            source = os.dup(self.process.stdout.fileno())
            self.process.stdout.close()
        self._reader = threading.Thread(target=self._read, args=(source,), daemon=True)
        self._reader.start()
        self._seen: set[int] = set()

    def __enter__(self) -> DemoRun:
        return self

    def __exit__(self, *exc_info: object) -> None:
        descendants = self.descendants()
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
            # The kernel ends the others; a test that follows must not meet them.
            wait_until(lambda: not [pid for pid in descendants if is_alive(pid)], 20)
        self._reader.join(10)

    def _read(self, source: int) -> None:
        # A terminal whose last process has ended gives EIO.
        with contextlib.suppress(OSError):
            while chunk := os.read(source, 65536):
                self._chunks.append(chunk)
        os.close(source)

    @property
    def raw(self) -> str:
        """Everything that was written so far."""
        return b"".join(self._chunks).decode()

    @property
    def text(self) -> str:
        """The same without the terminal's control sequences."""
        return _ANSI.sub("", self.raw).replace("\r\n", "\n")

    def wait_for(self, text: str, timeout: float = RUN_TIMEOUT) -> None:
        """Wait until `text` was written."""
        wait_until(lambda: text in self.text or self.process.poll() is not None, timeout, self)
        # What was written last is still being read.
        wait_until(lambda: text in self.text, 5, self)

    def wait(self, timeout: float = RUN_TIMEOUT) -> int:
        """Wait for the end and return the exit status."""
        try:
            status = self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {timeout} s:\n{self.text}") from None
        self._reader.join(10)
        return status

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the demo's own process alone, as a supervisor does."""
        self.process.send_signal(number)

    def type(self, text: bytes) -> None:
        """Type into the terminal."""
        assert self._master is not None
        os.write(self._master, text)

    def descendants(self) -> list[int]:
        """The processes that the demo has started and that live."""
        return children_of(self.process.pid)


def wait_until(condition: Any, timeout: float, run: DemoRun | None = None) -> None:
    """Wait until `condition()` is true; fail with the run's output when it is not in time."""
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout} s" + (f":\n{run.text}" if run is not None else ""))
        time.sleep(0.05)


def report(path: Path) -> dict[str, Any]:
    """The figures that a run wrote."""
    figures: dict[str, Any] = json.loads(path.read_text())
    return figures


def worker_pid(run: DemoRun) -> int:
    """The process id of the worker's main process."""
    found = re.search(r"^worker +pid (\d+)", run.text, re.MULTILINE)
    assert found is not None, run.text
    return int(found[1])
