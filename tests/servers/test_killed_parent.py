"""When the process that started the servers is killed, they end, and the next run sweeps what they left."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import pytest

from demo_tasks.servers import Workspace
from tests.servers.helpers import alive, eventually, start_python

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the kernel's parent-death signal is Linux's")

_START = """
import json, sys, time
import psutil, psycopg2, httpx, threading
from demo_tasks.servers import *
workspace = Workspace(sys.argv[1])
servers = from_environment(workspace, {})
servers.start()
servers.upstream.reload()
for number in range(3):
    # Busy servers end as well: a query and a request are under way.
    connection = psycopg2.connect(servers.database.dsn)
    threading.Thread(target=connection.cursor().execute, args=("SELECT pg_sleep(60)",), daemon=True).start()
    threading.Thread(target=httpx.get, args=(servers.upstream.url("/delay/10"),), daemon=True).start()
time.sleep(0.5)
pids = [child.pid for child in psutil.Process().children(recursive=True)]
print(json.dumps({"path": str(workspace.path), "pids": pids, "postmaster": servers.database.pid}), flush=True)
time.sleep(60)
"""


def _shared_memory_creators() -> set[int]:
    rows = Path("/proc/sysvipc/shm").read_text().splitlines()
    column = rows[0].split().index("cpid")
    return {int(row.split()[column]) for row in rows[1:]}


@pytest.mark.parametrize("reachable", [True, False], ids=["shared-tmp", "private-tmp"])
def test_servers_end_and_their_directory_is_swept(base: Path, reachable: bool) -> None:
    """SIGKILL of the parent ends every process of every server within two seconds; the next workspace sweeps.

    As root, a private temporary directory makes PostgreSQL run in a user namespace, a shared one as nobody.
    """
    parent = base / "tmp"
    parent.mkdir(mode=0o755 if reachable else 0o700)
    process = start_python(_START, parent)
    with process:
        assert process.stdout is not None
        line = process.stdout.readline()
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert line, process.stderr and process.stderr.read()
    state = json.loads(line)
    assert len(state["pids"]) >= 10
    try:
        assert eventually(lambda: not any(map(alive, state["pids"])), 2), list(filter(alive, state["pids"]))
    finally:
        for pid in filter(alive, state["pids"]):
            os.kill(pid, signal.SIGKILL)
    assert state["postmaster"] not in _shared_memory_creators()
    assert Path(state["path"]).exists()
    with Workspace(parent):
        assert not Path(state["path"]).exists()


def test_parent_that_died_first(base: Path) -> None:
    """A launcher whose parent is gone before it asks for the signal does not start the server."""
    launcher = Path(__file__).parents[2] / "demo_tasks" / "servers" / "_launch.py"
    mark = base / "mark"
    code = "import subprocess, sys; sys.exit(subprocess.call(sys.argv[1:]))"
    # To the launcher, a parent other than the one it was told of has adopted it.
    launch = (sys.executable, launcher, 1, int(signal.SIGKILL), "same", base)
    process = start_python(code, *launch, "/bin/sh", "-c", f"touch {mark}")
    process.communicate(timeout=30)
    assert process.returncode == 127
    assert not mark.exists()
