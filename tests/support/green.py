"""Run a function in an interpreter in which gevent or eventlet has replaced the standard library's ways to wait.

What is replaced stays so for the rest of a process, and must be replaced before anything else is imported.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from importlib import import_module
from typing import Any

from tests.support.paths import environment


class GreenFailed(AssertionError):
    """The interpreter ended without an answer; the message ends with what it wrote to standard error."""


def run_green(library: str, function: str, *args: Any, timeout: float = 60.0) -> Any:
    """Call a function in a fresh, patched interpreter and return its picklable result.

    Args:
        library: `gevent`, `eventlet`, or an empty text to patch nothing.
        function: `module:name`, importable from the checkout's root.
        args: Picklable arguments.
        timeout: Seconds until the interpreter is killed.
    """
    # psycopg looks for gevent alone.
    extra = {"PSYCOPG_WAIT_FUNC": "wait_select"} if library == "eventlet" else {}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.support.green", library, function],
        input=pickle.dumps(args),
        env=environment(extra),
        capture_output=True,
        timeout=timeout,
    )
    if done.returncode != 0 or not done.stdout:
        raise GreenFailed(f"the interpreter ended with {done.returncode}:\n{done.stderr.decode(errors='replace')}")
    return pickle.loads(done.stdout)


def patch(library: str) -> None:
    """Replace what can be replaced, as `celery --pool` does."""
    if library == "gevent":
        import gevent.monkey

        gevent.monkey.patch_all()
    elif library == "eventlet":
        import eventlet

        eventlet.monkey_patch()


def main(library: str, function: str) -> None:
    """Patch, import and call; write the pickled answer to standard output."""
    # Prints of the function go to standard error: standard output carries the answer alone.
    answers = os.dup(1)
    os.dup2(2, 1)
    args = pickle.load(sys.stdin.buffer)
    patch(library)
    module, _, name = function.partition(":")
    answer = getattr(import_module(module), name)(*args)
    os.write(answers, pickle.dumps(answer))


if __name__ == "__main__":
    main(*sys.argv[1:])
