"""A connection that died between two tasks costs a second run of the body where that is safe, and nothing else."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import count

import pytest

from tests.support.proxy import TcpProxy
from tests.support.worker import WorkerProcess
from tests.worker.stand import PATIENCE, Stand

pytestmark = pytest.mark.worker

numbers = count(1)


@pytest.fixture(scope="module")
def proxy(shared: Stand) -> Iterator[TcpProxy]:
    """Before the database, for both drivers."""
    with TcpProxy(shared.database.host, shared.database.port) as opened:
        yield opened


@pytest.fixture(scope="module")
def started(shared: Stand, proxy: TcpProxy) -> Iterator[WorkerProcess]:
    database = shared.database.through(proxy)
    env = {"SHOP_DATABASE": database.url(), "SHOP_STOCK": database.url("psycopg")}
    with shared.worker(concurrency=2, env=env) as worker:
        yield worker


@pytest.fixture
def worker(shared: Stand, started: WorkerProcess) -> WorkerProcess:
    """The worker, with every connection of every child open and idle."""
    for name in ("visit", "stock"):
        shared.reach_all(started.children(), name)
    shared.echo.clear()
    return started


def replays(worker: WorkerProcess) -> int:
    return worker.log().count("attempt_replayed ")


@pytest.mark.parametrize("name", ["order", "refill"])
def test_terminated_backends_cost_one_replay_each(shared: Stand, worker: WorkerProcess, name: str) -> None:
    """Every backend is terminated while idle: all tasks after it succeed and each writes one row; the bodies that met
    a dead connection, and they alone, ran twice, and the log says so."""
    children, before = worker.children(), replays(worker)
    assert shared.terminate_backends() == 4
    chosen = [next(numbers) for _ in range(20)]
    sent = [shared.send(name, number) for number in chosen]
    used = {result.get(timeout=PATIENCE) for result in sent}
    assert [shared.orders(number) for number in chosen] == [[0]] * 20
    replayed = replays(worker) - before
    assert replayed == len(used)
    bodies = Counter(entry.detail for entry in shared.entries("body"))
    assert sum(bodies[number] for number in chosen) == 20 + replayed
    assert max(bodies[number] for number in chosen) == 2
    resource = {"order": "db", "refill": "stock"}[name]
    assert f"attempt_replayed resource={resource} pid=" in worker.log()
    assert f"task=shop.{name} error=OperationalError" in worker.log()
    assert worker.children() == children


def test_an_upstream_that_closes_idle_connections_costs_nothing(shared: Stand, worker: WorkerProcess) -> None:
    """The client sees that its idle connection is closed and opens another one: no failure and no replay."""
    before = replays(worker)
    assert shared.echo.close_idle() >= 2
    answers = shared.reach_all(worker.children())
    assert all(answer["right"] for answer in answers)
    assert replays(worker) == before


@pytest.mark.parametrize(
    ("method", "key", "runs"), [("GET", None, 2), ("PUT", None, 2), ("POST", "k-1", 2), ("POST", None, 1)]
)
def test_what_was_sent_decides_about_a_replay(
    shared: Stand, worker: WorkerProcess, method: str, key: str | None, runs: int
) -> None:
    """The database's connection turns out to be dead after a request was sent. A request that may be sent again is
    sent again with the whole body; after a POST without an Idempotency-Key the task fails with the driver's own error,
    and the upstream saw one POST."""
    number, before = next(numbers), replays(worker)
    shared.terminate_backends()
    result = shared.outcome("pay", number, method, key)
    seen = [(request.method, request.idempotency_key) for request in shared.echo.requests()]
    assert seen == [(method, key)] * runs
    assert [entry.detail for entry in shared.entries("body")].count(number) == runs
    assert replays(worker) - before == runs - 1
    if runs == 2:
        assert result.state == "SUCCESS"
        assert shared.orders(number) == [0]
    else:
        assert result.state == "FAILURE"
        assert "OperationalError" in repr(result.result)
        assert "sqlalchemy.exc.OperationalError" in result.traceback
        assert shared.orders(number) == []


def test_a_body_whose_every_run_loses_its_connection_is_replayed_once(shared: Stand, worker: WorkerProcess) -> None:
    """The server ends the session of each run half-way: the second failure is the task's."""
    number = next(numbers)
    result = shared.outcome("order", number, "lose the session")
    assert result.state == "FAILURE"
    assert "OperationalError" in repr(result.result)
    assert [entry.detail for entry in shared.entries("body")].count(number) == 2
    assert shared.orders(number) == []


def test_a_bug_behind_a_lost_connection_is_not_replayed(shared: Stand, worker: WorkerProcess) -> None:
    """The body's own error is masked by the driver's, of a statement that its clean-up tries: it ran once."""
    number = next(numbers)
    result = shared.outcome("order", number, "fail and lose the session")
    assert result.state == "FAILURE"
    assert f"ValueError: order {number}" in result.traceback
    assert [entry.detail for entry in shared.entries("body")].count(number) == 1
    assert shared.orders(number) == []


def test_a_body_is_replayed_once_and_not_more(shared: Stand, worker: WorkerProcess, proxy: TcpProxy) -> None:
    """The connection is dead and the server refuses another one: the second run's failure is the task's; the same
    children serve when the server is back."""
    number, children = next(numbers), worker.children()
    proxy.stop()
    try:
        assert proxy.close_all() == 4
        result = shared.outcome("order", number)
    finally:
        proxy.start()
    assert result.state == "FAILURE"
    assert "Connection refused" in str(result.result)
    assert [entry.detail for entry in shared.entries("body")].count(number) == 2
    assert shared.orders(number) == []
    shared.reach_all(children)
    assert worker.children() == children
