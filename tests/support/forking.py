"""Run a function in a real forked child and bring back what it returned or how it failed.

`run_in_fork` forks the calling process. A child that must end as a normal interpreter does, with atexit and
garbage collection, cannot be a child of the test session (it would run the session's own clean-up):
`fork_in_script` forks a fresh interpreter instead.
"""

from __future__ import annotations

import os
import pickle
import select
import signal
import struct
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, NoReturn, TypeVar

from tests.support.paths import environment

T = TypeVar("T")

_LENGTH = struct.Struct("!Q")


class ChildError(AssertionError):
    """The forked child did not do what was asked of it."""


class ChildRaised(ChildError):
    """The function raised in the child; the message is the child's traceback."""


class ChildDied(ChildError):
    """The child ended without an answer, or with another exit status than 0."""


class ChildTimedOut(ChildError):
    """The child did not finish in time and was killed."""


class Forked(NamedTuple):
    """What the two sides of a fork returned."""

    child: Any
    parent: Any


def run_in_fork(fn: Callable[[], T], *, timeout: float = 30.0, exit: Literal["os", "sys"] = "os") -> T:
    """Fork, run `fn` in the child, and return its picklable result.

    Args:
        fn: Called without arguments. With `exit="sys"` it must be importable, or a partial of what is.
        timeout: Seconds until the child is killed with SIGKILL.
        exit: `"os"` ends the child with `os._exit`, as billiard does; `"sys"` forks a fresh interpreter whose
            child ends by full finalisation (see `fork_in_script`, which can open something before the fork).

    Raises:
        ChildRaised: `fn` raised, whatever it raised.
        ChildDied: The child was killed, left by itself, or had a non-zero status.
        ChildTimedOut: The time was up.
    """
    if exit == "sys":
        result: T = fork_in_script(_nothing, _IgnoringState(fn), timeout=timeout).child
        return result
    answer: T = wait_for_child(start_child(fn), timeout)
    return answer


def fork_in_script(
    before: Callable[[], Any],
    in_child: Callable[[Any], Any],
    after: Callable[[Any], Any] | None = None,
    *,
    timeout: float = 30.0,
) -> Forked:
    """Run a fork in a fresh interpreter whose child ends by `sys.exit` and full finalisation.

    The functions must be importable. `before` runs first, in the script's process; what it returns stays alive
    to the end of both processes and is handed to `in_child`, and then, when the child has ended, to `after` in
    the parent.
    """
    try:
        # The path comes first: the functions' modules must be found while the rest is unpickled.
        done = subprocess.run(
            [sys.executable, "-m", "tests.support.forkscript"],
            input=pickle.dumps(sys.path) + pickle.dumps((before, in_child, after, timeout)),
            env=environment(),
            capture_output=True,
            timeout=timeout + 10.0,
        )
    except subprocess.TimeoutExpired as exc:
        raise ChildTimedOut(f"the script was still running after {timeout + 10.0} s") from exc
    if done.returncode != 0 or not done.stdout:
        raise ChildDied(f"the script ended with {done.returncode}:\n{done.stderr.decode(errors='replace')}")
    answer: Forked | ChildError = pickle.loads(done.stdout)
    if isinstance(answer, ChildError):
        raise answer
    return answer


class Child(NamedTuple):
    """A forked child that is still to be waited for, and the reading end of its answer."""

    pid: int
    answers: int


def start_child(fn: Callable[[], Any], *, exit: Literal["os", "sys"] = "os") -> Child:
    """Fork and run `fn` in the child, without waiting: several children can run side by side.

    With `exit="sys"` the child leaves by `SystemExit`, through every frame of the caller: only for scripts.
    """
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        # Python warns of a fork beside threads; forking beside the proxies' threads is what the tests want.
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid == 0:
        os.close(reading)
        _child(fn, writing, exit)
    os.close(writing)
    return Child(pid, reading)


def wait_for_child(child: Child, timeout: float = 30.0) -> Any:
    """Return the child's result; raises as `run_in_fork` does. The child is gone afterwards in every case."""
    deadline = time.monotonic() + timeout
    status: int | None = None
    try:
        raw = _read_answer(child.answers, deadline)
        status = _wait(child.pid, deadline)
    finally:
        os.close(child.answers)
        if status is None:
            os.kill(child.pid, signal.SIGKILL)
            status = os.waitstatus_to_exitcode(os.waitpid(child.pid, 0)[1])
    if raw is None:
        raise ChildDied(f"the child ended with {status} and without an answer")
    succeeded, value = pickle.loads(raw)
    if not succeeded:
        raise ChildRaised(f"in the forked child:\n{value}")
    if status != 0:
        raise ChildDied(f"the child answered, then ended with {status}")
    return value


def _child(fn: Callable[[], Any], writing: int, exit: Literal["os", "sys"]) -> NoReturn:
    status = 1
    try:
        try:
            answer = pickle.dumps((True, fn()))
        except BaseException:
            answer = pickle.dumps((False, traceback.format_exc()))
        data = _LENGTH.pack(len(answer)) + answer
        while data:
            data = data[os.write(writing, data) :]
        os.close(writing)
        status = 0
    finally:
        if exit == "os":
            # Nothing of the test session may run in the child: no finally further up, no atexit, no flush.
            os._exit(status)
    raise SystemExit(status)


def _read_answer(reading: int, deadline: float) -> bytes | None:
    """Read one answer; None when the child ended without a whole one."""
    data = b""
    wanted = _LENGTH.size
    # The length comes first: an end of file would not, while a grandchild holds the pipe open.
    while len(data) < wanted:
        left = deadline - time.monotonic()
        if left <= 0 or not select.select([reading], [], [], left)[0]:
            raise ChildTimedOut("the child did not answer in time and was killed")
        chunk = os.read(reading, 65536)
        if not chunk:
            return None
        data += chunk
        if len(data) >= _LENGTH.size:
            wanted = _LENGTH.size + int(_LENGTH.unpack_from(data)[0])
    return data[_LENGTH.size :]


def _wait(pid: int, deadline: float) -> int:
    """Collect the child and return its exit code, negative for a signal."""
    pause = 0.0005
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            raise ChildTimedOut("the child answered but did not end in time and was killed")
        time.sleep(pause)
        pause = min(pause * 2, 0.02)


def _nothing() -> None:
    return None


class _IgnoringState:
    """Adapt a function without arguments to the child's side of `fork_in_script`, picklable."""

    def __init__(self, fn: Callable[[], Any]) -> None:
        self.fn = fn

    def __call__(self, state: Any) -> Any:
        return self.fn()
