"""Run a function in an interpreter in which gevent or eventlet has replaced the standard library's ways to wait.

What is replaced stays so for the rest of a process, and must be replaced before anything else is imported.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import subprocess
import sys
import tempfile
import threading
from importlib import import_module
from typing import Any

from tests.support.paths import environment


class GreenFailed(AssertionError):
    """The interpreter ended without an answer; the message ends with what it wrote to standard error."""


class Interpreter:
    """A fresh interpreter, patched, that answers one call after the other.

    Args:
        library: `gevent`, `eventlet`, or an empty text to patch nothing.
    """

    def __init__(self, library: str) -> None:
        # psycopg looks for gevent alone.
        extra = {"PSYCOPG_WAIT_FUNC": "wait_select"} if library == "eventlet" else {}
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the process
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "tests.support.green", library],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=environment(extra),
        )

    def call(self, function: str, *args: Any, timeout: float = 60.0) -> Any:
        """Call a function and return its picklable result.

        Args:
            function: `module:name`, importable from the checkout's root.
            args: Picklable arguments.
            timeout: Seconds until the interpreter is killed.
        """
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        limit = threading.Timer(timeout, process.kill)
        limit.start()
        try:
            with contextlib.suppress(BrokenPipeError):
                pickle.dump((function, args), process.stdin)
                process.stdin.flush()
            return pickle.load(process.stdout)
        except EOFError:
            self._errors.seek(0)
            told = self._errors.read().decode(errors="replace")
            raise GreenFailed(f"the interpreter ended with {process.wait()}:\n{told}") from None
        finally:
            limit.cancel()

    def close(self) -> None:
        """End the interpreter, by its end of file or else by SIGKILL."""
        with contextlib.suppress(BrokenPipeError):
            assert self._process.stdin is not None
            self._process.stdin.close()
        try:
            self._process.wait(10.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()
        self._errors.close()


def run_green(library: str, function: str, *args: Any, timeout: float = 60.0) -> Any:
    """Call a function in a fresh, patched interpreter of its own and return its picklable result."""
    with contextlib.closing(Interpreter(library)) as interpreter:
        return interpreter.call(function, *args, timeout=timeout)


def patch(library: str) -> None:
    """Replace what can be replaced, as `celery --pool` does."""
    if library == "gevent":
        import gevent.monkey

        gevent.monkey.patch_all()
    elif library == "eventlet":
        import eventlet

        eventlet.monkey_patch()


def main(library: str) -> None:
    """Patch; then import and call, and write the pickled answer to standard output, until standard input ends."""
    # Prints of the function go to standard error: standard output carries the answers alone.
    answers = os.dup(1)
    os.dup2(2, 1)
    patch(library)
    while True:
        try:
            function, args = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        module, _, name = function.partition(":")
        answer = pickle.dumps(getattr(import_module(module), name)(*args))
        while answer:
            answer = answer[os.write(answers, answer) :]


if __name__ == "__main__":
    main(*sys.argv[1:])
