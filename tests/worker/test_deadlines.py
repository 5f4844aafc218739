"""A task ends within its time limit, also where Celery enforces none and where nothing can interrupt the driver."""

from __future__ import annotations

import time
from itertools import count

import pytest

from tests.support.proxy import TcpProxy
from tests.support.stand import Stand, ended

pytestmark = pytest.mark.worker

numbers = count(1)


@pytest.mark.parametrize("pool", ["prefork", "threads", "solo"])
def test_a_query_ends_at_the_limit_in_every_execution_pool(stand: Stand, pool: str) -> None:
    """A query of 10 s under a soft limit of 2 s, by message, by option of the worker and by option of the task: it
    ends by 2.5 s, reported as the limit, and the body does not run again; the next task finds a connection."""
    with stand.worker(pool=pool, concurrency=1) as worker:
        for name in ("order", "refill"):
            stand.outcome(name, next(numbers))
            number = next(numbers)
            started = time.monotonic()
            result = ended(stand.send(name, number, "sleep in the database", 10.0, soft_time_limit=2))
            # Sending and storing take their time on a busy machine.
            assert time.monotonic() - started < 3.5
            assert type(result.result).__name__ == "SoftTimeLimitExceeded"
            assert [entry.detail for entry in stand.entries("body")].count(number) == 1
            assert stand.orders(number) == []
            assert [backend.state for backend in stand.backends()].count("active") == 0
            number = next(numbers)
            assert stand.outcome(name, number).state == "SUCCESS"
            assert stand.orders(number) == [0]
        assert worker.stop() == 0


def test_a_hard_limit_kills_no_child(stand: Stand) -> None:
    """The statement ends before the limit at which Celery would kill the process, and with it whatever else it has
    open: the same child runs the next task."""
    with stand.worker(concurrency=1) as worker:
        assert stand.outcome("order", next(numbers)).state == "SUCCESS"
        children = worker.children()
        for limit in (3, 5):
            number = next(numbers)
            result = stand.outcome("order", number, "sleep in the database", 30.0, time_limit=limit)
            assert type(result.result).__name__ == "TimeLimitExceeded"
            assert stand.orders(number) == []
        assert stand.outcome("order", next(numbers)).state == "SUCCESS"
        assert worker.children() == children
        assert "Hard time limit" not in worker.log()


@pytest.mark.parametrize("pool", ["prefork", "threads"])
def test_the_workers_own_limits_count(stand: Stand, pool: str) -> None:
    """``--soft-time-limit`` is not in the message; threads would not enforce it."""
    with stand.worker(pool=pool, concurrency=1, args=["--soft-time-limit", "2"]):
        started = time.monotonic()
        result = stand.outcome("order", next(numbers), "sleep in the database", 20.0)
        assert time.monotonic() - started < 12
        assert type(result.result).__name__ == "SoftTimeLimitExceeded"


def test_an_expiry_is_no_nearer_for_being_asked_for_late(stand: Stand) -> None:
    """A message that expires in 60 s, whose body begins a request after half a second of something else."""
    with stand.worker(concurrency=1):
        assert stand.outcome("visit", "warm").state == "SUCCESS"
        sent = time.monotonic()
        remained = stand.call("late_request", 0.5, expires=60)
        left = 60 - (time.monotonic() - sent)
        # The margin is 0.1 s; the rest is for a message that waited.
        assert remained > left - 0.2


@pytest.mark.parametrize("pool", ["prefork", "threads"])
def test_a_silent_network_is_given_up_at_the_limit(stand: Stand, pool: str) -> None:
    """Database and upstream accept and drop every packet, on connections that were open: the task ends at its limit,
    where the driver waits in C and hears of no signal."""
    with (
        TcpProxy(stand.database.host, stand.database.port) as database,
        TcpProxy(stand.echo.host, stand.echo.port) as upstream,
    ):
        env = {
            "SHOP_DATABASE": stand.database.through(database).url(),
            "SHOP_STOCK": stand.database.through(database).url("psycopg"),
            "SHOP_API": f"http://{upstream.host}:{upstream.port}",
        }
        with stand.worker(pool=pool, concurrency=1, env=env):
            for name in ("visit", "stock"):
                assert stand.outcome(name, "warm").state == "SUCCESS"
            for silent, calls in (
                (database, [("order", next(numbers)), ("refill", next(numbers))]),
                (upstream, [("slow_request", 0.0)]),
            ):
                silent.blackhole()
                for name, argument in calls:
                    started = time.monotonic()
                    result = ended(stand.send(name, argument, soft_time_limit=2))
                    assert time.monotonic() - started < 8
                    assert result.state == "FAILURE"
                    # Not every exception is rebuilt by the result backend.
                    assert any(name in repr(result.result) for name in ("SoftTimeLimitExceeded", "OperationalError"))
                silent.pass_through()
                silent.close_all()
            assert stand.outcome("visit", "back").state == "SUCCESS"
