"""The report file: the figures as JSON, never half of them."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from demo_tasks.runner.errors import DemoError

__all__ = ["check_writable", "write"]


def check_writable(path: Path) -> None:
    """Make sure, before anything is started, that the report can be written.

    Args:
        path: The report's path.

    Raises:
        DemoError: It cannot.
    """
    if path.is_dir():
        raise DemoError(f"The report cannot be written: {path} is a directory.")
    if path.exists() and not path.is_file():
        return
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}."):
            pass
    except OSError as error:
        raise DemoError(f"The report cannot be written to {path}: {error.strerror}.") from error


def write(path: Path, figures: Mapping[str, Any]) -> None:
    """Write the report.

    Args:
        path: The report's path; a file that is there is replaced.
        figures: What to write.

    Raises:
        OSError: It cannot be written.
    """
    text = json.dumps(figures, indent=2) + "\n"
    if path.exists() and not path.is_file():
        # A pipe or /dev/stdout.
        path.write_text(text)
        return
    # A reader that waits for the file finds all of it or none.
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with open(descriptor, "w") as file:
            file.write(text)
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise
