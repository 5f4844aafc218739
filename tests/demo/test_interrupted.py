"""Ctrl-C, SIGTERM and SIGKILL: the demo ends, and so does everything that it has started."""

from __future__ import annotations

import json
import os
import re
import signal
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from demo_tasks.summary import RESOURCES
from tests.demo.running import DemoRun, report, wait_until, worker_pid
from tests.support.inspect import children_of, is_alive

pytestmark = [pytest.mark.slow, pytest.mark.worker, pytest.mark.timeout(300)]

UP = "Everything stays up until Ctrl-C."


def test_ctrl_c_while_it_stays_up(place: Path, tmp_path: Path) -> None:
    """After the summary everything stays up, Flower answers, and Ctrl-C ends it all in order, with status 0."""
    file = tmp_path / "report.json"
    with DemoRun("--tasks", "100", "--report", str(file), cwd=tmp_path) as run:
        run.wait_for(UP)
        # The report is there already, but for what only the stop shows.
        assert report(file)["succeeded"] == 100
        assert report(file)["connections_at_stop"] is None
        flower = re.search(r"http://127\.0\.0\.1:\d+", run.text)
        assert flower is not None
        with urllib.request.urlopen(f"{flower[0]}/workers", timeout=10) as answer:
            assert answer.status == 200
        # The summary names the page about the connections, where the worker is online.
        pools = re.search(r"Flower: (http://127\.0\.0\.1:\d+)(/pools)$", run.text, re.MULTILINE)
        assert pools is not None
        with urllib.request.urlopen(pools[1] + pools[2], timeout=10) as answer:
            assert 'aria-current="page">Pools</a>' in answer.read().decode()
        with urllib.request.urlopen(f"{pools[1]}/api/pools", timeout=10) as answer:
            (worker,) = json.load(answer)["workers"]
        assert worker["status"] == "online"
        assert {each["name"] for each in worker["snapshots"][0]["totals"]} >= set(RESOURCES)
        run.signal(signal.SIGINT)
        assert run.wait() == 0
    assert re.findall(r"^(.+) stopped$", run.text, re.MULTILINE) == [
        *("Flower", "worker", "HTTP server", "Redis", "PostgreSQL")
    ]
    assert report(file)["connections_at_stop"] == 0


def test_sigterm_in_the_middle(place: Path, tmp_path: Path) -> None:
    """SIGTERM is the same as Ctrl-C; before the summary the status says that the run was interrupted."""
    with DemoRun("--tasks", "100000", cwd=tmp_path) as run:
        run.wait_for("of 100,000 tasks done")
        run.signal(signal.SIGTERM)
        assert run.wait() == 128 + signal.SIGTERM
    assert "worker stopped" in run.text
    assert "Traceback" not in run.text


def test_interrupted_while_starting(place: Path, tmp_path: Path) -> None:
    """Ctrl-C ends what has been started so far."""
    with DemoRun("--once", cwd=tmp_path) as run:
        run.wait_for("PostgreSQL   127.0.0.1")
        run.signal(signal.SIGINT)
        assert run.wait() == 128 + signal.SIGINT
    assert "PostgreSQL stopped" in run.text
    assert "Traceback" not in run.text


def test_second_ctrl_c_hurries(place: Path, tmp_path: Path) -> None:
    """The worker's warm stop waits for tasks that do not end; a second Ctrl-C does not, and still leaves nothing."""
    with DemoRun("--tasks", "100000", cwd=tmp_path) as run:
        run.wait_for("of 100,000 tasks done")
        with paused(*children_of(worker_pid(run), recursive=False)):
            run.signal(signal.SIGINT)
            run.wait_for("Flower stopped")
            time.sleep(2.0)
            assert "worker stopped" not in run.text
            run.signal(signal.SIGINT)
            # By itself the demo would have waited for 45 s more.
            assert run.wait(30) == 128 + signal.SIGINT
    assert "worker stopped" in run.text
    assert "Traceback" not in run.text


def test_killed(place: Path, tmp_path: Path) -> None:
    """When the demo is killed, its servers, its worker with all children, and Flower end by themselves."""
    with DemoRun("--tasks", "100000", cwd=tmp_path) as run:
        run.wait_for("of 100,000 tasks done")
        descendants = run.descendants()
        assert len(descendants) > 10
        run.signal(signal.SIGKILL)
        run.wait()
        wait_until(lambda: not [pid for pid in descendants if is_alive(pid)], 10)
    # The directory is removed by the next run.
    assert len(list(place.iterdir())) == 1
    with DemoRun("--once", "--tasks", "20", cwd=tmp_path) as run:
        assert run.wait() == 0, run.text


@contextmanager
def paused(*pids: int) -> Iterator[None]:
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
