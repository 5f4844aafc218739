"""Every client in every execution pool: its life, its attempts, what is replayed, and the end."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from itertools import count
from typing import Any

import pytest
import redis
from celery import chain, group

from tests.support.clients import CLIENTS, servers_of
from tests.support.stand import PATIENCE, Stand, ended, wait_until
from tests.support.worker import WorkerProcess
from workerpools.testing import TcpProxy

pytestmark = [pytest.mark.worker, pytest.mark.timeout(240)]


#: The workers: how many connections to each server the parent has before the first task, and their options.
WORKERS: dict[str, tuple[int, dict[str, Any]]] = {
    "fork": (1, {"env": {"SHOP_PARENT": "1"}}),
    "spawn": (0, {"conf": {"worker_pool_start_method": "spawn"}}),
    "threads": (0, {"pool": "threads"}),
    "solo": (0, {"pool": "solo"}),
    "gevent": (0, {"pool": "gevent", "env": {"SHOP_COOPERATES": "gevent"}}),
    # psycopg looks for gevent alone.
    "eventlet": (0, {"pool": "eventlet", "env": {"SHOP_COOPERATES": "eventlet", "PSYCOPG_WAIT_FUNC": "wait_select"}}),
}

#: What a loop or a connection that is used wrongly says.
BROKEN = re.compile(
    r"loop is closed|different (event )?loop|never retrieved|was destroyed|was never awaited|MissingGreenlet"
    r"|garbage collector"
)
UNCLOSED = re.compile(r"unclosed <(?!_io)")

numbers = count(1)


@dataclass
class Around:
    """A worker, and the proxies between its clients and their servers."""

    stand: Stand
    worker: WorkerProcess
    proxies: dict[str, TcpProxy]
    server: Any

    def done(self, client: str, number: int) -> int:
        """Return how often the server did what changes something."""
        scheme = CLIENTS[client].scheme
        if scheme in ("redis", "valkey"):
            return int(self.server.get(f"echo/{number}.") or 0)
        if scheme == "http":
            paths = [each.path for each in self.stand.echo.requests() if each.method == "POST"]
            return paths.count(f"/echo/{number}.")
        return len(self.stand.orders(number))

    def recorded(self, event: str, number: int) -> int:
        return [entry.detail for entry in self.stand.entries(event)].count(number)


@pytest.fixture(params=list(WORKERS))
def kind(request: pytest.FixtureRequest) -> str:
    """How the worker runs its tasks."""
    if request.param in ("gevent", "eventlet"):
        pytest.importorskip(request.param)
    return str(request.param)


@pytest.fixture
def around(stand: Stand, kind: str) -> Iterator[Around]:
    with ExitStack() as opened:
        servers = opened.enter_context(servers_of(stand))
        options = dict(WORKERS[kind][1])
        env = {"SHOP_URLS": json.dumps(servers.urls), "PYTHONWARNINGS": "default", **options.pop("env", {})}
        server = opened.enter_context(closing(redis.Redis.from_url(stand.broker_url)))
        worker = opened.enter_context(stand.worker(app="tests.worker.clients:app", concurrency=1, env=env, **options))
        yield Around(stand, worker, servers.proxies, server)


def run_canvas(around: Around, used: list[str]) -> int:
    """Run a chain whose last but one step is a group, which makes the end of it a chord: each step once."""
    stand, steps = around.stand, [(client, next(numbers)) for client in (*used, *used, used[0])]
    accepted = {client: around.proxies[client].accepted for client in used}
    signatures = [stand.client.signature(f"shop.{name}", (number, "POST"), immutable=True) for name, number in steps]
    canvas = chain(*signatures[: len(used)], group(signatures[len(used) : -1]), signatures[-1])
    result = canvas.apply_async()
    pid = int(result.get(timeout=PATIENCE)["pid"])
    # Finalized when the broker is gone, the steps' results would try to reach it.
    while result is not None:
        result.forget()
        result = result.parent
    for client, number in steps:
        found = (around.recorded("body", number), around.recorded("committed", number), around.done(client, number))
        assert found == (1, 1, 1), client
        # One, where the last lost answer has left none.
        assert around.proxies[client].accepted <= accepted[client] + 1, client
    return pid


def test_clients(around: Around, kind: str) -> None:
    """Opened by the first task and kept; undone, replayed or not, as the task and the server's part in it allow; and
    closed in order."""
    stand, worker, in_parent = around.stand, around.worker, WORKERS[kind][0]
    pids, used, cut = set[int](), list[str](), 0
    for client, proxy in around.proxies.items():
        runs, database = CLIENTS[client].runs, CLIENTS[client].database
        assert proxy.accepted == proxy.open == in_parent, client
        if kind in ("gevent", "eventlet") and client.startswith("async"):
            refused = stand.outcome(client, next(numbers), "GET")
            assert (refused.state, type(refused.result).__name__) == ("FAILURE", "ConfigurationError")
            assert f"async def does not run under {kind}" in str(refused.result)
            assert proxy.accepted == 0
            continue
        used.append(client)

        # Its life: one connection serves task after task, and is none that the parent has.
        for method in ("GET", "POST", "GET"):
            number = next(numbers)
            answer = stand.call(client, number, method)
            assert len(answer["effects"]) == around.done(client, number) == (method == "POST"), (client, method)
            assert (around.recorded("body", number), around.recorded("committed", number)) == (1, 1)
            pids.add(answer["pid"])
        assert proxy.accepted == proxy.open == in_parent + 1, client
        assert (answer["pid"] == worker.pid) == (kind not in ("fork", "spawn"))

        # An attempt that fails: what it had done stays done, and what waited for its commit does not happen.
        for method, done in (("POST", 1), *([("session", 0)] if database else [])):
            number = next(numbers)
            assert stand.outcome(client, number, method, True).state == "FAILURE"
            assert (around.done(client, number), around.recorded("committed", number)) == (done, 0), (client, method)

        # Dead connections, the parent's among them, cost another run at most.
        number, cut = next(numbers), cut + database * proxy.open
        proxy.cut()
        assert stand.call(client, number, "GET")
        assert around.recorded("body", number) == runs, client

        # A lost answer to what changes nothing costs nothing either; of what changes something, it is up to the task.
        cases = [
            (client, "GET", "SUCCESS", runs, 0),
            (client, "POST", "FAILURE", 1, 1),
            (f"{client}.any_times", "POST", "SUCCESS", 2, 2),
        ]
        if database:
            # What the server undoes is done again; what it had committed is found to be.
            cases += [(client, "session", "SUCCESS", 2, 1), (client, "COMMIT", "SUCCESS", 1, 1)]
        for name, method, state, bodies, done in cases:
            number, lost, cut = next(numbers), proxy.lost, cut + database
            assert stand.call(client, next(numbers), "GET")
            proxy.lose_answer(b"COMMIT" if method == "COMMIT" else f"echo/{number}.".encode())
            result = stand.outcome(name, number, "session" if method == "COMMIT" else method)
            found = (result.state, around.recorded("body", number), around.done(client, number))
            assert found == (state, bodies, done), (name, method, result.result)
            assert proxy.lost == lost + 1
            if state == "FAILURE":
                assert "Not run again" in str(result.traceback)

    assert not UNCLOSED.search(worker.log()), worker.log()
    if kind not in ("gevent", "eventlet"):
        pids.add(run_canvas(around, used))

    (pid,) = pids
    assert set(map(tuple, stand.call("gauges").values())) == {(0, 0)}

    # Told to stop, it finishes what is under way, and closes everything.
    in_flight = stand.send("slow", next(numbers), used)
    stand.wait_for_entry("slow")
    assert worker.stop() == 0
    assert ended(in_flight).state == "SUCCESS"
    for proxy in around.proxies.values():
        proxy.wait_for(lambda proxy: proxy.open == 0, PATIENCE)
    for client in used:
        assert worker.log().count(f"value_closed resource={client} pid={pid}") >= 1, client
    wait_until(lambda: not stand.backends(), "the sessions to be closed", 10.0)
    assert stand.disorderly_ends() == cut
    assert not BROKEN.search(worker.log()), worker.log()
