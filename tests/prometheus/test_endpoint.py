"""The HTTP endpoint of a worker's main process, of which a forked child has nothing."""

from __future__ import annotations

import http.client
import os
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from tests.support.forking import run_in_fork, start_child, wait_for_child
from tests.support.inspect import socket_inodes
from workerpools import prometheus
from workerpools._stats.snapshot import WorkerStats
from workerpools.prometheus import Endpoint, serve


def listen(host: str = "127.0.0.1", port: int = 0) -> Endpoint:
    """Serve a worker that has the name of the process which answers."""
    return serve(lambda: {str(os.getpid()): [WorkerStats(1.0, os.getpid())]}, host, port)


#: A line of each answer of this process.
OURS = f'workerpools_processes_running{{worker="{os.getpid()}"}} 0.0\n'


@pytest.fixture
def served() -> Iterator[Endpoint]:
    made = listen()
    yield made
    made.close()


def get(port: int, path: str = "/metrics", host: str = "127.0.0.1") -> str:
    connection = http.client.HTTPConnection(host, port, timeout=10)
    try:
        connection.request("GET", path)
        return connection.getresponse().read().decode()
    finally:
        connection.close()


def test_serves(served: Endpoint) -> None:
    """In a thread of its own, on a free port that it tells."""
    assert OURS in get(served.port)
    assert [each.daemon for each in threading.enumerate() if each.name == "workerpools-metrics"] == [True]


def test_serves_over_ipv6() -> None:
    """An address of either family is listened on."""
    try:
        made = listen("::1")
    except OSError:
        pytest.skip("this machine has no ::1")
    try:
        assert OURS in get(made.port, host="::1")
    finally:
        made.close()


def test_closing_gives_the_port_back(served: Endpoint) -> None:
    """And may be done twice."""
    served.close()
    served.close()
    again = listen(port=served.port)
    try:
        assert OURS in get(again.port)
    finally:
        again.close()


def test_a_port_in_use_is_an_error(served: Endpoint) -> None:
    """Two workers never share one: each scrape would show half the truth."""
    with pytest.raises(OSError, match="in use"):
        listen(port=served.port)


def test_a_child_has_no_socket_of_it(served: Endpoint) -> None:
    """Neither the one that listens nor one that a client is connected to; the parent goes on."""
    with socket.create_connection(("127.0.0.1", served.port)) as client:
        deadline = time.monotonic() + 30
        while not served._server.accepted:  # type: ignore[union-attr]
            assert time.monotonic() < deadline
            time.sleep(0.005)
        listening = os.fstat(served._server.fileno()).st_ino  # type: ignore[union-attr]
        (accepted,) = (os.fstat(each.fileno()).st_ino for each in served._server.accepted)  # type: ignore[union-attr]
        assert {listening, accepted} <= socket_inodes()
        assert not {listening, accepted} & run_in_fork(socket_inodes)
        # What the child closed or dropped was not the parent's.
        client.sendall(b"GET /still HTTP/1.0\r\n\r\n")
        assert client.makefile("rb").read().count(OURS.encode()) == 1
    assert OURS in get(served.port)


def test_a_child_does_not_keep_the_port(served: Endpoint) -> None:
    """It outlives its parent's endpoint, and another one can listen there at once."""
    reading, writing = os.pipe()

    def live() -> None:
        os.close(writing)
        os.read(reading, 1)

    child = start_child(live)
    try:
        served.close()
        with pytest.raises(OSError):
            get(served.port)
        again = listen(port=served.port)
        again.close()
    finally:
        os.close(writing)
        os.close(reading)
        wait_for_child(child)


def test_closing_in_a_child_closes_nothing(served: Endpoint) -> None:
    """There is no thread to end, and none to wait for."""
    run_in_fork(served.close)
    assert OURS in get(served.port)


def test_a_silent_client_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing waits for ever; others are served meanwhile."""
    monkeypatch.setattr(prometheus._Handler, "timeout", 0.2)
    served = listen()
    try:
        with socket.create_connection(("127.0.0.1", served.port)) as silent:
            assert OURS in get(served.port)
            silent.settimeout(30)
            assert silent.recv(1) == b""
    finally:
        served.close()
