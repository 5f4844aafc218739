"""A connection that died between two tasks costs a second run of the body where that is safe, and nothing else."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from itertools import count

import pytest

from tests.support.proxy import TcpProxy
from tests.support.stand import PATIENCE, Stand, ended, wait_until
from tests.support.worker import WorkerProcess

pytestmark = pytest.mark.worker

numbers = count(1)

CHILDREN = 2
#: One for each engine of each child, and none besides: what is left over is a leak.
CONNECTIONS = 2 * CHILDREN


@pytest.fixture(scope="module")
def proxy(shared: Stand) -> Iterator[TcpProxy]:
    """Before the database, for both drivers."""
    with TcpProxy(shared.database.host, shared.database.port) as opened:
        yield opened


@pytest.fixture(scope="module")
def started(shared: Stand, proxy: TcpProxy) -> Iterator[WorkerProcess]:
    database = shared.database.through(proxy)
    env = {"SHOP_DATABASE": database.url(), "SHOP_STOCK": database.url("psycopg")}
    with shared.worker(concurrency=CHILDREN, env=env) as worker:
        yield worker


@pytest.fixture
def worker(shared: Stand, started: WorkerProcess, proxy: TcpProxy) -> WorkerProcess:
    """The worker, with every connection of every child open and idle.

    Each child keeps one connection for each of its two engines. What an earlier test lost, or had the server end, is
    waited for: a proxy and a server take a moment to see that the client is gone.
    """
    for name in ("visit", "stock"):
        shared.reach_all(started.children(), name)
    proxy.wait_for(open=CONNECTIONS, timeout=PATIENCE)
    wait_until(lambda: len(shared.backends()) == CONNECTIONS, f"{CONNECTIONS} backends")
    shared.echo.clear()
    return started


def replays(worker: WorkerProcess) -> int:
    # SQLAlchemy's lines about its pool, whose loggers are silent at INFO, would stand around ours.
    assert "Invalidate connection" not in worker.log()
    return worker.log().count("attempt_replayed ")


@pytest.mark.parametrize("name", ["order", "refill"])
def test_terminated_backends_cost_one_replay_each(shared: Stand, worker: WorkerProcess, name: str) -> None:
    """Every backend is terminated while idle: all tasks after it succeed and each writes one row; the bodies that met
    a dead connection, and they alone, ran twice, and the log says so."""
    children, before = worker.children(), replays(worker)
    assert shared.terminate_backends() == CONNECTIONS
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


def test_a_body_whose_every_run_loses_its_connection_is_replayed_twice(shared: Stand, worker: WorkerProcess) -> None:
    """The server ends the session of each run half-way: the third failure is the task's."""
    number = next(numbers)
    result = shared.outcome("order", number, "lose the session")
    assert result.state == "FAILURE"
    assert "OperationalError" in repr(result.result)
    assert [entry.detail for entry in shared.entries("body")].count(number) == 3
    assert shared.orders(number) == []


def test_a_bug_behind_a_lost_connection_is_not_replayed(shared: Stand, worker: WorkerProcess) -> None:
    """The body's own error is masked by the driver's, of the rollback: it comes out, and the body ran once."""
    number = next(numbers)
    result = shared.outcome("order", number, "fail and lose the session")
    assert result.state == "FAILURE"
    assert isinstance(result.result, ValueError)
    assert str(result.result) == f"order {number}"
    assert [entry.detail for entry in shared.entries("body")].count(number) == 1
    assert shared.orders(number) == []


@pytest.mark.parametrize("name", ["order", "refill"])
@pytest.mark.parametrize("where", ["sleep in the database", "sleep in a transaction"])
def test_a_soft_time_limit_in_a_query_comes_out_as_itself(
    shared: Stand, worker: WorkerProcess, name: str, where: str
) -> None:
    """psycopg 3 is interrupted, psycopg2 hears of it when the query ends; what the driver and the rollback make of it
    does not hide it, and the body does not run again."""
    number = next(numbers)
    result = ended(shared.send(name, number, where, 2.5, soft_time_limit=1))
    assert result.state == "FAILURE"
    assert type(result.result).__name__ == "SoftTimeLimitExceeded"
    assert [entry.detail for entry in shared.entries("body")].count(number) == 1
    assert shared.orders(number) == []


def test_an_unavailable_database_is_waited_for_at_the_broker(
    shared: Stand, worker: WorkerProcess, proxy: TcpProxy
) -> None:
    """The task goes back to the broker until the server is back; the children are free meanwhile."""
    number, children = next(numbers), worker.children()
    proxy.stop()
    try:
        proxy.close_all()
        result = shared.send("patient", number)
        wait_until(lambda: worker.log().count("task_retried resource=db pid=") >= 2, "two retries")
        assert result.state == "RETRY"
        assert shared.call("plain", "meanwhile") in children
    finally:
        proxy.start()
    assert result.get(timeout=PATIENCE) in children
    assert shared.orders(number) != []
    assert len(shared.orders(number)) == 1
    assert "task=shop.patient error=OperationalError kind=unavailable delay=0." in worker.log()


@pytest.mark.parametrize(("method", "bodies"), [("GET", 2), ("POST", 1)])
def test_what_was_sent_decides_about_a_retry_too(
    shared: Stand, worker: WorkerProcess, proxy: TcpProxy, method: str, bodies: int
) -> None:
    """A task that sent a POST does not go back to the broker; its failure says why."""
    number = next(numbers)
    # The request goes out while the database refuses connections, and the pool has none.
    proxy.stop()
    try:
        proxy.close_all()
        shared.outcome("order", next(numbers))
        shared.echo.clear()
        result = shared.outcome("impatient", number, method)
    finally:
        proxy.start()
    assert result.state == "FAILURE"
    assert "OperationalError" in repr(result.result)
    found = [entry.detail for entry in shared.entries("body")].count(number)
    # One replay more where the child had a connection that died.
    assert bodies <= found <= bodies + (method == "GET")
    assert sum(request.method == method for request in shared.echo.requests()) == found
    reason = "POST by 'api' had left already" if method == "POST" else "it was retried 1 times (max_retries=1)"
    # A child whose connection died meanwhile fails on that one.
    refused = rf"task=shop\.impatient error=OperationalError kind=(unavailable|stale) reason={re.escape(reason)}"
    assert re.search(refused, worker.log())


def test_replays_and_retries_add_up_and_do_not_multiply(shared: Stand, worker: WorkerProcess) -> None:
    """2 replays and the 2 retries of autoretry_for, which decides about the error that it lists: 5 runs, not 9."""
    number = next(numbers)
    result = shared.outcome("stubborn", number)
    assert result.state == "FAILURE"
    assert [entry.detail for entry in shared.entries("body")].count(number) == 5
    assert shared.orders(number) == []


def test_replaying_can_be_turned_off(shared: Stand, worker: WorkerProcess) -> None:
    """``replay=False``: one run, and the driver's own error."""
    number = next(numbers)
    result = shared.outcome("once", number)
    assert result.state == "FAILURE"
    assert [entry.detail for entry in shared.entries("body")].count(number) == 1
    assert (
        "reason=replaying is turned off (replay=False of the task, or the setting workerpools_replay)" in worker.log()
    )


def test_a_body_is_replayed_once_and_not_more(shared: Stand, worker: WorkerProcess, proxy: TcpProxy) -> None:
    """The connection is dead and the server refuses another one: the second run's failure is the task's; the same
    children serve when the server is back."""
    number, children = next(numbers), worker.children()
    proxy.stop()
    try:
        assert proxy.close_all() == CONNECTIONS
        result = shared.outcome("order", number)
    finally:
        proxy.start()
    assert result.state == "FAILURE"
    assert "Connection refused" in str(result.result)
    assert [entry.detail for entry in shared.entries("body")].count(number) == 2
    assert shared.orders(number) == []
    shared.reach_all(children)
    assert worker.children() == children


def test_a_wait_that_would_be_delivered_twice_is_refused(shared: Stand, worker: WorkerProcess) -> None:
    """Redis delivers a message again that waits for an hour: a server that asks for more ends the task, with a note.
    One that asks for less is given its time."""
    number = next(numbers)
    result = shared.outcome("decline", number, 7200)
    assert result.state == "FAILURE"
    assert "reason=the server asks to wait 7200 s" in worker.log()
    assert [entry.detail for entry in shared.entries("body")].count(number) == 1
    number = next(numbers)
    assert shared.outcome("decline", number, 1).state == "SUCCESS"
    assert [entry.detail for entry in shared.entries("body")].count(number) == 2


def test_a_migration_costs_a_replay_in_each_child(shared: Stand, worker: WorkerProcess) -> None:
    """psycopg 3 has prepared a statement whose table gets another column: every task after it reads the new one."""
    shared.database.execute("create table catalogue (sku text)")
    for _ in range(30):
        assert shared.call("catalogue", next(numbers)) == ["sku"]
    before = replays(worker)
    shared.database.execute("alter table catalogue add column price int")
    chosen = [next(numbers) for _ in range(20)]
    sent = [shared.send("catalogue", number) for number in chosen]
    assert [result.get(timeout=PATIENCE) for result in sent] == [["sku", "price"]] * 20
    bodies = Counter(entry.detail for entry in shared.entries("body"))
    replayed = replays(worker) - before
    assert 1 <= replayed <= CHILDREN
    assert sum(bodies[number] for number in chosen) == 20 + replayed
