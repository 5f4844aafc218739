"""What a body wrote is committed before anybody hears of its end, or not at all."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import closing
from importlib.metadata import version
from itertools import count

import pytest
from packaging.version import Version

from tests.support.stand import PATIENCE, Stand, ended, wait_until
from tests.support.worker import WorkerProcess

pytestmark = pytest.mark.worker

#: The number of an order whose COMMIT waits until the test lets it go, and of one whose COMMIT fails.
HELD = 4242
REFUSED = 6666

TRIGGER = f"""
create function at_commit() returns trigger language plpgsql as $$
begin
    if new.number = {HELD} then perform pg_advisory_xact_lock({HELD}); end if;
    if new.number = {REFUSED} then raise exception 'refused at commit'; end if;
    return null;
end $$;
create constraint trigger at_commit after insert on orders
    deferrable initially deferred for each row execute function at_commit();
"""

numbers = count(1)


@pytest.fixture(scope="module")
def worker(shared: Stand) -> Iterator[WorkerProcess]:
    shared.database.execute(TRIGGER)
    with shared.worker(concurrency=2, conf={"task_acks_late": True}) as started:
        yield started


@pytest.fixture(params=["order", "refill"])
def name(request: pytest.FixtureRequest) -> str:
    """The task that writes: by way of psycopg2, or of psycopg 3."""
    return str(request.param)


def all_idle(stand: Stand) -> bool:
    """Whether no connection of the worker is in a transaction."""
    return {backend.state for backend in stand.backends()} <= {"idle"}


def serves(stand: Stand, worker: WorkerProcess) -> None:
    """The worker comes to have two children, a lost one replaced, each with a connection of its own."""

    def both_answer() -> bool:
        answers = [result.get(timeout=PATIENCE) for result in [stand.send("visit", f"token-{n}") for n in range(8)]]
        children = worker.children()
        return len(children) == 2 and {answer["pid"] for answer in answers} == set(children)

    wait_until(both_answer, "two children that serve")


def unacknowledged(stand: Stand) -> int:
    """How many messages the broker would deliver again if the worker died now."""
    import redis

    with closing(redis.Redis.from_url(stand.broker_url)) as broker:
        return int(broker.hlen("unacked"))


def test_committed_before_the_result_is_stored_and_the_message_acknowledged(
    shared: Stand, worker: WorkerProcess, name: str
) -> None:
    """While COMMIT is under way the task has no result and its message is still the worker's to lose; when the result
    is there, the row is."""
    import psycopg2

    before = len(shared.orders(HELD))
    wait_until(lambda: unacknowledged(shared) == 0, "every message to be acknowledged")
    with closing(psycopg2.connect(shared.database.dsn)) as holder, holder.cursor() as cursor:
        cursor.execute("select pg_advisory_lock(%s)", (HELD,))
        result = shared.send(name, HELD)
        wait_until(
            lambda: shared.database.execute(
                "select 1 from pg_stat_activity where datname = %s and wait_event = 'advisory' and query = 'COMMIT'",
                shared.database.name,
            ),
            "the worker to wait in COMMIT",
        )
        assert result.state == "PENDING"
        assert unacknowledged(shared) == 1
        assert len(shared.orders(HELD)) == before
    result.get(timeout=PATIENCE)
    assert len(shared.orders(HELD)) == before + 1
    wait_until(lambda: unacknowledged(shared) == 0, "the message to be acknowledged")


def test_a_commit_that_fails_fails_the_task(shared: Stand, worker: WorkerProcess, name: str) -> None:
    """The driver's error is the task's, although the body has returned; the connection goes back clean."""
    result = shared.outcome(name, REFUSED)
    assert result.state == "FAILURE"
    assert "refused at commit" in str(result.result)
    assert shared.orders(REFUSED) == []
    assert all_idle(shared)


@pytest.mark.parametrize("ending", ["return", "fail", "ignore", "reject"])
def test_only_a_body_that_returns_leaves_its_row(shared: Stand, worker: WorkerProcess, name: str, ending: str) -> None:
    """An exception, Ignore and Reject undo what the body wrote, and give the connection back clean."""
    number = next(numbers)
    result = shared.send(name, number, ending)
    shared.wait_for_entry("order", number)
    # Not by the result: for Ignore, and for Reject until Celery 5.7, none is stored.
    wait_until(lambda: unacknowledged(shared) == 0, "the message to be acknowledged")
    assert all_idle(shared)
    assert shared.orders(number) == ([0] if ending == "return" else [])
    assert [entry.detail for entry in shared.entries("body")].count(number) == 1
    if ending in ("return", "fail"):
        assert ended(result).state == {"return": "SUCCESS", "fail": "FAILURE"}[ending]


def test_a_retried_run_commits_what_it_wrote_itself(shared: Stand, worker: WorkerProcess, name: str) -> None:
    """Retry undoes what its run wrote; the run after it commits: one row, of the second run."""
    number = next(numbers)
    shared.call(name, number, "retry")
    assert shared.orders(number) == [1]
    assert [entry.detail for entry in shared.entries("body")].count(number) == 2
    assert all_idle(shared)


@pytest.mark.parametrize("ending", ["sleep", "sleep in the database"])
def test_a_soft_time_limit_undoes_the_body(shared: Stand, worker: WorkerProcess, name: str, ending: str) -> None:
    """The limit is the task's failure, even where the driver's clean-up hides it behind an error of its own: then the
    limit is still in the traceback. The body is not run again, no row stays and no transaction is left open."""
    number = next(numbers)
    # psycopg2 waits for the end of its query before it lets the signal's handler run.
    result = shared.outcome(name, number, ending, 2.5 if "database" in ending else 60, soft_time_limit=1)
    assert result.state == "FAILURE"
    assert "SoftTimeLimitExceeded" in result.traceback
    if (name, ending) != ("refill", "sleep in the database"):
        assert type(result.result).__name__ == "SoftTimeLimitExceeded"
    assert [entry.detail for entry in shared.entries("body")].count(number) == 1
    assert shared.orders(number) == []
    wait_until(lambda: all_idle(shared), "no connection in a transaction")
    serves(shared, worker)


@pytest.mark.parametrize("ending", ["sleep", "sleep in the database"])
def test_a_hard_time_limit_leaves_no_row(shared: Stand, worker: WorkerProcess, ending: str) -> None:
    """Whatever ends the body, the row is gone; a child that was killed with its transaction open is replaced by one
    with a connection of its own."""
    number = next(numbers)
    children = set(worker.children())
    # The server does not notice that its client was killed before the query's end.
    seconds = 3 if "database" in ending else 60
    result = shared.outcome("order", number, ending, seconds, time_limit=1)
    assert type(result.result).__name__ == "TimeLimitExceeded"
    wait_until(lambda: all_idle(shared), "no connection in a transaction")
    assert shared.orders(number) == []
    serves(shared, worker)
    # The query was ended at the deadline, before the child had to be.
    assert len(children & set(worker.children())) == (2 if "database" in ending else 1)


def test_a_revoked_body_leaves_no_row(shared: Stand, worker: WorkerProcess, name: str) -> None:
    """revoke(terminate=True) ends the body in the middle of its transaction."""
    number = next(numbers)
    result = shared.send(name, number, "sleep", 60)
    shared.wait_for_entry("order", number)
    shared.client.control.revoke(result.id, terminate=True)
    assert ended(result).state == "REVOKED"
    wait_until(lambda: all_idle(shared), "no connection in a transaction")
    assert shared.orders(number) == []
    serves(shared, worker)


def test_a_body_that_asks_to_exit_leaves_no_row(shared: Stand, worker: WorkerProcess, name: str) -> None:
    """SystemExit undoes what the body wrote and ends the child; its message is acknowledged."""
    number = next(numbers)
    result = shared.send(name, number, "exit")
    shared.wait_for_entry("order", number)
    wait_until(lambda: unacknowledged(shared) == 0, "the message to be acknowledged")
    if Version(version("celery")) < Version("5.7") and Version(version("billiard")) >= Version("4.3"):
        # Billiard hands on the SystemExit itself since 4.3, which Celery 5.6 cannot store: docs/versions.md.
        assert result.state == "PENDING"
    else:
        assert type(ended(result).result).__name__ == "WorkerLostError"
    wait_until(lambda: all_idle(shared), "no connection in a transaction")
    assert shared.orders(number) == []
    serves(shared, worker)


def test_a_killed_child_leaves_no_row(shared: Stand, worker: WorkerProcess, name: str) -> None:
    """SIGKILL in the middle of a transaction: the row is gone, and a new child serves."""
    number = next(numbers)
    result = shared.send(name, number, "sleep", 60)
    shared.wait_for_entry("order", number)
    (victim,) = (entry.pid for entry in shared.entries("order") if entry.detail == number)
    os.kill(victim, signal.SIGKILL)
    assert type(ended(result).result).__name__ == "WorkerLostError"
    wait_until(lambda: all_idle(shared), "no connection in a transaction")
    assert shared.orders(number) == []
    serves(shared, worker)
    assert victim not in worker.children()
