"""The HTTP endpoint of a worker's main process, of which a forked child has nothing."""

from __future__ import annotations

import http.client
import os
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest

from tests.support.forking import run_in_fork, start_child, wait_for_child
from tests.support.inspect import socket_inodes
from workerpools._stats import endpoint
from workerpools._stats.endpoint import Endpoint


def hello(environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
    start("200 OK", [("Content-Type", "text/plain")])
    return [f"{os.getpid()} {environ['PATH_INFO']}".encode()]


@pytest.fixture
def served() -> Iterator[Endpoint]:
    made = Endpoint(hello, "127.0.0.1", 0)
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
    assert get(served.port) == f"{os.getpid()} /metrics"
    assert [each.daemon for each in threading.enumerate() if each.name == "workerpools-metrics"] == [True]


def test_serves_over_ipv6() -> None:
    """An address of either family is listened on."""
    try:
        made = Endpoint(hello, "::1", 0)
    except OSError:
        pytest.skip("this machine has no ::1")
    try:
        assert get(made.port, host="::1") == f"{os.getpid()} /metrics"
    finally:
        made.close()


def test_closing_gives_the_port_back(served: Endpoint) -> None:
    """And may be done twice."""
    served.close()
    served.close()
    again = Endpoint(hello, "127.0.0.1", served.port)
    try:
        assert get(again.port) == f"{os.getpid()} /metrics"
    finally:
        again.close()


def test_a_port_in_use_is_an_error(served: Endpoint) -> None:
    """Two workers never share one: each scrape would show half the truth."""
    with pytest.raises(OSError, match="in use"):
        Endpoint(hello, "127.0.0.1", served.port)


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
        assert client.makefile("rb").read().endswith(b"/still")
    assert get(served.port) == f"{os.getpid()} /metrics"


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
        again = Endpoint(hello, "127.0.0.1", served.port)
        again.close()
    finally:
        os.close(writing)
        os.close(reading)
        wait_for_child(child)


def test_closing_in_a_child_closes_nothing(served: Endpoint) -> None:
    """There is no thread to end, and none to wait for."""
    run_in_fork(served.close)
    assert get(served.port) == f"{os.getpid()} /metrics"


def test_a_silent_client_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing waits for ever; others are served meanwhile."""
    monkeypatch.setattr(endpoint._Handler, "timeout", 0.2)
    served = Endpoint(hello, "127.0.0.1", 0)
    try:
        with socket.create_connection(("127.0.0.1", served.port)) as silent:
            assert get(served.port) == f"{os.getpid()} /metrics"
            silent.settimeout(30)
            assert silent.recv(1) == b""
    finally:
        served.close()
