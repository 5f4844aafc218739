"""The HTTP server: keep-alive, reload, and where it writes."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from demo_tasks.servers import HttpUpstream, ServerError, Workspace
from tests.servers.helpers import eventually, family

# Before this version a reload resets connections in use and keeps idle ones until the graceful time-out.
_GENTLE_RELOAD = 27


@pytest.fixture
def upstream(space: Workspace) -> Iterator[HttpUpstream]:
    """A running server."""
    with HttpUpstream(space) as server:
        yield server


def _idle_connection(server: HttpUpstream) -> socket.socket:
    client = socket.create_connection((server.host, server.port))
    client.sendall(b"GET /status/204 HTTP/1.1\r\nHost: localhost\r\n\r\n")
    client.settimeout(15)
    answer = b""
    while b"\r\n\r\n" not in answer:
        answer += client.recv(65536)
    assert answer.startswith(b"HTTP/1.1 204")
    return client


def _seconds_until_closed(client: socket.socket) -> float:
    started = time.monotonic()
    assert client.recv(1) == b""
    return time.monotonic() - started


def _workers(server: HttpUpstream) -> set[int]:
    return set(family(server.pid or 0)[1:])


def test_a_kept_connection_answers_at_once(upstream: HttpUpstream) -> None:
    """Where a server leaves Nagle's algorithm on, each answer waits for the client's delayed acknowledgement.

    Linux delays it by 40 ms at least, once a connection is past its first segments: then the quickest of many GETs has
    waited as well. Without the wait the quickest is quick on a busy machine too.
    """
    times = []
    with httpx.Client(base_url=upstream.url()) as client:
        for _ in range(60):
            began = time.perf_counter()
            answer = client.get("/orders/7")
            times.append(time.perf_counter() - began)
            assert answer.json() == {"id": 7, "sku": "teapot", "quantity": 2}
    assert min(times[20:]) < 0.03


def test_idle_connection_is_closed_after_the_keep_alive_time(upstream: HttpUpstream) -> None:
    """The server closes an idle connection after about two seconds."""
    with _idle_connection(upstream) as client:
        assert 1 < _seconds_until_closed(client) < 4


def test_reload_replaces_the_workers_and_closes_idle_connections(space: Workspace) -> None:
    """After reload() new workers serve, and connections idle far below their keep-alive time are closed."""
    with HttpUpstream(space, workers=2, keepalive=60) as server, _idle_connection(server) as client:
        # The server answers as soon as one of its workers runs.
        assert eventually(lambda: len(_workers(server)) == 2, 5)
        before = _workers(server)
        server.reload()
        assert _seconds_until_closed(client) < 13
        assert eventually(lambda: len(_workers(server)) == 2 and not before & _workers(server), 5)
        assert httpx.get(server.url("/status/200")).status_code == 200


def test_reload_lets_a_request_in_flight_end(upstream: HttpUpstream) -> None:
    """A request that is being served when the reload begins is answered."""
    answers: list[int] = []
    client = threading.Thread(target=lambda: answers.append(httpx.get(upstream.url("/delay/1")).status_code))
    client.start()
    time.sleep(0.4)
    upstream.reload()
    client.join()
    assert answers == [200]


@pytest.mark.skipif(
    int(importlib.metadata.version("gunicorn").partition(".")[0]) < _GENTLE_RELOAD,
    reason="this gunicorn resets connections at a reload",
)
def test_reload_fails_no_request(upstream: HttpUpstream) -> None:
    """With four clients at work, on kept and on fresh connections, reloads fail no request."""
    stop = threading.Event()
    failures: list[BaseException] = []

    def work(keep: bool) -> None:
        with httpx.Client(base_url=upstream.url(), headers={} if keep else {"Connection": "close"}) as client:
            while not stop.is_set():
                try:
                    client.get("/get").raise_for_status()
                except httpx.HTTPError as error:
                    failures.append(error)

    clients = [threading.Thread(target=work, args=(number % 2 == 0,)) for number in range(4)]
    for client in clients:
        client.start()
    for _ in range(2):
        time.sleep(0.5)
        upstream.reload()
    time.sleep(0.5)
    stop.set()
    for client in clients:
        client.join()
    assert not failures


def test_immediate_restart_breaks_connections_at_once(space: Workspace) -> None:
    """An idle connection is dead after an immediate restart, however long its keep-alive time."""
    with HttpUpstream(space, keepalive=60) as server, _idle_connection(server) as client:
        server.restart("immediate")
        with contextlib.suppress(ConnectionResetError):
            assert _seconds_until_closed(client) < 0.5
        assert httpx.get(server.url("/status/200")).status_code == 200
        with pytest.raises(ValueError, match="mode"):
            server.restart("slow")  # type: ignore[arg-type]


def test_writes_into_the_workspace_only(
    space: Workspace,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Neither home nor the current directory gets a file, and every open file is in the workspace."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setenv("GUNICORN_CMD_ARGS", "--pid stray.pid")
    monkeypatch.chdir(tmp_path)
    with HttpUpstream(space) as server:
        httpx.get(server.url("/get"))
        assert not list(tmp_path.iterdir())
        for pid in family(server.pid or 0):
            targets = {os.readlink(f"/proc/{pid}/fd/{number}") for number in os.listdir(f"/proc/{pid}/fd")}
            files = {target for target in targets - {"/dev/null"} if target.startswith("/")}
            assert all(target.startswith(str(space.path)) for target in files), files


def test_missing_package_is_one_sentence(space: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without gunicorn or httpbin, the error says what to install."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ServerError, match=r"pip install gunicorn httpbin.*UPSTREAM_URL"):
        HttpUpstream(space).start()
