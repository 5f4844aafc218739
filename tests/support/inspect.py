"""What a process or a server holds at this moment: descriptors, sockets, children, database sessions."""

from __future__ import annotations

import os
import re
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import psutil  # type: ignore[import-untyped]

#: The environment variable with the sockets that the test run was started with.
INHERITED = "TEST_INHERITED_SOCKETS"

_SOCKET = re.compile(r"socket:\[(\d+)\]")


class TcpConnection(NamedTuple):
    """An established connection seen from the client's end; `pid` is None when its owner cannot be told."""

    pid: int | None
    local_port: int
    remote_port: int


class Backend(NamedTuple):
    """A client session of a PostgreSQL server."""

    pid: int
    application_name: str
    state: str | None


def open_fds(pid: int | None = None) -> dict[int, str]:
    """Return every open descriptor of a process (by default the caller) with what it points to."""
    folder = Path("/proc") / str(pid if pid is not None else os.getpid()) / "fd"
    found: dict[int, str] = {}
    for entry in os.listdir(folder):
        try:
            target = os.readlink(folder / entry)
        except FileNotFoundError:
            # Closed since the listing, as is the descriptor that listed the folder.
            continue
        found[int(entry)] = target
    return found


def socket_inodes(pid: int | None = None) -> set[int]:
    """Return the inode of each socket a process holds; one that two processes hold is shared.

    Sockets that the whole test run was started with (a terminal's, a pipeline's) are left out.
    """
    matches = (_SOCKET.fullmatch(target) for target in open_fds(pid).values())
    inherited = {int(inode) for inode in os.environ.get(INHERITED, "").split()}
    return {int(match[1]) for match in matches if match} - inherited


def tcp_connections_to(port: int, pid: int | None = None) -> list[TcpConnection]:
    """Return the established TCP connections to `port`, of one process or of all.

    With `pid` the connections are those whose descriptor that process holds; one inherited over a fork counts
    in each process that holds it.
    """
    found = psutil.Process(pid).net_connections("tcp") if pid is not None else psutil.net_connections("tcp")
    return [
        TcpConnection(
            pid if pid is not None else getattr(connection, "pid", None),
            connection.laddr.port,
            connection.raddr.port,
        )
        for connection in found
        if connection.status == psutil.CONN_ESTABLISHED and connection.raddr and connection.raddr.port == port
    ]


def children_of(pid: int | None = None, *, recursive: bool = True) -> list[int]:
    """Return the living descendants of a process (the caller's own by default), without zombies."""
    try:
        found = psutil.Process(pid).children(recursive=recursive)
    except psutil.NoSuchProcess:
        return []
    return sorted(child.pid for child in found if is_alive(child.pid))


def is_alive(pid: int) -> bool:
    """Tell whether a process runs; a zombie, which only waits to be collected, does not."""
    try:
        return psutil.Process(pid).status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.NoSuchProcess:
        return False


def backends(dsn: str, application_name_like: str | None = None) -> list[Backend]:
    """Return the client sessions of a PostgreSQL server, without the one that asks.

    Args:
        dsn: A libpq connection string of the server itself, not of a proxy before it.
        application_name_like: A LIKE pattern for the application's name; None gives every session.
    """
    import psycopg2

    with closing(psycopg2.connect(dsn, connect_timeout=5)) as connection:
        connection.autocommit = True
        with connection.cursor() as cursor:
            cursor.execute(
                "SELECT pid, application_name, state FROM pg_stat_activity"
                " WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()"
                " AND (%(like)s IS NULL OR application_name LIKE %(like)s) ORDER BY pid",
                {"like": application_name_like},
            )
            return [Backend(*row) for row in cursor.fetchall()]
