"""Workers whose tasks are greenlets: what ends a task, what is seen of them, and how they end."""

from __future__ import annotations

import time
from urllib.parse import urlsplit

import pytest

from tests.support.proxy import TcpProxy
from tests.support.stand import PATIENCE, Stand, ended, wait_until
from tests.worker.green_stand import GREENLETS, LIBRARIES, bodies, green, numbers
from tests.worker.test_seen import look, of

pytestmark = pytest.mark.worker

DRIVERS = ("sell", "sell_stock")


@pytest.fixture(params=LIBRARIES)
def library(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_a_timeout_that_leaves_the_body_undoes_its_work(stand: Stand) -> None:
    """gevent.Timeout, which is no Exception, of the body or by Celery's hard limit: the row is not there, and the body
    does not run again. Of a task without a time limit Celery stores no result for it."""
    with green(stand, "gevent") as worker:
        cases = [(name, how, 60) for name in DRIVERS for how in ("timeout", "timeout in a query")]
        for name, how, limit in [*cases, ("sell", "sleep", 1), ("sell_stock", "sleep", 1)]:
            number = next(numbers)
            result = ended(stand.send(name, number, how, time_limit=limit))
            assert type(result.result).__name__ == "TimeLimitExceeded", (name, how)
            assert stand.orders(number) == []
            assert bodies(stand, number) == 1
            assert stand.outcome(name, next(numbers)).state == "SUCCESS"
        assert "attempt_replayed" not in worker.log()


@pytest.mark.parametrize("cooperates", [True, False])
def test_a_query_ends_at_the_limit(stand: Stand, library: str, cooperates: bool) -> None:
    """Soft limits, too, which Celery does not enforce here; and where psycopg2 lets nobody else run."""
    with green(stand, library, cooperates=cooperates):
        for name in DRIVERS:
            stand.outcome(name, next(numbers))
            for limit, wanted in (("soft_time_limit", "SoftTimeLimitExceeded"), ("time_limit", "TimeLimitExceeded")):
                number = next(numbers)
                started = time.monotonic()
                result = ended(stand.send(name, number, "sleep in a query", **{limit: 2}))
                assert time.monotonic() - started < 15
                assert type(result.result).__name__ == wanted
                assert bodies(stand, number) == 1
                assert stand.orders(number) == []
                assert stand.outcome(name, next(numbers)).state == "SUCCESS"


@pytest.mark.parametrize("cooperates", [True, False])
def test_a_silent_network_is_given_up_at_the_limit(stand: Stand, library: str, cooperates: bool) -> None:
    """Database and upstream accept and say nothing: the task ends, even where psycopg2 waits in C and no greenlet
    runs."""
    with (
        TcpProxy(stand.database.host, stand.database.port) as database,
        TcpProxy(stand.echo.host, stand.echo.port) as upstream,
    ):
        env = {
            "SHOP_DATABASE": stand.database.through(database).url(),
            "SHOP_STOCK": stand.database.through(database).url("psycopg"),
            "SHOP_API": f"http://{upstream.host}:{upstream.port}",
        }
        with green(stand, library, cooperates=cooperates, env=env):
            for name in ("visit", "stock"):
                assert stand.outcome(name, "warm").state == "SUCCESS"
            for silent, calls in (
                (database, [("sell", next(numbers)), ("sell_stock", next(numbers))]),
                (upstream, [("slow_request", 0.0)]),
            ):
                silent.blackhole()
                for name, argument in calls:
                    result = ended(stand.send(name, argument, soft_time_limit=2))
                    assert result.state == "FAILURE"
                    assert any(name in repr(result.result) for name in ("SoftTimeLimitExceeded", "OperationalError"))
                silent.pass_through()
                silent.close_all()
            assert stand.outcome("visit", "back").state == "SUCCESS"


def test_a_connection_is_waited_for(stand: Stand, library: str) -> None:
    """More greenlets than connections: tasks take turns, and none waits beyond its deadline."""
    env = {"WORKERPOOLS_DATABASE_POOL_SIZE": "1", "WORKERPOOLS_DATABASE_MAX_OVERFLOW": "0"}
    with green(stand, library, env=env):
        sent = [stand.send("hold", 0.05) for _ in range(12)]
        assert len({result.get(timeout=PATIENCE) for result in sent}) == 1
        long = stand.send("hold", 6.0)
        stand.wait_for_entry("hold", count=13)
        hurried = ended(stand.send("hold", 0.0, soft_time_limit=1))
        assert "DeadlineExceeded" in repr(hurried.result)
        assert long.state == "PENDING"
        assert long.get(timeout=PATIENCE)


def test_what_greenlets_use_is_counted_and_closed(stand: Stand, library: str) -> None:
    """``celery inspect pools``: one process, whose numbers the servers confirm. At a warm stop a task that is in flight
    succeeds, and every connection ends with a goodbye."""
    with green(stand, library) as worker:
        sent = [stand.send("visit", f"token-{number}") for number in range(40)]
        assert all(result.get(timeout=PATIENCE)["right"] for result in sent)
        stats = look(stand)
        (process,) = stats.processes
        assert (process.pid, process.index, stats.execution_pool) == (worker.pid, None, library)
        api, db = of(process.resources, "api"), of(process.resources, "db")
        assert api.value("attempts") == db.value("attempts") == 40
        assert api.value("opened") == stand.echo.accepted
        assert db.open == len(stand.backends("workerpools db pid=%")) <= GREENLETS + 1
        assert db.limit == GREENLETS + 1
        assert db.histogram("use_time").count == api.histogram("use_time").count == 40
        assert (api.in_use, db.in_use, db.pending, db.value("leaks")) == (0, 0, 0, 0)

        for name in ("visit", "stock", "configured"):
            for result in [stand.send(name, f"token-{n}") for n in range(8)]:
                result.get(timeout=PATIENCE)
        assert len(stand.backends()) >= 3
        in_flight = stand.send("slow_request", 1.5)
        stand.wait_for_entry("slow_request")
        assert worker.stop() == 0
        log = worker.log()
    assert ended(in_flight).state == "SUCCESS"
    stand.wait_for_no_connection()
    assert stand.disorderly_ends() == 0
    for resource in ("api", "db", "stock", "http", "engine"):
        assert log.count(f"value_closed resource={resource} pid={worker.pid}") == 1
    # As it patches, eventlet complains of what other packages have in their modules: httpx2, which dnspython imports.
    assert "Traceback" not in log.partition(" ready.")[2]


def test_a_timeout_that_the_body_handles_is_no_failure(stand: Stand) -> None:
    """``with gevent.Timeout(…, False)`` round something else: the work is committed."""
    number = next(numbers)
    with green(stand, "gevent"):
        assert stand.call("sell", number, "timeout of its own")
        assert stand.orders(number) == [0]


@pytest.mark.parametrize(("cooperates", "expected"), [(False, 1), (True, 0)])
def test_a_driver_that_lets_nobody_else_run_is_told_of_once(stand: Stand, cooperates: bool, expected: int) -> None:
    """One line for an engine, with what to do; none where psycopg2 was told how to wait, nor for psycopg 3."""
    with green(stand, "gevent", cooperates=cooperates) as worker:
        for _ in range(5):
            for name in ("sell", "sell_stock"):
                stand.call(name, next(numbers))
        told = [line for line in worker.log().splitlines() if "psycogreen" in line]
    assert len(told) == expected, told
    assert all("'db'" in line and "WARNING" in line for line in told)


@pytest.mark.parametrize("busy", [False, True], ids=["idle", "busy"])
def test_a_cold_stop_ends_and_leaves_no_connection(stand: Stand, busy: bool) -> None:
    """Also with a body in the middle of its transaction. The row is there if the task has succeeded, and otherwise it
    is not."""
    with green(stand, "gevent") as worker:
        for name in ("visit", "stock", "configured"):
            stand.call(name, "token")
        if busy:
            in_flight = stand.send("order", 7, "sleep", 3)
            stand.wait_for_entry("order", 7)
        worker.cold_stop(timeout=60)
        log = worker.log()
    stand.wait_for_no_connection()
    for resource in ("api", "db", "stock", "http", "engine"):
        assert log.count(f"value_closed resource={resource} pid={worker.pid}") == 1
    if busy:
        assert stand.orders(7) == ([0] if in_flight.state == "SUCCESS" else [])
        assert len(stand.entries("body")) == 1


def test_a_worker_whose_broker_is_gone_ends(stand: Stand, library: str) -> None:
    """Without Celery's heartbeats, which hold a lock while they wait for the broker; see docs/operations.md."""
    address = urlsplit(stand.broker_url)
    assert address.hostname is not None
    assert address.port is not None
    with TcpProxy(address.hostname, address.port) as broker:
        place = f"{address.hostname}:{address.port}"
        url = stand.broker_url.replace(place, f"{broker.host}:{broker.port}")
        with green(stand, library, env={"SHOP_BROKER": url}, args=["--without-heartbeat"]) as worker:
            assert stand.outcome("sell", next(numbers)).state == "SUCCESS"
            broker.stop()
            broker.close_all()
            wait_until(lambda: "Trying again in" in worker.log(), "the loss of the broker")
            assert worker.stop(PATIENCE) == 0
    stand.wait_for_no_connection()
