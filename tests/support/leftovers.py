"""What a test session leaves on the machine: processes and temporary directories."""

from __future__ import annotations

import os
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import forkserver, resource_tracker
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]

from tests.support.inspect import children_of, is_alive

# Not WORKERPOOLS_…: the library reads those names as settings, and refuses the ones that it does not know.
MARK = "TEST_SESSION_MARK"


@contextmanager
def nothing_left_behind(root: Path, grace: float = 5.0) -> Iterator[None]:
    """Fail at the end when a process or a `workerpools-*` directory made inside is still there.

    Inside, temporary directories are made in `root`, by this process and its subprocesses, so that those of other
    sessions are told apart; and every program started carries a mark in its environment, so that one whose parent
    died is found too.

    Args:
        root: An empty directory that every user can write to.
        grace: Seconds that what was told to end may still take.
    """
    mark = uuid.uuid4().hex
    present = set(children_of())
    saved = {name: os.environ.get(name) for name in ("TMPDIR", MARK)}
    saved_tempdir = tempfile.tempdir
    os.environ.update({"TMPDIR": str(root), MARK: mark})
    tempfile.tempdir = str(root)
    try:
        yield
    finally:
        tempfile.tempdir = saved_tempdir
        for name, value in saved.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
    _end_helpers()
    deadline = time.monotonic() + grace
    while (found := _processes(mark, present)) and time.monotonic() < deadline:
        time.sleep(0.05)
    folders = sorted(str(path) for path in root.glob("workerpools-*"))
    if found or folders:
        raise AssertionError("\n".join(["left behind:", *map(_describe, sorted(found)), *folders]))


def _end_helpers() -> None:
    """End what multiprocessing keeps for the rest of this process's life; since Python 3.14 its default needs both."""
    # As CPython's own tests do: there is no public way.
    helpers: list[Any] = [forkserver._forkserver, resource_tracker._resource_tracker]
    for helper in helpers:
        helper._stop()


def _processes(mark: str, present: set[int]) -> set[int]:
    """Return our descendants that were not present before, and every process that carries the mark."""
    wanted = f"{MARK}={mark}".encode()
    found = set(children_of()) - present
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if wanted in (folder / "environ").read_bytes().split(b"\0"):
                found.add(int(folder.name))
        except OSError:
            # Ended meanwhile, or another user's.
            continue
    return {pid for pid in found if pid != os.getpid() and is_alive(pid)}


def _describe(pid: int) -> str:
    try:
        return f"process {pid}: {' '.join(psutil.Process(pid).cmdline())}"
    except psutil.Error:
        return f"process {pid}"
