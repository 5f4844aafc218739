"""Every client in every execution pool: its life, its attempts, what is replayed, and the end."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from itertools import count
from typing import Any
from urllib.parse import urlsplit

import pytest
import redis

from tests.support.stand import PATIENCE, Stand
from tests.support.worker import WorkerProcess
from workerpools.testing import TcpProxy

pytestmark = [pytest.mark.worker, pytest.mark.timeout(240)]

CLIENTS = ("requests", "redis", "httpx")

#: The workers: how many connections to each server the parent has before the first task, and their options.
WORKERS: dict[str, tuple[int, dict[str, Any]]] = {
    "fork": (1, {"env": {"SHOP_PARENT": "1"}}),
    "spawn": (0, {"conf": {"worker_pool_start_method": "spawn"}}),
    "threads": (0, {"pool": "threads"}),
    "solo": (0, {"pool": "solo"}),
    "gevent": (0, {"pool": "gevent"}),
}

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
        if client == "redis":
            return int(self.server.get(f"echo/{number}") or 0)
        paths = [each.path for each in self.stand.echo.requests() if each.method == "POST"]
        return paths.count(f"/echo/{number}")

    def recorded(self, event: str, number: int) -> int:
        return [entry.detail for entry in self.stand.entries(event)].count(number)


@pytest.fixture(params=list(WORKERS))
def kind(request: pytest.FixtureRequest) -> str:
    """How the worker runs its tasks."""
    if request.param == "gevent":
        pytest.importorskip("gevent")
    return str(request.param)


@pytest.fixture
def around(stand: Stand, kind: str) -> Iterator[Around]:
    broker = urlsplit(stand.broker_url)
    with ExitStack() as opened:
        servers = {
            name: (broker.hostname, broker.port) if name == "redis" else (stand.echo.host, stand.echo.port)
            for name in CLIENTS
        }
        proxies = {name: opened.enter_context(TcpProxy(*where)) for name, where in servers.items()}  # type: ignore[arg-type]
        env = {
            f"SHOP_{name.upper()}": f"redis://:{broker.password}@{proxy.host}:{proxy.port}{broker.path}"
            if name == "redis"
            else f"http://{proxy.host}:{proxy.port}"
            for name, proxy in proxies.items()
        }
        options = dict(WORKERS[kind][1])
        env.update(options.pop("env", {}))
        server = opened.enter_context(closing(redis.Redis.from_url(stand.broker_url)))
        worker = opened.enter_context(stand.worker(app="tests.worker.clients:app", concurrency=1, env=env, **options))
        yield Around(stand, worker, proxies, server)


def test_clients(around: Around, kind: str) -> None:
    """Opened by the first task and kept; undone, replayed or not, as the task and the server's part in it allow."""
    stand, in_parent = around.stand, WORKERS[kind][0]
    for client, proxy in around.proxies.items():
        assert proxy.accepted == proxy.open == in_parent, client
        if (kind, client) == ("gevent", "httpx"):
            refused = stand.outcome(client, next(numbers), "GET")
            assert refused.state == "FAILURE"
            assert "async def does not run under gevent" in str(refused.result)
            assert proxy.accepted == 0
            continue

        # Its life: one connection serves task after task, and is none that the parent has.
        for method in ("GET", "POST", "GET"):
            number = next(numbers)
            answer = stand.call(client, number, method)
            assert len(answer["effects"]) == around.done(client, number) == (method == "POST"), client
            assert around.recorded("committed", number) == 1
        assert proxy.accepted == in_parent + 1, client
        assert (answer["pid"] == around.worker.pid) == (kind not in ("fork", "spawn"))

        # An attempt that fails: what it had done stays done, and what waited for its commit does not happen.
        failed = next(numbers)
        assert stand.outcome(client, failed, "POST", True).state == "FAILURE"
        assert (around.done(client, failed), around.recorded("committed", failed)) == (1, 0), client

        # Dead connections, the parent's among them, cost nothing.
        proxy.cut()
        assert stand.call(client, next(numbers), "GET")

        # A lost answer to what changes nothing costs nothing either; of what changes something, it is up to the task.
        for name, method, state, done in (
            (client, "GET", "SUCCESS", 0),
            (client, "POST", "FAILURE", 1),
            (f"{client}.any_times", "POST", "SUCCESS", 2),
        ):
            number, lost = next(numbers), proxy.lost
            assert stand.call(client, number, "GET")
            proxy.lose_answer(f"echo/{number}".encode())
            result = stand.outcome(name, number, method)
            assert (result.state, around.done(client, number)) == (state, done), (name, method, result.result)
            assert proxy.lost == lost + 1
            if state == "FAILURE":
                assert "Not run again" in str(result.traceback)

    assert set(map(tuple, stand.call("gauges").values())) == {(0, 0)}
    assert around.worker.stop() == 0
    for proxy in around.proxies.values():
        proxy.wait_for(lambda proxy: proxy.open == 0, PATIENCE)
