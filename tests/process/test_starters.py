"""Processes that are started otherwise than by Celery: each has connections of its own, and leaves none."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.support.clients import Servers, servers_of
from tests.support.paths import environment
from tests.support.recorder import entries
from tests.support.stand import PATIENCE, Stand, wait_until

# Each child imports every client: with the start methods other than fork that is most of the time.
pytestmark = [pytest.mark.worker, pytest.mark.slow]

CHILDREN = 2
STARTERS = (
    ("notebook", "os.fork", "fork", "executor fork", "billiard fork"),
    ("spawn", "executor spawn", "billiard spawn"),
    ("forkserver", "executor forkserver", "programs"),
)


@pytest.fixture
def servers(stand: Stand) -> Iterator[Servers]:
    with servers_of(stand) as opened:
        yield opened


@pytest.mark.parametrize("starters", STARTERS, ids=" ".join)
def test_started_processes(stand: Stand, servers: Servers, starters: tuple[str, ...]) -> None:
    """The parent has used every client, and goes on with its own connections while its children use theirs."""
    ran = subprocess.run(
        [sys.executable, "-m", "tests.process.starters", *starters],
        env=environment(stand.environment({"SHOP_URLS": json.dumps(servers.urls), "PYTHONWARNINGS": "default"})),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=110,
    )
    assert ran.returncode == 0, ran.stdout
    assert "Traceback" not in ran.stdout, ran.stdout
    started = 0
    for starter in starters:
        record = stand.record.with_name(f"{stand.record.name}.{starter}")
        pids = {entry.pid for entry in entries(record, "used")} if record.exists() else set[int]()
        assert len(pids) == (0 if starter == "notebook" else CHILDREN)
        started += len(pids)
    for client, proxy in servers.proxies.items():
        proxy.wait_for(lambda proxy: proxy.open == 0, PATIENCE)
        # The parent kept the one that it had.
        assert proxy.accepted == 1 + started, client
    wait_until(lambda: not stand.backends(), "the sessions to be closed")
    assert stand.disorderly_ends() == 0, ran.stdout
