"""A real Celery worker as a subprocess, of which nothing is left behind."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import psutil  # type: ignore[import-untyped]

from tests.support.inspect import children_of, is_alive
from tests.support.paths import environment
from tests.support.program import Program, changed_too_late


class WorkerFailed(AssertionError):
    """The worker did not do what was asked of it; the message ends with the last lines of its log."""


class WorkerProcess:
    """`celery -A <app> worker` in a process group of its own, with its output in a log file.

    Entering the context starts the worker and waits until it is ready; leaving it kills whatever is left.

    Args:
        app: `module:attribute` of the Celery application, importable from the checkout's root.
        pool: The execution pool (`prefork`, `threads`, `solo`, …).
        concurrency: Processes or threads of the execution pool.
        env: Variables to add to, or replace in, this process's environment.
        args: More arguments of `celery worker`.
        cwd: The working directory; by default a temporary one, removed with all that was written to it.
        events: Send task events (`-E`).
        loglevel: The worker's log level; `wait_ready` needs `INFO` or more.
        fresh: Start an interpreter of its own, in which no package has been imported. One is started anyway for
            greenlets, and for variables that a `Program` does not heed.
    """

    def __init__(
        self,
        app: str,
        *,
        pool: str = "prefork",
        concurrency: int = 2,
        env: Mapping[str, str] | None = None,
        args: Sequence[str] = (),
        cwd: str | os.PathLike[str] | None = None,
        events: bool = False,
        loglevel: Literal["DEBUG", "INFO"] = "INFO",
        fresh: bool = False,
    ) -> None:
        self.name = f"test-{uuid.uuid4().hex[:12]}@%h"
        self.command = [
            *("celery", "-A", app, "worker"),
            *("--pool", pool, "--concurrency", str(concurrency), "--hostname", self.name),
            *("--loglevel", loglevel, "--without-gossip", "--without-mingle"),
            *(["-E"] if events else []),
            *args,
        ]
        self._env = environment({"PYTHONUNBUFFERED": "1", **(env or {})})
        self._cwd = cwd
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        # What waits is replaced before anything else is imported.
        self._fresh = fresh or pool in ("eventlet", "gevent") or bool(changed_too_late(self._env))
        self._process: Program | subprocess.Popen[bytes] | None = None
        self._seen: dict[int, psutil.Process] = {}
        self._last_log = ""

    @property
    def node(self) -> str:
        """The name under which it answers."""
        return self.name.replace("%h", socket.gethostname())

    def __enter__(self) -> WorkerProcess:
        self.start()
        try:
            self.wait_ready()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<WorkerProcess {self.name} pid={self._process.pid if self._process else None}>"

    # Start and readiness.

    def start(self) -> None:
        """Start the worker without waiting for it."""
        if self._process is not None:
            raise RuntimeError("the worker was started before")
        self._folder = tempfile.TemporaryDirectory(prefix="workerpools-worker-")
        (Path(self._folder.name) / "cwd").mkdir()
        cwd = self._cwd or Path(self._folder.name) / "cwd"
        with self._log_file().open("wb") as log, open(os.devnull, "rb") as nothing:
            streams = {"stdin": nothing.fileno(), "stdout": log.fileno(), "stderr": log.fileno()}
            if self._fresh:
                command = [sys.executable, "-m", *self.command]
                self._process = subprocess.Popen(command, env=self._env, cwd=cwd, start_new_session=True, **streams)
            else:
                self._process = Program(self.command, env=self._env, cwd=cwd, **streams)

    def wait_ready(self, timeout: float = 30.0) -> None:
        """Wait until the worker says that it is ready, which it does when its children are up."""
        self.wait_for_log(" ready.", timeout)

    def wait_for_log(self, text: str, timeout: float = 30.0) -> None:
        """Wait until the log contains `text`; `WorkerFailed` when the worker ends or the time is up."""
        deadline = time.monotonic() + timeout
        while True:
            # Asked before the log is read: what a worker wrote before its end must count.
            ended = self._running().poll()
            if text in self.log():
                return
            if ended is not None:
                raise self._failed(f"ended with {ended} before it logged {text!r}")
            if time.monotonic() > deadline:
                raise self._failed(f"did not log {text!r} in {timeout} s")
            time.sleep(0.02)

    # What the test can see.

    @property
    def pid(self) -> int:
        """The main process's id."""
        return self._running().pid

    @property
    def returncode(self) -> int | None:
        """The main process's exit code, negative for a signal, or None while it runs."""
        return self._running().poll()

    def children(self) -> list[int]:
        """Return the living children of the main process: with prefork, its execution pool."""
        found = children_of(self.pid, recursive=False)
        self._remember()
        return found

    def log(self) -> str:
        """Return everything the worker wrote so far; also after it is gone."""
        if self._folder is not None:
            with contextlib.suppress(FileNotFoundError):
                self._last_log = self._log_file().read_text(errors="replace")
        return self._last_log

    # How it ends.

    def stop(self, timeout: float = 30.0) -> int:
        """Stop warmly (SIGTERM: finish what runs) and return the exit code; `WorkerFailed` when it is late."""
        return self._signal_and_wait(signal.SIGTERM, timeout)

    def cold_stop(self, timeout: float = 30.0) -> int:
        """Stop coldly (SIGQUIT: drop what runs) and return the exit code; `WorkerFailed` when it is late."""
        return self._signal_and_wait(signal.SIGQUIT, timeout)

    def kill(self, *, children: bool = True) -> None:
        """End the worker with SIGKILL: with its children, as a container does, or the main process alone."""
        process = self._running()
        self._remember()
        process.kill()
        if children:
            self._kill_rest()
        process.wait()

    def wait(self, timeout: float = 30.0) -> int:
        """Wait for a worker that was told to end in another way; `WorkerFailed` when it does not."""
        try:
            return self._running().wait(timeout)
        except subprocess.TimeoutExpired:
            children = self.children()
            # Celery's main process then logs the stacks of its threads.
            self._running().send_signal(signal.SIGUSR1)
            time.sleep(2.0)
            raise self._failed(f"was still running after {timeout} s, with the children {children}", 150) from None

    def close(self) -> None:
        """Kill whatever is left of the worker and remove its files; the log stays readable."""
        if self._process is not None:
            if self._process.poll() is None:
                self._remember()
                self._process.kill()
                self._process.wait()
            self._kill_rest()
        if self._folder is not None:
            self.log()
            self._folder.cleanup()
            self._folder = None

    def _signal_and_wait(self, number: signal.Signals, timeout: float) -> int:
        self._remember()
        self._running().send_signal(number)
        return self.wait(timeout)

    def _remember(self) -> None:
        """Note the present descendants: when the main process is gone, nothing links them to it any more."""
        for pid in children_of(self.pid):
            with contextlib.suppress(psutil.NoSuchProcess):
                self._seen.setdefault(pid, psutil.Process(pid))

    def _kill_rest(self) -> None:
        """Kill the process group and the descendants that left it, and wait until they are gone."""
        group = self.pid
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL)
        for process in self._seen.values():
            # psutil compares start times, so that a process that took over the id is spared.
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        deadline = time.monotonic() + 5.0
        while any(is_alive(pid) and process.is_running() for pid, process in self._seen.items()):
            if time.monotonic() > deadline:
                raise self._failed("left processes behind that SIGKILL did not end")
            time.sleep(0.01)

    def _running(self) -> Program | subprocess.Popen[bytes]:
        if self._process is None:
            raise RuntimeError("the worker was not started")
        return self._process

    def _log_file(self) -> Path:
        assert self._folder is not None
        return Path(self._folder.name) / "worker.log"

    def _failed(self, what: str, lines: int = 40) -> WorkerFailed:
        end = self.log().splitlines()[-lines:]
        return WorkerFailed("\n".join([f"the worker {self.name} {what}; the end of its log:", *end]))
