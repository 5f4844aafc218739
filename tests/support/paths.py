"""Where the checkout is, the environment with which a subprocess finds it, and where servers keep their files."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import psutil  # type: ignore[import-untyped]

ROOT = Path(__file__).resolve().parents[2]


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return this process's environment with the checkout first on PYTHONPATH, changed by `extra`."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return {**os.environ, "PYTHONPATH": path, **(extra or {})}


def memory() -> Path | None:
    """Return a directory in memory with room for the servers of several sessions, or None where there is none.

    A database is three hundred files, and most tests have one of their own: on a disk, making it takes ten times as
    long.
    """
    path = Path("/dev/shm")
    # Docker gives a container 64 MB, and tmpfs promises more than there is.
    if not os.access(path, os.W_OK | os.X_OK) or shutil.disk_usage(path).free < 4 * 2**30:
        return None
    return path if psutil.virtual_memory().available >= 4 * 2**30 else None
