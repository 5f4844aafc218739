"""Prometheus' own checks of what we hand to it."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from demo_tasks.servers import ServerError
from tests.support.services import require_program


def promtool_program() -> Path:
    """Find promtool on PATH.

    Raises:
        ServerError: There is none. The message says what to install.
    """
    found = shutil.which("promtool")
    if found is None:
        raise ServerError("No promtool was found: install it (Debian: apt-get install prometheus).")
    return Path(found)


def promtool(*arguments: str, given: str = "") -> str:
    """Run promtool, and return what it says; skip the test where there is none.

    Args:
        arguments: Its arguments.
        given: Its standard input.
    """
    require_program(promtool_program)
    done = subprocess.run(
        [promtool_program(), *arguments], input=given, capture_output=True, text=True, timeout=60, check=False
    )
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    return said


def check_metrics(exposition: str) -> None:
    """Check a real exposition: its syntax, and names and units by Prometheus' conventions."""
    assert exposition.count("# TYPE workerpools_") > 10, exposition
    # A lint alone leaves the exit status at 0 in some versions.
    assert promtool("check", "metrics", given=exposition).strip() == ""
