"""The HTTP server for tests: what it answers, what it logs, and how it ends connections."""

from __future__ import annotations

import concurrent.futures
import os
import signal
import subprocess
import sys
import time

import httpx
import pytest

from tests.support.inspect import is_alive, socket_inodes, tcp_connections_to
from tests.support.paths import ROOT, environment
from tests.support.upstream import EchoUpstream, Request


def test_answers_its_own_token_over_one_connection(echo: EchoUpstream) -> None:
    """Requests one after the other share a connection, and each gets its own answer."""
    with httpx.Client(base_url=echo.url) as client:
        for index in range(20):
            assert client.get(f"/echo/token-{index}").text == f"token-{index}"
        assert (echo.accepted, echo.open_connections()) == (1, 1)
    echo.wait_for_open(0)
    assert {request.connection for request in echo.requests()} == {1}
    assert client.is_closed


def test_logs_each_request(echo: EchoUpstream) -> None:
    """Method, path, query, key, connection and body are logged, in order; `clear` forgets them."""
    with httpx.Client(base_url=echo.url) as client:
        client.get("/echo/a?delay=0.01")
        answer = client.post("/orders", content=b"one", headers={"Idempotency-Key": "k1"})
        client.put("/echo/b", content=iter([b"chunk", b"ed"]))
        assert client.get("/missing").status_code == 404
        assert client.get("/echo/c?status=503").status_code == 503
    assert answer.json() == {"order": 1, "idempotency_key": "k1"}
    assert echo.requests()[:3] == [
        Request("GET", "/echo/a", "delay=0.01", None, 1, ""),
        Request("POST", "/orders", "", "k1", 1, "one"),
        Request("PUT", "/echo/b", "", None, 1, "chunked"),
    ]
    assert echo.orders == 1
    echo.clear()
    assert (echo.requests(), echo.orders, echo.accepted) == ([], 0, 1)


def test_delays_on_request_and_serves_in_parallel(echo: EchoUpstream) -> None:
    """Ten requests of 0.3 s each on ten connections take far less than 3 s."""
    started = time.monotonic()
    with httpx.Client(base_url=echo.url) as client, concurrent.futures.ThreadPoolExecutor(10) as threads:
        answers = list(threads.map(lambda index: client.get(f"/echo/{index}?delay=0.3").text, range(10)))
    assert answers == [str(index) for index in range(10)]
    assert 0.3 <= time.monotonic() - started < 1.5
    assert echo.accepted == 10


def test_streams_chunks(echo: EchoUpstream) -> None:
    """The chunked body arrives line by line and leaves the connection usable."""
    with httpx.Client(base_url=echo.url) as client:
        with client.stream("GET", "/stream?n=5") as response:
            assert response.headers["Transfer-Encoding"] == "chunked"
            assert list(response.iter_lines()) == [f"chunk {index}" for index in range(5)]
        assert client.get("/echo/next").text == "next"
    assert echo.accepted == 1


@pytest.mark.parametrize(
    ("how", "error"), [("fin", httpx.RemoteProtocolError), ("rst", httpx.ReadError)], ids=["fin", "rst"]
)
def test_closes_without_an_answer(echo: EchoUpstream, how: str, error: type[Exception]) -> None:
    """The request is read, logged and counted once; the client sees a FIN or an RST instead of an answer."""
    with httpx.Client(base_url=echo.url) as client:
        client.get("/echo/warm")
        with pytest.raises(error) as caught:
            client.post(f"/orders?close={how}", content=b"x")
        if how == "rst":
            assert isinstance(caught.value.__cause__, Exception)
            assert isinstance(caught.value.__cause__.__context__, ConnectionResetError)
        assert echo.orders == 1
        echo.wait_for_open(0)
        assert client.get("/echo/again").text == "again"


def test_close_idle_spares_what_is_in_progress(echo: EchoUpstream) -> None:
    """Idle connections end, a request in progress is answered, and the client opens a new connection."""
    with httpx.Client(base_url=echo.url) as client, concurrent.futures.ThreadPoolExecutor(1) as thread:
        slow = thread.submit(lambda: client.get("/echo/slow?delay=0.5").text)
        while not echo.requests():
            time.sleep(0.01)
        client.get("/echo/idle")
        assert (echo.accepted, echo.open_connections()) == (2, 2)
        assert echo.close_idle() == 1
        assert echo.open_connections() == 1
        assert slow.result() == "slow"
        assert echo.close_idle() == 1
        assert client.get("/echo/new").text == "new"
        assert echo.accepted == 3


def test_close_idle_knows_an_answered_request_at_once(echo: EchoUpstream) -> None:
    """A client that has its whole answer finds its connection counted as idle, every time."""
    with httpx.Client(base_url=echo.url) as client:
        for _ in range(100):
            client.get("/echo/x")
            assert echo.close_idle() == 1


def test_closes_idle_connections_when_told_to() -> None:
    """With `keep_alive` the server ends a connection that was idle for so long."""
    with EchoUpstream(keep_alive=0.2) as echo, httpx.Client(base_url=echo.url) as client:
        client.get("/echo/a")
        echo.wait_for_open(0)
        client.get("/echo/b")
        assert echo.accepted == 2


def test_a_request_that_breaks_off_is_not_logged(echo: EchoUpstream) -> None:
    """A body that never came whole was not executed."""
    import socket

    with socket.create_connection((echo.host, echo.port)) as client:
        client.sendall(b"POST /orders HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\nhalf")
        client.shutdown(socket.SHUT_WR)
        assert client.recv(100) == b""
    assert (echo.requests(), echo.orders) == ([], 0)


def test_its_sockets_are_in_no_other_process(echo: EchoUpstream) -> None:
    """The server's listening socket and connections are in its own process only."""
    before = socket_inodes()
    with httpx.Client(base_url=echo.url) as client:
        client.get("/echo/a")
        assert len(socket_inodes() - before) == 1
        assert len(tcp_connections_to(echo.port, os.getpid())) == 1
        assert not socket_inodes() & socket_inodes(echo.pid)


def test_stop_leaves_no_process() -> None:
    """After `stop` the port refuses and the process is gone; a second `stop` does nothing."""
    echo = EchoUpstream()
    httpx.get(f"{echo.url}/echo/a")
    echo.stop()
    echo.stop()
    assert not is_alive(echo.pid)
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{echo.url}/echo/a")


@pytest.mark.parametrize("leak", [False, True], ids=["alone", "with a forked child that lives on"])
def test_ends_when_its_owner_is_killed(leak: bool) -> None:
    """SIGKILL of the owner ends the server, also while a forked child holds the pipe open."""
    code = (
        "import os, time\nfrom tests.support.upstream import EchoUpstream\n"
        "echo = EchoUpstream()\n"
        f"child = os.fork() if {leak} else None\n"
        "if child == 0: time.sleep(20); os._exit(0)\n"
        "print(echo.pid, child or 0, flush=True); time.sleep(60)"
    )
    owner = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=ROOT, env=environment())
    try:
        assert owner.stdout is not None
        server, child = map(int, owner.stdout.readline().split())
        assert is_alive(server)
    finally:
        owner.kill()
        owner.wait()
        if owner.stdout is not None:
            owner.stdout.close()
    deadline = time.monotonic() + 5
    while is_alive(server):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    if child:
        os.kill(child, signal.SIGKILL)
