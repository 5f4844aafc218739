"""``async def`` bodies in a real worker: one loop per child, whole after whatever strikes, and closed in order."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from contextlib import closing
from itertools import count
from typing import Any

import pytest
import redis

from tests.support.stand import PATIENCE, Stand, ended, wait_until
from tests.support.worker import WorkerProcess
from workerpools.testing import TcpProxy

pytestmark = pytest.mark.worker

APP = "tests.worker.coroutines:app"

#: What a loop that is used wrongly says.
BROKEN = re.compile(r"loop is closed|different (event )?loop|never retrieved|unclosed <(?!_io)|was destroyed")

numbers = count(100)


@pytest.fixture
def proxy(stand: Stand) -> Iterator[TcpProxy]:
    with TcpProxy(stand.echo.host, stand.echo.port) as opened:
        yield opened


def worker_of(stand: Stand, proxy: TcpProxy, *, conf: dict[str, Any] | None = None, **options: Any) -> WorkerProcess:
    env = {"SHOP_API": f"http://{proxy.host}:{proxy.port}", "PYTHONWARNINGS": "default", **options.pop("env", {})}
    return stand.worker(app=APP, env=env, conf=conf, **options)


def bodies(stand: Stand, number: int) -> int:
    return [entry.detail for entry in stand.entries("body")].count(number)


def test_async_bodies(stand: Stand, proxy: TcpProxy) -> None:
    """The request is the task's own; several clients at once; a plain body that runs a coroutine."""
    with worker_of(stand, proxy, concurrency=1) as worker:
        first = stand.send("visit", "a")
        assert first.get(timeout=PATIENCE)["id"] == first.id
        assert stand.call("both", 1) == [200, 200, ["POST by 'api'"]]
        stand.outcome("fails", 2)
        assert [entry.detail for entry in stand.entries("committed")] == [1]
        assert stand.call("from_sync", 3) == [200, 200]
        left = stand.call("gauges")
        assert left["tasks"] == 0
        assert set(map(tuple, left["counted"].values())) == {(0, 0)}
        assert worker.stop() == 0
        stand.echo.wait_for_open(0, 10.0)
        assert not BROKEN.search(worker.log()), worker.log()


def counting(stand: Stand) -> int:
    """Return the number of connections of the client of Redis."""
    with closing(redis.Redis.from_url(stand.broker_url)) as client:
        return sum(each["name"] == "shop-counter" for each in client.client_list())


def struck(stand: Stand, count: int) -> None:
    """Send tasks whose soft limits strike at random; check what they leave."""
    chance = random.Random(13)
    pids = {stand.call("gauges")["pid"] for _ in range(6)}
    sent = [next(numbers) for _ in range(count)]
    # Python loses a signal that strikes in a finalizer. The deadline then ends the body, as for any task with a limit.
    results = [stand.send("busy", number, chance.uniform(0, 0.1), soft_time_limit=15) for number in sent]
    assert {type(ended(result).result).__name__ for result in results} == {"SoftTimeLimitExceeded"}
    assert sorted(entry.detail for entry in stand.entries("cleaned")) == sent
    for _ in range(6):
        left = stand.call("gauges")
        assert left["tasks"] == 0
        assert set(map(tuple, left["counted"].values())) == {(0, 0)}
        # The same children: none had to be killed.
        assert left["pid"] in pids
    assert stand.call("visit", "after")["status"] == 200


@pytest.mark.parametrize("count", [pytest.param(60, id="60"), pytest.param(1000, id="1000", marks=pytest.mark.slow)])
def test_soft_limits_struck_at_random(stand: Stand, proxy: TcpProxy, count: int) -> None:
    """By Celery's signal. No loop is left broken, no connection leaked."""
    with worker_of(stand, proxy, concurrency=2) as worker:
        struck(stand, count)
        # An idle one or two per child and client.
        wait_until(lambda: stand.echo.open_connections() <= 8, "the interrupted requests' connections to be closed")
        # One per child.
        assert 1 <= counting(stand) <= 2
        assert worker.stop() == 0
        stand.echo.wait_for_open(0, 10.0)
        wait_until(lambda: counting(stand) == 0, "the commands' connections to be closed")
        assert not BROKEN.search(worker.log()), worker.log()


def test_a_slow_body_delays_no_neighbour(stand: Stand, proxy: TcpProxy) -> None:
    """The threads of one process wait on one loop."""
    with worker_of(stand, proxy, pool="threads", concurrency=4) as worker:
        slow = stand.send("slow")
        stand.wait_for_entry("slow")
        results = [stand.send("visit", str(number)) for number in range(20)]
        assert {result.get(timeout=PATIENCE)["status"] for result in results} == {200}
        assert not slow.ready()
        stand.call("release")
        assert slow.get(timeout=PATIENCE) == "released"
        assert worker.stop() == 0
        assert not BROKEN.search(worker.log()), worker.log()


def test_recycled_children_close_what_they_opened(stand: Stand, proxy: TcpProxy) -> None:
    with worker_of(stand, proxy, concurrency=2, args=("--max-tasks-per-child", "2")) as worker:
        results = [stand.send("visit", str(number)) for number in range(20)]
        pids = {result.get(timeout=PATIENCE)["pid"] for result in results}
        assert len(pids) >= 9
        wait_until(lambda: stand.echo.open_connections() <= 2, "recycled children to close their connections", 15.0)
        assert worker.stop() == 0
        stand.echo.wait_for_open(0, 10.0)
        assert not BROKEN.search(worker.log()), worker.log()
