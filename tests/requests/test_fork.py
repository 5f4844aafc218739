"""A session that was used in the parent is discarded in a forked child, whatever it was doing."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import requests

from tests.support.forking import run_in_fork, start_child, wait_for_child
from tests.support.inspect import socket_inodes
from workerpools import Resource, WorkerPools
from workerpools.requests import RequestsSession

REQUESTS = 50
CHILDREN = 3


@pytest.fixture(autouse=True)
def foreign() -> set[int]:
    """The sockets that other tests left in this process: they cross a fork as they like."""
    return socket_inodes()


@pytest.fixture(params=["plain", "tls"])
def api(request: pytest.FixtureRequest, echo: Any, tls_echo: Any) -> Iterator[Resource[requests.Session]]:
    """A session of the echo server, over TCP or over TLS."""
    with WorkerPools() as pools:
        url = echo.url if request.param == "plain" else f"https://localhost:{tls_echo.port}"
        yield pools.add(RequestsSession(url, verify=tls_echo.client_context(), trust_env=False), name="api")


def ask(session: requests.Session, who: str, start: float) -> int:
    """Return how many answers were not for ``who``; everyone begins at ``start``."""
    wrong = 0
    time.sleep(max(0.0, start - time.monotonic()))
    for number in range(REQUESTS):
        token = f"{who}-{number}"
        wrong += session.get(f"/echo/{token}?delay=0.002").text != token
    return wrong


@contextmanager
def idle(session: requests.Session) -> Iterator[None]:
    """A connection that lies in the pool."""
    session.get("/echo/before")
    yield


@contextmanager
def streaming(session: requests.Session) -> Iterator[None]:
    """A response of which half has been read, and one after which the server closes."""
    with ExitStack() as stack:
        kept = stack.enter_context(session.get("/stream?n=200", stream=True))
        last = stack.enter_context(session.get("/stream?n=200", stream=True, headers={"Connection": "close"}))
        pieces = [response.iter_content(100) for response in (kept, last)]
        read = [[next(piece)] for piece in pieces]
        yield
        for chunks, piece in zip(read, pieces, strict=True):
            chunks += piece
            assert b"".join(chunks).endswith(b"chunk 199\n")


@contextmanager
def waiting(session: requests.Session) -> Iterator[None]:
    """A request that another thread has sent, and whose answer is still to come."""
    answers: list[str] = []
    thread = threading.Thread(target=lambda: answers.append(session.get("/echo/late?delay=0.8").text))
    session.get("/echo/before")
    thread.start()
    time.sleep(0.1)
    yield
    thread.join()
    assert answers == ["late"]


STATES = {state.__name__: state for state in (idle, streaming, waiting)}


@pytest.mark.parametrize("state", STATES)
def test_no_process_gets_the_answer_of_another(foreign: set[int], api: Resource[requests.Session], state: str) -> None:
    """Three children and the parent at the same time: no wrong body, no shared socket."""

    def child(number: int) -> tuple[int, set[int]]:
        wrong = ask(api.get(), f"child{number}", start)
        held = socket_inodes()
        api.close()
        return wrong, held

    start = time.monotonic() + 0.3
    with STATES[state](api.get()):
        children = [start_child(lambda number=number: child(number)) for number in range(CHILDREN)]  # type: ignore[misc]
        if state == "idle":
            assert ask(api.get(), "parent", start) == 0
        answers = [wait_for_child(child, 60) for child in children]
        own = socket_inodes()
    assert [wrong for wrong, _ in answers] == [0] * CHILDREN
    for _, held in answers:
        assert not held & (own - foreign)


@pytest.mark.parametrize("phase", ["accepted", "not accepted yet"])
def test_a_connection_that_is_just_being_made_stays_with_the_parent(phase: str) -> None:
    """Another thread waits for TLS, or for TCP itself, at the moment of the fork."""
    with socket.create_server(("127.0.0.1", 0), backlog=0) as listener, WorkerPools() as pools:
        port = listener.getsockname()[1]
        # A full backlog leaves a further connection waiting for TCP.
        crowd = [socket.create_connection(("127.0.0.1", port), 5)] if phase == "not accepted yet" else []
        resource = pools.add(RequestsSession(f"https://127.0.0.1:{port}", timeout=2.0, verify=False), name="api")
        failures: list[Exception] = []

        def get() -> None:
            try:
                resource.get().get("/")
            except requests.RequestException as error:
                failures.append(error)

        before = socket_inodes()
        thread = threading.Thread(target=get)
        thread.start()
        while not (own := socket_inodes() - before):
            time.sleep(0.01)
        time.sleep(0.2)
        assert not run_in_fork(socket_inodes) & own
        thread.join()
        for each in crowd:
            each.close()
    assert len(failures) == 1
