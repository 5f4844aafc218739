"""The demo with a terminal, with closed streams, and with readers that go away."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.demo.running import COMMAND, RUN_TIMEOUT, DemoRun, report
from tests.support.paths import environment

pytestmark = [pytest.mark.slow, pytest.mark.worker, pytest.mark.timeout(300)]


def test_live_progress_and_a_real_ctrl_c(place: Path, tmp_path: Path) -> None:
    """In a terminal a bar shows the progress, and the key Ctrl-C ends everything in order."""
    with DemoRun("--tasks", "300", cwd=tmp_path, terminal=True) as run:
        run.wait_for("Everything stays up until Ctrl-C.")
        assert "━" in run.text
        assert "300/300" in run.text
        assert "\x1b[" in run.raw
        # The key's signal goes to all processes of the terminal; the servers are not among them.
        run.type(b"\x03")
        assert run.wait() == 0, run.text
    assert "PostgreSQL stopped" in run.text
    assert "Traceback" not in run.text
    # The cursor that the bar hid is shown again.
    assert run.raw.rindex("\x1b[?25h") > run.raw.rindex("\x1b[?25l")


def test_closed_streams(place: Path, tmp_path: Path) -> None:
    """Without standard input, output and error the run is the same, and the report tells of it."""
    file = tmp_path / "report.json"
    done = subprocess.run(
        ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", *COMMAND, "--once", "--tasks", "50", "--report", str(file)],
        cwd=tmp_path,
        env=environment(),
        timeout=RUN_TIMEOUT,
        check=False,
    )
    assert done.returncode == 0
    assert report(file)["succeeded"] == 50


def test_reader_goes_away(place: Path, tmp_path: Path) -> None:
    """Output that nobody reads any more is dropped; the run goes on to its end."""
    file = tmp_path / "report.json"
    reading, writing = os.pipe()
    try:
        process = subprocess.Popen(
            [*COMMAND, "--once", "--tasks", "50", "--report", str(file)],
            cwd=tmp_path,
            env=environment(),
            stdin=subprocess.DEVNULL,
            stdout=writing,
            stderr=subprocess.PIPE,
            text=True,
        )
    finally:
        os.close(writing)
        os.close(reading)
    _, errors = process.communicate(timeout=RUN_TIMEOUT)
    assert (process.returncode, errors) == (0, "")
    assert report(file)["succeeded"] == 50
