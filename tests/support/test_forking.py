"""Running a function in a forked child: results, failures, exit statuses and the two ways to end."""

from __future__ import annotations

import atexit
import os
import signal
import socket
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.support.forking import (
    ChildDied,
    ChildRaised,
    ChildTimedOut,
    fork_in_script,
    run_in_fork,
    start_child,
    wait_for_child,
)
from tests.support.inspect import children_of, open_fds


def test_runs_in_another_process_and_returns_the_result() -> None:
    """The child is a fork of this process: another pid, this one its parent, and its memory a copy."""
    seen = ["before"]

    def child() -> tuple[int, int, list[str]]:
        seen.append("in the child")
        return os.getpid(), os.getppid(), seen

    pid, parent, copy = run_in_fork(child)
    assert pid != os.getpid()
    assert parent == os.getpid()
    assert copy == ["before", "in the child"]
    assert seen == ["before"]


def test_brings_back_large_results() -> None:
    """A result larger than the pipe's buffer arrives whole."""
    assert run_in_fork(lambda: b"x" * 5_000_000) == b"x" * 5_000_000


@pytest.mark.parametrize("error", [ValueError("told you"), KeyboardInterrupt("told you"), SystemExit("told you")])
def test_brings_back_the_traceback(error: BaseException) -> None:
    """Whatever the function raises fails the test, with the child's traceback in the message."""

    def fails_here() -> None:
        raise error

    with pytest.raises(ChildRaised, match=rf"(?s)fails_here.*{type(error).__name__}: told you"):
        run_in_fork(fails_here)


def test_an_unpicklable_result_is_an_error() -> None:
    """A result that cannot cross the pipe is told as what it is."""
    with pytest.raises(ChildRaised, match="pickle"):
        run_in_fork(lambda: lambda: None)


def test_a_child_that_leaves_by_itself_is_an_error() -> None:
    """Neither a silent exit, nor a signal, passes for success, not even with status 0."""
    with pytest.raises(ChildDied, match="ended with 0 and without an answer"):
        run_in_fork(lambda: os._exit(0))
    with pytest.raises(ChildDied, match=f"ended with -{int(signal.SIGKILL)}"):
        run_in_fork(lambda: os.kill(os.getpid(), signal.SIGKILL))


def test_a_child_that_hangs_is_killed() -> None:
    """The timeout bounds the test, and nothing stays behind."""
    # Servers of the session may be children of this process, too.
    before = set(children_of(os.getpid()))
    started = time.monotonic()
    with pytest.raises(ChildTimedOut):
        run_in_fork(lambda: time.sleep(60), timeout=0.3)
    assert time.monotonic() - started < 5
    assert set(children_of(os.getpid())) <= before


def test_a_grandchild_that_lives_on_does_not_hold_the_answer_up() -> None:
    """The answer is complete by its length, not by the end of the pipe, which a grandchild keeps open."""

    def child() -> int:
        pid = os.fork()
        if pid == 0:
            time.sleep(60)
        return pid

    started = time.monotonic()
    grandchild = run_in_fork(child)
    os.kill(grandchild, signal.SIGKILL)
    assert time.monotonic() - started < 5


def test_children_can_run_side_by_side() -> None:
    """`start_child` does not wait: three children that meet at a barrier all get there."""
    barriers = [socket.socketpair() for _ in range(3)]
    children = [start_child(partial(_meet, theirs)) for _, theirs in barriers]
    for ours, _ in barriers:
        assert ours.recv(1) == b"1"
    for ours, _ in barriers:
        ours.sendall(b"2")
    assert [wait_for_child(child) for child in children] == [b"2"] * 3
    for ours, theirs in barriers:
        ours.close()
        theirs.close()


def _meet(end: socket.socket) -> bytes:
    end.sendall(b"1")
    return end.recv(1)


def test_leaves_no_descriptor_and_no_child() -> None:
    """Good or bad, a run leaves this process as it was."""
    before, children = open_fds(), set(children_of(os.getpid()))
    run_in_fork(os.getpid)
    with pytest.raises(ChildRaised):
        run_in_fork(partial(int, "x"))
    with pytest.raises(ChildTimedOut):
        run_in_fork(partial(time.sleep, 60), timeout=0.05)
    assert open_fds().keys() == before.keys()
    assert set(children_of(os.getpid())) <= children


def _note(path: str, text: str) -> None:
    with open(path, "a") as file:
        file.write(f"{text} {os.getpid()}\n")


def _note_the_end(path: str) -> int:
    atexit.register(_note, path, "atexit")
    return os.getpid()


def test_exit_os_runs_no_clean_up(tmp_path: Path) -> None:
    """`os._exit` ends the child before atexit, as billiard ends a worker's child."""
    path = tmp_path / "notes"
    run_in_fork(partial(_note_the_end, str(path)))
    atexit.unregister(_note)
    assert not path.exists()


def test_exit_sys_runs_the_interpreters_clean_up(tmp_path: Path) -> None:
    """With `exit="sys"` the child's atexit functions run, in that child."""
    path = tmp_path / "notes"
    pid = run_in_fork(partial(_note_the_end, str(path)), exit="sys")
    assert path.read_text() == f"atexit {pid}\n"


class Finalized:
    """Writes a line when it is collected."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __del__(self) -> None:
        # The builtin `open` is gone late in finalisation.
        descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.write(descriptor, f"collected {os.getpid()}\n".encode())


def _child_side(state: Finalized) -> tuple[int, bool]:
    return os.getpid(), os.path.exists(state.path)


def _parent_side(state: Finalized) -> tuple[int, str]:
    return os.getpid(), Path(state.path).read_text()


def test_a_script_keeps_its_state_alive_until_each_process_is_torn_down(tmp_path: Path) -> None:
    """What was opened before the fork is collected in the child after its work, then in the parent after its own."""
    path = str(tmp_path / "notes")
    (child, existed), (parent, seen_after) = fork_in_script(partial(Finalized, path), _child_side, _parent_side)
    assert len({child, parent, os.getpid()}) == 3
    assert not existed
    assert seen_after == f"collected {child}\n"
    assert Path(path).read_text() == f"collected {child}\ncollected {parent}\n"


def _fail(state: Any) -> None:
    print("printing must not disturb the answer")
    raise ValueError("told you")


def _die(state: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _fail_at_the_end(state: Any) -> None:
    atexit.register(os._exit, 7)


def test_failures_in_a_script_are_told() -> None:
    """An exception and a death of the child, a bad end, an error before and after the fork: all fail the test."""
    with pytest.raises(ChildRaised, match=r"(?s)_fail.*ValueError: told you"):
        fork_in_script(os.getpid, _fail)
    with pytest.raises(ChildDied, match="without an answer"):
        fork_in_script(os.getpid, _die)
    with pytest.raises(ChildDied, match="ended with 7"):
        fork_in_script(os.getpid, _fail_at_the_end)
    with pytest.raises(ChildDied, match="ValueError: told you"):
        fork_in_script(partial(_fail, None), str)
    with pytest.raises(ChildDied, match="ValueError: told you"):
        fork_in_script(os.getpid, str, _fail)
    with pytest.raises(ChildTimedOut):
        fork_in_script(os.getpid, _sleep, timeout=1.0)


def _sleep(state: Any) -> None:
    time.sleep(60)


def _executable() -> str:
    return sys.executable


def test_a_script_runs_this_interpreter() -> None:
    """The script runs under the same Python as the tests."""
    assert run_in_fork(_executable, exit="sys") == sys.executable
