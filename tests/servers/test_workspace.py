"""The workspace is private, goes with its run, and outlives a killed run only until the next one."""

from __future__ import annotations

import os
import signal
import stat
import time
from pathlib import Path

import pytest

from demo_tasks.servers import ServerError, Workspace
from tests.servers.helpers import NOBODY, start_python

_HOLD = """
import sys, time
from demo_tasks.servers import Workspace
workspace = Workspace(sys.argv[1])
(workspace.directory("server") / "file").write_text("x")
print(workspace.path, flush=True)
time.sleep(60)
"""

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to make another user's directory")


def test_close_removes_everything_and_can_be_repeated(base: Path) -> None:
    """After close() the directory is gone; a second close() does nothing."""
    workspace = Workspace(base)
    (workspace.directory("server") / "file").write_text("x")
    (workspace.path / "link").symlink_to("/")
    workspace.close()
    workspace.close()
    assert not list(base.iterdir())
    assert "closed" in repr(workspace)


def test_nobody_else_can_list_it(space: Workspace) -> None:
    """Other users cannot list the workspace, nor enter a server's directory."""
    assert not stat.S_IMODE(space.path.stat().st_mode) & 0o066
    assert stat.S_IMODE(space.directory("server").stat().st_mode) == 0o700


def test_two_servers_cannot_share_a_name(space: Workspace) -> None:
    """The second server of one name is refused with a sentence that names it."""
    space.directory("postgres")
    with pytest.raises(ServerError, match="'postgres'"):
        space.directory("postgres")


def test_closed_workspace_gives_no_directory(base: Path) -> None:
    """A server cannot start in a workspace that is closed."""
    with Workspace(base) as workspace:
        pass
    with pytest.raises(ServerError, match="closed"):
        workspace.directory("server")


def test_live_run_is_left_alone_and_dead_one_is_swept(base: Path) -> None:
    """A new workspace keeps the directory of a live run and removes it once that run was killed."""
    process = start_python(_HOLD, base)
    with process:
        assert process.stdout is not None
        other = Path(process.stdout.readline().strip())
        try:
            with Workspace(base):
                assert (other / "server" / "file").exists()
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
    with Workspace(base):
        assert not other.exists()


def test_two_workspaces_in_one_process_keep_each_other(base: Path) -> None:
    """The sweep recognises this process's own workspaces as live."""
    with Workspace(base) as first, Workspace(base) as second:
        assert first.path.exists()
        assert second.path.exists()


def test_forked_child_does_not_remove_it(space: Workspace) -> None:
    """close() in a forked child leaves the parent's directory in place."""
    child = os.fork()
    if child == 0:
        try:
            space.close()
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert space.path.exists()


def test_unfinished_directory_is_given_time(base: Path) -> None:
    """A directory that a starting run has not claimed yet stays; one of yesterday goes."""
    fresh, old = base / "workerpools-fresh", base / "workerpools-old"
    fresh.mkdir()
    (fresh / "owner").touch()
    old.mkdir()
    yesterday = time.time() - 86_400
    os.utime(old, (yesterday, yesterday))
    with Workspace(base):
        assert fresh.exists()
        assert not old.exists()
    (fresh / "owner").unlink()
    fresh.rmdir()


def test_link_is_not_followed(base: Path) -> None:
    """A link with a workspace's name is neither swept nor followed."""
    target = base / "target"
    target.mkdir()
    (target / "owner").write_text("1\n")
    (base / "workerpools-link").symlink_to(target)
    with Workspace(base):
        assert (target / "owner").exists()
    (base / "workerpools-link").unlink()


@as_root
def test_directory_of_another_user_is_left_alone(base: Path) -> None:
    """Root does not sweep the stale directory of another user."""
    other = base / "workerpools-other"
    other.mkdir()
    (other / "owner").write_text("1\n")
    os.chown(other, NOBODY, NOBODY)
    with Workspace(base):
        assert (other / "owner").exists()
    (other / "owner").unlink()
    other.rmdir()
