"""What the processes of a worker do, written to one file as it happens.

`install` wraps what opens or builds something, so that a test can see who touched it and when. It must be imported
before the libraries bind the names that it replaces.
"""

from __future__ import annotations

import json
import os
import socket
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

PATH = "SHOP_RECORD"


class Entry(NamedTuple):
    """One line of the record: which process, what, and a number or word that goes with it."""

    pid: int
    event: str
    detail: Any = None


def record(event: str, detail: Any = None) -> None:
    """Append a line; without a record's path in the environment, do nothing."""
    path = os.environ.get(PATH)
    if path:
        line = json.dumps([os.getpid(), event, detail]) + "\n"
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            # One write to a file opened for appending: lines of several processes do not mix.
            os.write(descriptor, line.encode())
        finally:
            os.close(descriptor)


def entries(path: Path, *events: str) -> list[Entry]:
    """Return the record's lines, or those of the given events."""
    if not path.exists():
        return []
    lines = path.read_text().splitlines()
    return [entry for entry in (Entry(*json.loads(line)) for line in lines) if not events or entry.event in events]


def install() -> None:
    """Record every client, engine, database connection, Python socket that connects and TLS context that is made."""
    import httpx
    import psycopg2
    import sqlalchemy

    # A declaration is checked by a client that can open nothing.
    _wrap(httpx.Client, "__init__", "client", lambda options: type(options.get("transport")).__name__ == "_Nowhere")
    _wrap(sqlalchemy, "create_engine", "engine")
    _wrap(psycopg2, "connect", "database connection")
    _wrap(socket.socket, "connect", "connect")
    _wrap(socket.socket, "connect_ex", "connect")
    _wrap(ssl.SSLContext, "__new__", "tls context")


def _wrap(owner: Any, name: str, event: str, ignored: Callable[[Any], bool] = lambda _: False) -> None:
    original: Callable[..., Any] = getattr(owner, name)

    def recorded(*args: Any, **kwargs: Any) -> Any:
        if not ignored(kwargs):
            record(event)
        return original(*args, **kwargs)

    setattr(owner, name, recorded)
