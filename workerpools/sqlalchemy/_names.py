"""What an engine's connections are called on the server."""

from __future__ import annotations

import re

__all__ = ["application_name", "is_own"]

_OURS = re.compile(r"workerpools .* pid=(?P<pid>\d+)")


def application_name(resource: str, pid: int) -> str:
    """Return a connection's name on the server: ``workerpools db pid=4711``.

    PostgreSQL keeps 63 bytes ("NAMEDATALEN") and replaces non-ASCII characters by question marks. A long resource name
    is truncated; the process id is not.
    """
    start, end = f"workerpools {resource}".encode("ascii", "replace").decode(), f" pid={pid}"
    return start[: 63 - len(end)] + end


def is_own(resource: str, name: str) -> bool:
    """Return whether a session has the name of this resource's connections, in any process."""
    found = _OURS.fullmatch(name)
    return found is not None and name == application_name(resource, int(found["pid"]))
