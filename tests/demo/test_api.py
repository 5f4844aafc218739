"""``python -m demo_tasks.api``: the demo's HTTP server alone."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import pytest

from tests.support.paths import environment
from tests.support.proxy import TcpProxy
from workerpools import WorkerPools
from workerpools.httpx import HttpxClient

pytestmark = pytest.mark.timeout(60)


@contextmanager
def serving(*arguments: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """Start the server; gives its address as printed, and its process."""
    command = [sys.executable, "-m", "demo_tasks.api", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment()) as run:
        try:
            assert run.stdout is not None
            yield run.stdout.readline().strip(), run
        finally:
            run.terminate()


def test_it_keeps_its_connection_and_ends_with_a_signal() -> None:
    """Twenty requests, one connection, as the network saw it; then nothing listens any more."""
    with serving() as (address, run):
        url = httpx.URL(address)
        assert url.host == "127.0.0.1"
        assert url.port is not None
        with TcpProxy("127.0.0.1", url.port) as proxy, WorkerPools() as pools:
            api = pools.add(HttpxClient(base_url=f"http://127.0.0.1:{proxy.port}", trust_env=False), name="api").get()
            for number in range(20):
                assert api.get(f"/orders/{number}").json()["id"] == number
            assert proxy.accepted == 1
        run.send_signal(signal.SIGINT)
        assert run.wait(20) == 0
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", url.port), 5)


def test_the_port_can_be_chosen() -> None:
    """One that is taken ends it, with a sentence."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with serving("--port", str(port)) as (address, run):
            assert address == ""
            assert run.wait(20) == 1
            assert run.stderr is not None
            assert run.stderr.read() == f"Port {port} of the server 'api' is taken.\n"
    with serving("--port", str(port)) as (address, _):
        assert address == f"http://127.0.0.1:{port}"
