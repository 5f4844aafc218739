"""Web processes of the same declarations: nothing shared, a session per request, closed in order at the end."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import pytest

from demo_tasks.servers.ports import listening_socket
from tests.support.paths import environment
from tests.support.stand import Stand, wait_until

pytestmark = pytest.mark.worker

GUNICORN = ("gunicorn", "--preload", "--workers", "2", "--graceful-timeout", "20", "--bind", "fd://{fd}")
SERVERS = {
    "uvicorn": ("uvicorn", "tests.web.apps:fast", "--workers", "2", "--fd", "{fd}"),
    "gunicorn asgi": (*GUNICORN, "--worker-class", "asgi", "tests.web.apps:fast"),
    "gunicorn sync": (*GUNICORN, "tests.web.apps:web"),
    "gunicorn gthread": (*GUNICORN, "--threads", "4", "tests.web.apps:web"),
    "django uvicorn": ("uvicorn", "tests.web.django_site:application", "--workers", "2", "--fd", "{fd}"),
    "django gunicorn": (*GUNICORN, "tests.web.django_site:application"),
}


@contextmanager
def serving(stand: Stand, command: Sequence[str], log: Path, **env: str) -> Iterator[httpx.Client]:
    """Run a server; inside, a client of it. Outside again it has ended in order."""
    with listening_socket(0) as sock, log.open("wb") as output:
        port = sock.getsockname()[1]
        process = subprocess.Popen(
            [sys.executable, "-m", *(part.format(fd=sock.fileno()) for part in command)],
            env=environment(stand.environment(env)),
            pass_fds=[sock.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        # A connection a request: each is any process's.
        limits = httpx.Limits(max_keepalive_connections=0)
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30.0, limits=limits) as client:

            def answers() -> bool:
                assert process.poll() is None, log.read_text()
                try:
                    return client.get("/").status_code == 404
                except httpx.TransportError:
                    return False

            wait_until(answers, "the server")
            yield client
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) in (0, -signal.SIGTERM), log.read_text()
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.mark.parametrize("server", SERVERS)
def test_web_processes(stand: Stand, server: str, tmp_path: Path) -> None:
    """Several processes, forked from one that has used its clients; a request in flight when they are told to end."""
    log, command = tmp_path / "log", " ".join(SERVERS[server])
    used = {"SHOP_PARENT": "1"} if "--preload" in command else {}
    own_threads = server == "django uvicorn"
    if own_threads:
        used["SHOP_ASGI"] = "1"
    with ThreadPoolExecutor(1) as pool, serving(stand, SERVERS[server], log, **used) as client:
        backends: dict[int, set[int]] = {}
        for number in itertools.count():
            found = client.get(f"/show/{number}").raise_for_status().json()
            assert found["text"] == str(number)
            backends.setdefault(found["pid"], set()).add(found["backend"])
            if len(backends) == 2 and number >= 20:
                break
        # Each request's session gives back its connection, and no two processes share one. FastAPI ends it when the
        # response has left, which may be after the next request has come.
        (one, other) = backends.values()
        # With ASGI, Django runs each request in a thread, whose connection ends with it.
        assert own_threads or max(len(one), len(other)) <= (2 if "apps:fast" in command else 1)
        assert not one & other
        assert not {entry.detail for entry in stand.entries("parent")} & (one | other)
        # The view commits, and what it does not commit is rolled back.
        for number, commit in ((1, True), (2, False), (3, True)):
            assert client.post(f"/orders/{number}", params={"commit": str(commit).lower()}).json() in (True, [True])
        assert [stand.orders(number) for number in (1, 2, 3)] == [[0], [], [0]]
        if "apps:fast" in command:
            # The asynchronous client lives on the server's own loop, for endpoints of both kinds.
            opened = stand.echo.accepted
            for number in range(20):
                assert client.get(f"/later/{number}").raise_for_status().json()["text"] == str(number)
                assert client.get(f"/both/{number}").raise_for_status().json() == str(number)
            assert stand.echo.accepted <= opened + 2
        if own_threads:
            assert client.get("/both/1").raise_for_status().json() == "1"
        # A stale connection is found before it is used, when it has been idle for a second.
        stand.terminate_backends()
        time.sleep(1.1)
        slow = pool.submit(client.get, "/show/slow")
        wait_until(lambda: any(each.path == "/echo/slow" for each in stand.echo.requests()), "the slow request")
    assert slow.result().raise_for_status().json()["text"] == "slow"
    stand.wait_for_no_connection()
    text = log.read_text()
    assert "Traceback" not in text, text


def test_sessions_of_services(stand: Stand) -> None:
    """In a task body the request's session is the attempt's, whatever context ends inside of it."""
    with stand.worker(app="tests.web.apps:app", concurrency=1):
        assert stand.call("add_order", 7) is True
    assert stand.orders(7) == [0]
