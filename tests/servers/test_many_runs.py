"""Many runs start at the same time."""

from __future__ import annotations

from pathlib import Path

from tests.servers.helpers import start_python

_RUN = """
import sys
from demo_tasks.servers import Workspace, from_environment
with Workspace(sys.argv[1]) as workspace, from_environment(workspace, {}) as servers:
    for _ in range(2):
        servers.redis.restart()
    print(servers.database.port, servers.redis.port, servers.upstream.port)
"""


def test_six_runs_at_once(base: Path) -> None:
    """Six runs with three servers each start together, succeed, and leave nothing behind."""
    runs = [start_python(_RUN, base) for _ in range(6)]
    for run in runs:
        output, errors = run.communicate(timeout=110)
        assert run.returncode == 0, errors
        assert len(set(output.split())) == 3
    assert not list(base.iterdir())
