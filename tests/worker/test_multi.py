"""Two workers of ``celery multi``: one that grows and shrinks, one whose children end with their task."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.paths import environment
from tests.support.stand import PATIENCE, SHOP, Stand, wait_until

pytestmark = [pytest.mark.worker, pytest.mark.slow]

NODES = ("grows", "recycles")


def multi(stand: Stand, folder: Path, command: str, *options: str) -> None:
    arguments = [*NODES, f"--pidfile={folder}/%n.pid", f"--logfile={folder}/%n.log", *options]
    subprocess.run(
        [sys.executable, "-m", "celery", "multi", command, *arguments],
        env=environment(stand.environment({"AUTOSCALE_KEEPALIVE": "1"})),
        cwd=folder,
        check=True,
        timeout=PATIENCE,
    )


@pytest.fixture
def logs(stand: Stand, tmp_path: Path) -> Iterator[dict[str, Path]]:
    """Start both, and end what is left of them."""
    options = ["-A", SHOP, "--loglevel=INFO", "--without-gossip", "--without-mingle"]
    options += ["-Q:grows", "grows", "--autoscale:grows=3,1"]
    options += ["-Q:recycles", "recycles", "-c:recycles", "1", "--max-memory-per-child:recycles=1"]
    found = {node: tmp_path / f"{node}.log" for node in NODES}
    try:
        multi(stand, tmp_path, "start", *options)
        for node, log in found.items():
            wait_until(lambda log=log: log.exists() and " ready." in log.read_text(), f"{node} to be ready")
        yield found
    finally:
        for pidfile in tmp_path.glob("*.pid"):
            with contextlib.suppress(ProcessLookupError, ValueError):
                os.kill(int(pidfile.read_text()), signal.SIGKILL)


def test_celery_multi_with_autoscale_and_max_memory(stand: Stand, logs: dict[str, Path], tmp_path: Path) -> None:
    """Every child that came and went has opened its connections and closed them in order, and none is left."""
    visits = [stand.send("visit", f"token-{number}", queue="recycles") for number in range(2)]
    slow = [stand.send("slow_request", 2.0, queue="grows") for _ in range(4)]
    answers = [result.get(timeout=PATIENCE) for result in visits]
    assert all(answer["right"] for answer in answers)
    # A child whose memory is above the limit ends after its task.
    recycled = {answer["pid"] for answer in answers}
    grown = {result.get(timeout=PATIENCE) for result in slow}
    assert len(recycled) == len(answers)
    assert len(grown) > 1
    closed = "value_closed resource=db pid={}"
    for pid in recycled:
        wait_until(lambda pid=pid: closed.format(pid) in logs["recycles"].read_text(), f"{pid} to be recycled")
    # Autoscale shrinks what is idle.
    wait_until(lambda: len([pid for pid in grown if os.path.exists(f"/proc/{pid}")]) <= 1, "fewer children")
    multi(stand, tmp_path, "stopwait")
    for pid in grown:
        assert logs["grows"].read_text().count(closed.format(pid)) == 1
    stand.wait_for_no_connection()
    assert stand.disorderly_ends() == 0
