"""The check at the end of a session, on things that are left behind on purpose."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.databases import Database
from tests.support.forking import ChildDied, start_child, wait_for_child
from tests.support.leftovers import nothing_left_behind
from tests.support.proxy import TcpProxy


def test_a_clean_session_passes_and_restores_the_environment(tmp_path: Path) -> None:
    """What was made and removed again is no leftover, and TMPDIR is as before."""
    before = (tempfile.gettempdir(), dict(os.environ))
    with nothing_left_behind(tmp_path):
        assert tempfile.gettempdir() == str(tmp_path)
        with tempfile.TemporaryDirectory(prefix="workerpools-"):
            subprocess.run([sys.executable, "-c", ""], check=True)
    assert (tempfile.gettempdir(), dict(os.environ)) == before


def test_helpers_of_multiprocessing_are_no_leftover(tmp_path: Path) -> None:
    """They live as long as the process that started them; 3.14 starts them for any pool of processes."""
    with nothing_left_behind(tmp_path, grace=0.1):
        made = multiprocessing.get_context("forkserver").Process(target=int)
        made.start()
        made.join()
        assert made.exitcode == 0


def test_a_directory_is_told(tmp_path: Path) -> None:
    """A workspace that was not removed is named, also one that a subprocess made."""
    make = "import tempfile; tempfile.mkdtemp(prefix='workerpools-left-')"
    with pytest.raises(AssertionError, match=r"workerpools-left-"), nothing_left_behind(tmp_path):
        subprocess.run([sys.executable, "-c", make], check=True)


def test_a_child_is_told(tmp_path: Path) -> None:
    """A child that still runs is named with its command."""
    with pytest.raises(AssertionError, match=r"process \d+: .*input"), nothing_left_behind(tmp_path, grace=0.1):
        child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    child.communicate()


def test_a_fork_is_told(tmp_path: Path) -> None:
    """A forked child has the environment of before the session: it is found as a child."""
    with pytest.raises(AssertionError, match=r"process \d+"), nothing_left_behind(tmp_path, grace=0.1):
        child = start_child(lambda: time.sleep(60))
    os.kill(child.pid, 9)
    with pytest.raises(ChildDied):
        wait_for_child(child)


def test_an_orphan_is_told(tmp_path: Path) -> None:
    """A process whose parent is gone, in a session of its own, is found by its mark."""
    start = (
        "import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'],"
        "start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL); print(p.pid)"
    )
    pid = 0
    with pytest.raises(AssertionError, match=r"time\.sleep"), nothing_left_behind(tmp_path, grace=0.1):
        pid = int(subprocess.run([sys.executable, "-c", start], check=True, capture_output=True).stdout)
    os.kill(pid, 9)


def test_a_test_database_is_empty_and_its_own(database: Database, proxy_to: Callable[[Database], TcpProxy]) -> None:
    """Each test gets a new database, under the same address directly and another through a proxy."""
    assert database.execute("SELECT count(*) FROM pg_stat_user_tables") == [(0,)]
    assert database.execute("SELECT current_database()") == [(database.name,)]
    proxy = proxy_to(database)
    assert database.through(proxy).execute("SELECT %s::text", "x") == [("x",)]
    assert proxy.accepted == 1
    assert database.url("psycopg").startswith("postgresql+psycopg://")
