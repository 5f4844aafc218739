"""`python -m` without its imports: a Python program forked from an interpreter that has imported what most need.

Importing Celery, its clients and their drivers takes longer than what most tests of a worker do. A `Program` is forked
after the imports of third-party packages and before any of the project's. Everything else is as in a process of its
own: arguments, environment, directory, session, descriptors, and the interpreter's end.
"""

from __future__ import annotations

import json
import math
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence

from tests.support.inspect import INHERITED
from tests.support.paths import ROOT

#: What the server writes: a process id, then an exit status.
NUMBER = struct.Struct("i")

#: How the names of variables begin that an interpreter reads at its start, or a library when it is imported. They come
#: too late for a program.
TOO_EARLY = ("AUTOSCALE_", "CELERY_", "C_", "KOMBU_", "MP_", "OTEL_", "PSYCOPG_", "PYTHON", "REMAP_")
IN_TIME = {"PYTHONPATH", "PYTHONUNBUFFERED"}

_lock = threading.Lock()
_server: tuple[socket.socket, subprocess.Popen[bytes]] | None = None


def _control() -> socket.socket:
    """Return the socket to the process that forks; the first program starts it."""
    global _server
    with _lock:
        if _server is None:
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            # It belongs to the test run, not to a test that counts sockets.
            os.environ[INHERITED] = f"{os.environ.get(INHERITED, '')} {os.fstat(ours.fileno()).st_ino}"
            with theirs:
                command = [sys.executable, "-u", "-m", "tests.support.program_server"]
                _server = ours, subprocess.Popen(command, stdin=theirs.fileno(), cwd=ROOT, start_new_session=True)
        return _server[0]


def changed_too_late(env: Mapping[str, str]) -> set[str]:
    """Return the variables that a program would not heed."""
    names = {name for name in env.keys() | os.environ.keys() if name.startswith(TOO_EARLY)} - IN_TIME
    return {name for name in names if env.get(name) != os.environ.get(name)}


def close_server() -> None:
    """End the process that programs are forked from; the next one starts another."""
    global _server
    with _lock:
        if _server is not None:
            control, process = _server
            _server = None
            control.close()
            process.wait()


class Program:
    """A running `python -m`, with the part of `subprocess.Popen` that tests need.

    Args:
        command: The module's name and its arguments.
        stdin: A descriptor, which stays the caller's.
        stdout: The same.
        stderr: The same.
        env: The whole environment. Outside `PYTHONPATH`, it has this process's `TOO_EARLY` variables.
        cwd: The working directory.

    Raises:
        ValueError: A variable comes too late to count.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        stdin: int,
        stdout: int,
        stderr: int,
        env: Mapping[str, str],
        cwd: str | os.PathLike[str] = ".",
    ) -> None:
        if late := sorted(changed_too_late(env)):
            raise ValueError(f"{', '.join(late)}: start an interpreter of its own")
        self.args = [sys.executable, "-m", *command]
        self.returncode: int | None = None
        self._lock = threading.Lock()
        request = json.dumps({"command": list(command), "env": dict(env), "cwd": os.path.abspath(cwd)}).encode()
        self._answers, theirs = os.pipe()
        try:
            socket.send_fds(_control(), [request], [stdin, stdout, stderr, theirs])
        finally:
            os.close(theirs)
        started = self._read()
        if started is None:
            raise RuntimeError("the process that programs are forked from has ended")
        self.pid = started

    def poll(self) -> int | None:
        """Return the exit code when the program has ended, negative for a signal."""
        with self._lock:
            if self.returncode is None and select.select([self._answers], [], [], 0)[0]:
                code = self._read()
                self.returncode = -signal.SIGKILL if code is None else code
                os.close(self._answers)
            return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end; `subprocess.TimeoutExpired` when the time is up."""
        deadline = time.monotonic() + (math.inf if timeout is None else timeout)
        while (code := self.poll()) is None:
            left = deadline - time.monotonic()
            if left <= 0:
                raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
            # Not to the end: another thread may have read it.
            select.select([self._answers], [], [], min(left, 0.5))
        return code

    def send_signal(self, number: int) -> None:
        """Send a signal to a program that has not ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Send SIGKILL."""
        self.send_signal(signal.SIGKILL)

    def _read(self) -> int | None:
        answer = os.read(self._answers, NUMBER.size)
        return int(NUMBER.unpack(answer)[0]) if answer else None


def run(
    command: Sequence[str], *, env: Mapping[str, str], timeout: float, cwd: str | os.PathLike[str] = "."
) -> subprocess.CompletedProcess[str]:
    """Run `python -m` to its end and return what it wrote, as `subprocess.run` does with `capture_output`."""
    with open(os.devnull) as nothing, tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        streams = {"stdin": nothing.fileno(), "stdout": out.fileno(), "stderr": err.fileno()}
        program = Program(command, env=env, cwd=cwd, **streams)
        try:
            code = program.wait(timeout)
        finally:
            program.kill()
            program.wait()
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode())
        return subprocess.CompletedProcess(program.args, code, *texts)
