"""The process behind `Program`: an interpreter that has imported the third-party packages, and forks.

It reads one request a message from its standard input, a socket, and writes a program's process id and exit status to
the pipe that came with the request. Nothing of the project is imported before the fork.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import pkgutil
import runpy
import select
import signal
import socket
import struct
import sys
import tempfile
import time
import types
from typing import Any, NoReturn

#: Most of what a worker, Celery's commands and the HTTP server of the tests import; only time depends on it. What
#: replaces functions, as gevent does, has no place here.
PACKAGES = (
    *("celery.app.amqp", "celery.app.control", "celery.app.events", "celery.app.log", "celery.app.task"),
    *("celery.apps.worker", "celery.backends.redis", "celery.bin", "celery.concurrency.prefork"),
    *("celery.concurrency.solo", "celery.concurrency.thread", "celery.contrib.migrate", "celery.events.state"),
    *("celery.fixups.django", "celery.worker.autoscale", "celery.worker.consumer", "celery.worker.control"),
    *("celery.worker.strategy", "click_didyoumean", "click_plugins", "click_repl", "flower.command", "http.server"),
    *("httpx", "kombu.transport.redis", "psycopg", "psycopg2.extras", "redis", "requests"),
    *("sqlalchemy.dialects.postgresql", "sqlalchemy.ext.asyncio", "sqlalchemy.orm"),
)

LARGEST = 1 << 17
NUMBER = struct.Struct("i")


def serve(control: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """Fork for each request until the owner is gone; returns in the forked process alone."""
    owner = os.getppid()
    running: dict[int, int] = {}
    ended, wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(wake)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    while True:
        # A forked child of the owner may hold the other end open.
        ready, _, _ = select.select([control, ended], [], [], 0.5)
        if os.getppid() != owner:
            sys.exit()
        if ended in ready:
            os.read(ended, 4096)
            _report(running)
        if control in ready:
            message, fds, _, _ = socket.recv_fds(control, LARGEST, 4)
            if not message:
                sys.exit()
            answers = fds.pop()
            pid = os.fork()
            if pid == 0:
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                os.setsid()
                # Not before it is the leader of a session, as its starter expects it to be.
                os.write(answers, NUMBER.pack(os.getpid()))
                control.close()
                for fd in (ended, wake, answers, *running.values()):
                    os.close(fd)
                return json.loads(message), fds
            for fd in fds:
                os.close(fd)
            running[pid] = answers


def _report(running: dict[int, int]) -> None:
    while running:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == 0:
            return
        answers = running.pop(pid)
        # Nobody may wait for it.
        with contextlib.suppress(BrokenPipeError):
            os.write(answers, NUMBER.pack(os.waitstatus_to_exitcode(status)))
        os.close(answers)


def become(request: dict[str, Any], fds: list[int], path: list[str]) -> str:
    """Be as an interpreter that was started for the program; return the program's module."""
    for number, fd in enumerate(fds):
        os.dup2(fd, number)
        os.close(fd)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    time.tzset()
    tempfile.tempdir = None
    importlib.invalidate_caches()
    own = [os.getcwd(), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    known = {name.partition(".")[0] for name in sys.modules} - {"__main__", "tests"}
    if hidden := known & {found.name for found in pkgutil.iter_modules(own)}:
        sys.exit(f"{', '.join(sorted(hidden))} was imported from elsewhere: start an interpreter of its own")
    sys.path[:] = [*own, *path]
    module, *arguments = request["command"]
    sys.argv[:] = ["-m", *arguments]
    return str(module)


def main() -> NoReturn:
    """Import, serve, and run what was asked for in the forked process."""
    # Its first entry is the directory that `-m` was run in.
    path = sys.path[1:]
    for name in PACKAGES:
        importlib.import_module(name)
    for module in pkgutil.iter_modules(sys.modules["celery.bin"].__path__, "celery.bin."):
        # This one imports the project, by its entry points.
        if module.name != "celery.bin.celery":
            importlib.import_module(module.name)
    assert not {"workerpools", "gevent", "eventlet"} & set(sys.modules)
    assert len(os.listdir("/proc/self/task")) == 1, "a thread would not be there after the fork"
    # At the end of a forked interpreter its collector would walk, and so copy, all that was imported here.
    gc.collect()
    gc.freeze()
    control = socket.socket(fileno=os.dup(0))
    program = become(*serve(control), path)
    sys.modules["__main__"] = types.ModuleType("__main__")
    # What the interpreter itself does for `-m`.
    runpy._run_module_as_main(program)  # type: ignore[attr-defined]
    raise SystemExit


if __name__ == "__main__":
    main()
