"""What the user is told when the demo cannot go on."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests.demo.running import DemoRun, worker_pid

pytestmark = [pytest.mark.slow, pytest.mark.worker, pytest.mark.timeout(300)]


def test_worker_that_dies(place: Path, tmp_path: Path) -> None:
    """The worker's death ends the run, with the last lines of its log."""
    with DemoRun("--tasks", "100000", cwd=tmp_path) as run:
        run.wait_for("of 100,000 tasks done")
        os.kill(worker_pid(run), signal.SIGKILL)
        assert run.wait() == 1
    assert "demo: worker has ended by itself. Its last log lines:\n" in run.text
    assert "succeeded in" in run.text.partition("Its last log lines")[2]
    assert "Traceback" not in run.text
    assert "PostgreSQL stopped" in run.text


def test_server_that_cannot_be_reached(place: Path, tmp_path: Path) -> None:
    """A server of the user's that does not answer is named, without its password."""
    env = {"REDIS_URL": "redis://:secret-word@127.0.0.1:1/0"}
    with DemoRun("--once", cwd=tmp_path, env=env) as run:
        assert run.wait() == 1
    assert "demo: Redis cannot be used: " in run.text
    assert "secret-word" not in run.text
    assert "Traceback" not in run.text


def test_malformed_url(place: Path, tmp_path: Path) -> None:
    """A URL of the wrong kind is refused at once."""
    with DemoRun("--once", cwd=tmp_path, env={"DATABASE_URL": "mysql://somewhere/shop"}) as run:
        assert run.wait() == 1
    assert "demo: DATABASE_URL must be a URL that begins with postgresql" in run.text


@pytest.mark.parametrize("path", ["missing/report.json", "."])
def test_report_that_cannot_be_written(place: Path, tmp_path: Path, path: str) -> None:
    """A report that cannot be written is refused before anything is started."""
    with DemoRun("--once", "--report", str(tmp_path / path), cwd=tmp_path) as run:
        assert run.wait() == 1
    assert run.text.startswith("demo: The report cannot be written")
    assert "PostgreSQL" not in run.text


@pytest.mark.parametrize("arguments", [("--tasks", "0"), ("--concurrency", "-1"), ("--tasks", "many")])
def test_impossible_numbers(place: Path, tmp_path: Path, arguments: tuple[str, str]) -> None:
    """The command line is checked before anything is started."""
    with DemoRun("--once", *arguments, cwd=tmp_path) as run:
        assert run.wait() == 2
    assert f"argument {arguments[0]}: invalid number above 0 value: '{arguments[1]}'" in run.text
