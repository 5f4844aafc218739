"""Each server starts, answers, stops and starts again where it was."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator

import httpx
import psycopg2
import pytest
import redis

from demo_tasks.servers import (
    HttpUpstream,
    PortTakenError,
    PostgresServer,
    ServerError,
    ServerProcess,
    ValkeyServer,
    Workspace,
    process,
)
from demo_tasks.servers.ports import free_port
from tests.servers.helpers import alive, command_line, eventually, family

_KINDS = [PostgresServer, ValkeyServer, HttpUpstream]


@pytest.fixture(params=_KINDS, ids=lambda kind: kind.__name__)
def server(request: pytest.FixtureRequest, space: Workspace) -> Iterator[ServerProcess]:
    """One server of each kind, not started yet."""
    made: ServerProcess = request.param(space)
    yield made
    made.stop()


def _use(server: ServerProcess) -> None:
    if isinstance(server, PostgresServer):
        with contextlib.closing(psycopg2.connect(server.dsn)) as connection, connection.cursor() as cursor:
            cursor.execute("SELECT current_user")
            assert cursor.fetchone() == ("workerpools",)
    elif isinstance(server, ValkeyServer):
        with contextlib.closing(redis.Redis.from_url(server.url(3))) as client:
            client.set("key", "value")
            assert client.get("key") == b"value"
    elif isinstance(server, HttpUpstream):
        assert httpx.get(server.url("/get?a=1")).json()["args"] == {"a": "1"}


def _refused(server: ServerProcess) -> bool:
    with socket.socket() as client:
        client.settimeout(2)
        return client.connect_ex(("127.0.0.1", server.port)) != 0


def test_starts_stops_and_starts_again(server: ServerProcess) -> None:
    """A server answers after start(), refuses after stop(), and comes back on the same port."""
    with pytest.raises(ServerError, match="before its first start"):
        _ = server.port
    with server.start() as entered:
        assert entered is server
        port, members = server.port, family(server.pid or 0)
        assert server.start().pid == members[0]
        _use(server)
    assert not server.running
    assert server.pid is None
    assert _refused(server)
    assert eventually(lambda: not any(map(alive, members)), 2)
    server.stop()
    server.start()
    assert server.port == port
    _use(server)


def test_restart_keeps_the_port(server: ServerProcess) -> None:
    """After restart() another process answers on the same port."""
    server.start()
    before = (server.pid, server.port)
    server.restart()
    assert server.pid != before[0]
    assert server.port == before[1]
    _use(server)


def test_two_side_by_side(space: Workspace) -> None:
    """Two servers of each kind run at once, each with its own port and password."""
    with contextlib.ExitStack() as running:
        servers = [
            running.enter_context(kind(space, name=f"{kind.__name__}-{name}"))
            for kind in _KINDS
            for name in ("first", "second")
        ]
        for server in servers:
            _use(server)
        assert len({server.port for server in servers}) == len(servers)


def test_killed_server_counts_as_dead_and_starts_again(server: ServerProcess) -> None:
    """A server that was killed is not running, although nobody waited for it, and starts again."""
    server.start()
    members = family(server.pid or 0)
    server.send_signal(signal.SIGKILL)
    assert eventually(lambda: not server.running, 2)
    with pytest.raises(ServerError, match="not running"):
        server.send_signal(signal.SIGTERM)
    assert eventually(lambda: not any(map(alive, members)), 5)
    server.start()
    _use(server)


def test_server_that_ignores_the_stop_is_killed(space: Workspace) -> None:
    """stop() is bounded: a server that does not react is killed."""

    class Impatient(ValkeyServer):
        stop_signals = ((signal.SIGTERM, 0.3),)

    server = Impatient(space).start()
    server.send_signal(signal.SIGSTOP)
    started = time.monotonic()
    server.stop()
    assert time.monotonic() - started < 3
    assert not server.running


def test_busy_port_is_given_up(server: ServerProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    """When another process takes the port between choice and bind, the start goes on with another port."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        busy = taken.getsockname()[1]
        ports = iter([busy, busy])
        monkeypatch.setattr(process, "free_port", lambda: next(ports, None) or free_port())
        server.start()
        assert server.port != busy
        _use(server)


def test_port_lost_while_down_is_waited_for(server: ServerProcess) -> None:
    """A known port that somebody borrows is waited for, and keeps its number."""
    server.start()
    server.stop()
    with socket.create_server(("127.0.0.1", server.port)) as borrowed:
        timer = threading.Timer(0.7, borrowed.close)
        timer.start()
        port = server.port
        assert server.start().port == port
        timer.join()
    _use(server)


def test_port_lost_for_good_is_an_error(space: Workspace) -> None:
    """A known port that stays taken is an error that says so, and nothing is left running."""
    server = ValkeyServer(space).start()
    server.stop()
    with socket.create_server(("127.0.0.1", server.port)), pytest.raises(PortTakenError, match="in use"):
        server.start()
    assert not server.running


def test_other_threads_are_refused(server: ServerProcess) -> None:
    """A start from another thread is refused: the kernel would end the server with that thread."""
    errors: list[BaseException] = []

    def start() -> None:
        try:
            server.start()
        except ServerError as error:
            errors.append(error)

    thread = threading.Thread(target=start)
    thread.start()
    thread.join()
    assert [type(error) for error in errors] == [ServerError]
    assert "main thread" in str(errors[0])


def test_forked_child_leaves_the_server_alone(server: ServerProcess) -> None:
    """stop() in a forked child does nothing to the parent's server."""
    server.start()
    child = os.fork()
    if child == 0:
        try:
            server.stop()
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    assert server.running
    _use(server)


def test_own_session(server: ServerProcess) -> None:
    """A server is in a session of its own, where the terminal's Ctrl-C does not reach it."""
    server.start()
    assert os.getsid(server.pid or 0) == server.pid != os.getsid(0)


def test_no_secret_is_shown(server: ServerProcess) -> None:
    """The password is neither in the repr, nor in any command line, nor in the log."""
    server.start()
    password = getattr(server, "password", None) or pytest.skip("this server has no password")
    assert len(password) >= 20
    assert password not in repr(server)
    for pid in family(server.pid or 0):
        assert password not in command_line(pid)
    assert password not in server.log_path.read_text()
    assert f"pid={server.pid}" in repr(server)
