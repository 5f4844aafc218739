"""What the helpers see of processes and servers, compared with what is known to be there."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest

from tests.support.forking import run_in_fork
from tests.support.inspect import (
    Backend,
    backends,
    children_of,
    is_alive,
    open_fds,
    socket_inodes,
    tcp_connections_to,
)


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        socket.create_connection(listener.getsockname()) as client,
        closing(listener.accept()[0]) as server,
    ):
        yield client, server


def test_socket_inodes_come_and_go() -> None:
    """A socket is listed while it is open; a file is not."""
    before = socket_inodes()
    with socket.socket() as sock, open(os.devnull):
        assert socket_inodes() - before == {os.fstat(sock.fileno()).st_ino}
        assert socket_inodes(os.getpid()) - before == {os.fstat(sock.fileno()).st_ino}
    assert socket_inodes() == before


def test_socket_inodes_are_equal_over_a_fork_and_differ_for_a_new_socket() -> None:
    """An inherited socket has one inode in both processes; one opened in the child has another."""
    with socket.socket() as inherited:

        def child() -> tuple[set[int], int]:
            with socket.socket() as own:
                return socket_inodes(), os.fstat(own.fileno()).st_ino

        in_child, own = run_in_fork(child)
        mine = socket_inodes()
        assert os.fstat(inherited.fileno()).st_ino in in_child & mine
        assert own in in_child
        assert own not in mine


def test_a_socket_replaced_by_dev_null_is_no_longer_shared() -> None:
    """After `dup2` of /dev/null the descriptor stays, and the socket is gone from the child alone."""
    with socket.socket() as inherited:
        number, inode = inherited.fileno(), os.fstat(inherited.fileno()).st_ino

        def child() -> tuple[str, bool]:
            null = os.open(os.devnull, os.O_RDWR)
            os.dup2(null, number)
            return open_fds()[number], inode in socket_inodes()

        assert run_in_fork(child) == ("/dev/null", False)
        assert inode in socket_inodes()


def test_open_fds_sees_what_is_open() -> None:
    """Each open descriptor is there with its target, and goes when it is closed."""
    reading, writing = os.pipe()
    found = open_fds()
    assert found[reading] == found[writing]
    assert found[reading].startswith("pipe:[")
    os.close(reading)
    os.close(writing)
    assert reading not in open_fds()


def test_tcp_connections_are_those_of_the_clients(pair: tuple[socket.socket, socket.socket]) -> None:
    """One connection to the port, seen from the client's end; none when the client has closed."""
    client, server = pair
    port = server.getsockname()[1]
    for pid in (None, os.getpid()):
        (found,) = tcp_connections_to(port, pid)
        assert (found.local_port, found.remote_port) == (client.getsockname()[1], port)
    assert tcp_connections_to(port, os.getppid()) == []
    client.close()
    assert tcp_connections_to(port) == []


def test_children_are_seen_with_theirs_and_zombies_are_not() -> None:
    """A child and a grandchild are listed while they live; a child that ended and was not collected is not."""
    code = (
        "import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', 'input()'], stdin=subprocess.PIPE);"
        "print(p.pid, flush=True); input()"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        grandchild = int(process.stdout.readline())
        assert {process.pid, grandchild} <= set(children_of())
        assert grandchild not in children_of(recursive=False)
        assert children_of(process.pid) == [grandchild]
        assert is_alive(process.pid)
        process.kill()
        deadline = time.monotonic() + 5
        while is_alive(process.pid):
            assert time.monotonic() < deadline
        # Killed and not yet collected: /proc still knows it, as a zombie.
        assert os.path.exists(f"/proc/{process.pid}")
        assert process.pid not in children_of()
    assert not is_alive(process.pid)
    assert children_of(process.pid) == []


def test_backends_are_the_servers_sessions(database: Any) -> None:
    """Sessions are listed by name and state, and vanish with their connection; the asking one is left out."""
    import psycopg2

    assert backends(database.dsn, "support-test-%") == []
    with closing(psycopg2.connect(database.dsn, application_name="support-test-1")) as connection:
        found = backends(database.dsn, "support-test-%")
        assert found == [Backend(connection.info.backend_pid, "support-test-1", "idle")]
        connection.cursor().execute("SELECT 1")
        assert backends(database.dsn, "support-test-1")[0].state == "idle in transaction"
        everyone = backends(database.dsn)
        assert found[0].pid in [row.pid for row in everyone]
        assert "active" not in [row.state for row in everyone], "the session that asks is not listed"
        assert backends(database.dsn, "other-%") == []
    deadline = time.monotonic() + 5
    while backends(database.dsn, "support-test-%"):
        assert time.monotonic() < deadline
