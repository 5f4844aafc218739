"""`/livez` and `/readyz` of a real worker: what happens to it, and what they say of it."""

from __future__ import annotations

import os
import re
import signal
import urllib.error
import urllib.request

import pytest

from demo_tasks.servers import ValkeyServer
from tests.support.stand import Stand, wait_until
from tests.support.worker import WorkerProcess

pytestmark = [pytest.mark.worker, pytest.mark.timeout(180)]

APP = "tests.worker.probed:app"
CONF = {
    "workerpools_metrics_port": 0,
    "workerpools_alert_interval": 0.3,
    "workerpools_alert_publish_after": 0.5,
    "workerpools_alert_clear_after": 0.1,
}


def probe(worker: WorkerProcess, path: str) -> tuple[int, str]:
    found = re.search(r"serving metrics at (http://127\.0\.0\.1:\d+)/", worker.log())
    assert found is not None
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(found[1] + path, timeout=10) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def wait_for(worker: WorkerProcess, path: str, status: int, text: str) -> None:
    wait_until(lambda: (found := probe(worker, path))[0] == status and text in found[1], f"{path}: {status}, {text}")


def test_prefork(stand: Stand, valkey_server: object) -> None:
    """A stopped child, a stalled main loop, a broker that is down and comes back, and a warm stop under way."""
    assert isinstance(valkey_server, ValkeyServer)
    with stand.worker(app=APP, concurrency=2, conf=CONF) as worker:
        stand.reach_all(worker.children())
        wait_for(worker, "/livez", 200, "[+] children: 2 of 2 alive")
        wait_for(worker, "/readyz", 200, "[+] publishing")

        child = worker.children()[0]
        os.kill(child, signal.SIGSTOP)
        wait_for(worker, "/readyz", 503, f"[-] publishing: process {child} is stopped by a signal")
        assert probe(worker, "/livez")[0] == 200
        os.kill(child, signal.SIGCONT)
        wait_for(worker, "/readyz", 200, "[+] publishing")

        stand.client.control.broadcast("stall", arguments={"seconds": 4.0})
        wait_for(worker, "/livez", 503, "[-] main loop: turned")
        wait_for(worker, "/livez", 200, "[+] main loop: turned")

        valkey_server.stop()
        try:
            wait_for(worker, "/readyz", 503, "[-] broker: not connected")
            # Longer than a main loop may stall: a restart would not help.
            stalled = wait_until(lambda: "Trying again in 4" in worker.log(), "a second try")
            assert stalled
            assert probe(worker, "/livez") == (200, "[+] main loop: waits for the broker\n[+] children: 2 of 2 alive\n")
        finally:
            valkey_server.start()
        wait_for(worker, "/readyz", 200, "[+] broker: connected")
        assert probe(worker, "/livez")[0] == 200

        stand.send("nap", 3.0)
        wait_until(lambda: "shop.nap" in worker.log(), "the task")
        os.kill(worker.pid, signal.SIGTERM)
        wait_for(worker, "/readyz", 503, "[-] shutdown: in progress")
        assert probe(worker, "/livez")[0] == 200


def test_solo(stand: Stand) -> None:
    """A task that occupies the main loop for longer than it may stall is no reason to restart the worker."""
    with stand.worker(app=APP, pool="solo", concurrency=1, conf=CONF) as worker:
        wait_for(worker, "/livez", 200, "[+] main loop: turned")
        result = stand.send("nap", 4.0)
        wait_for(worker, "/livez", 200, "[+] main loop: runs a task")
        assert "children" not in probe(worker, "/readyz")[1]
        while not result.ready():
            assert probe(worker, "/livez")[0] == 200
        wait_for(worker, "/readyz", 200, "[+] main loop: turned")
