"""What the tests of the local servers ask the machine."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import psutil  # type: ignore[import-untyped]

ROOT = Path(__file__).resolve().parents[2]
NOBODY = 65534


def alive(pid: int) -> bool:
    """Tell whether a process runs; a zombie does not."""
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def family(pid: int) -> list[int]:
    """Return the process ids of a process and of all its descendants."""
    process = psutil.Process(pid)
    return [pid, *(child.pid for child in process.children(recursive=True))]


def eventually(condition: Callable[[], bool], seconds: float) -> bool:
    """Wait until a condition holds, for some seconds at most, and tell whether it does."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def command_line(pid: int) -> str:
    """Return what every user of the machine can read about how a process was started."""
    return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")


def user_id(pid: int) -> int | None:
    """Return the real user id of a process, or None when it has ended."""
    try:
        return int(psutil.Process(pid).uids().real)
    except psutil.NoSuchProcess:
        return None


def start_python(
    code: str,
    *arguments: object,
    python: str = sys.executable,
    environ: Mapping[str, str] | None = None,
    user: int | None = None,
) -> subprocess.Popen[str]:
    """Start a Python process that can import what this one can; its output is a pipe."""
    paths = [str(ROOT), *(path for path in sys.path if path.endswith("-packages"))]
    variables = {**os.environ, **(environ or {}), "PYTHONPATH": os.pathsep.join(paths)}
    if python != sys.executable:
        # A copied interpreter must not load the library of another one of the same minor version.
        variables["LD_LIBRARY_PATH"] = str(Path(python).parents[1] / "lib")
    return subprocess.Popen(
        [python, "-c", code, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=variables,
        user=user,
        group=user,
        extra_groups=None if user is None else [],
    )


def python_for(user: int, modules: Iterable[str], directory: Path) -> tuple[str | None, str]:
    """Find an interpreter that a user can run, with everything that the servers need.

    It is this one, or a copy of it where this one lies in a directory that only root may enter.

    Returns:
        Its path and an empty string, or None and the reason.
    """
    reason = ""
    for copied in (False, True):
        try:
            python = _copy_of_python(directory / "python") if copied else sys.executable
            process = start_python(f"import {', '.join(modules)}", python=python, user=user)
        except OSError as error:
            reason = str(error)
            continue
        reason = process.communicate(timeout=60)[1].strip()
        if process.returncode == 0:
            return python, ""
    return None, f"user {user} has no Python with the servers' packages: {reason[-200:]}"


def _copy_of_python(target: Path) -> str:
    source = Path(sys.base_prefix)
    name = f"python{sys.version_info.major}.{sys.version_info.minor}"
    (target / "bin").mkdir(parents=True)
    (target / "lib").mkdir()
    shutil.copy(source / "bin" / name, target / "bin" / name)
    for library in source.glob("lib/libpython*"):
        shutil.copy(library, target / "lib" / library.name)
    unneeded = shutil.ignore_patterns("site-packages", "test", "__pycache__", "idlelib", "config-*")
    shutil.copytree(source / "lib" / name, target / "lib" / name, ignore=unneeded)
    return str(target / "bin" / name)
