"""What something else than the server ends in the middle: a signal, an error that is not the driver's."""

from __future__ import annotations

import select
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest
from celery.exceptions import SoftTimeLimitExceeded
from sqlalchemy import event, text
from sqlalchemy.exc import DBAPIError

from tests.support.databases import Database
from tests.support.faults import terminate_backends
from tests.support.shop import Shop, insert
from tests.support.stand import wait_until
from workerpools._run import attempts
from workerpools._run.attempts import Attempt

LIMIT = 1.2


@contextmanager
def interrupted_asleep(database: Database) -> Iterator[None]:
    """Raise SoftTimeLimitExceeded here, by a signal as Celery's execution pool does, once the server sleeps."""

    def interrupt(*_: object) -> None:
        raise SoftTimeLimitExceeded

    def strike() -> None:
        wait_until(lambda: database.execute(_ASLEEP), "pg_sleep")
        signal.pthread_kill(thread, signal.SIGALRM)

    thread = threading.get_ident()
    before = signal.signal(signal.SIGALRM, interrupt)
    striker = threading.Thread(target=strike)
    striker.start()
    try:
        yield
    finally:
        striker.join()
        signal.signal(signal.SIGALRM, before)


_ASLEEP = "select 1 from pg_stat_activity where wait_event = 'PgSleep' and datname = current_database()"


def _interrupted(connection: Any, database: Database) -> None:
    with interrupted_asleep(database):
        connection.exec_driver_sql("select pg_sleep(0.4)")


def _wrong_parameters(connection: Any, database: Database) -> None:
    connection.exec_driver_sql("select %s", ("one", "two"))


def _refused_by_a_listener(connection: Any, database: Database) -> None:
    def refuse(*_: object) -> None:
        raise ValueError("not this one")

    event.listen(connection.engine, "before_cursor_execute", refuse)
    try:
        connection.exec_driver_sql("select 1")
    finally:
        event.remove(connection.engine, "before_cursor_execute", refuse)


@pytest.mark.parametrize("how", [_interrupted, _wrong_parameters, _refused_by_a_listener])
@pytest.mark.parametrize("then", ["kept", "returned", "closed"])
def test_a_statement_that_has_ended_is_not_watched_any_more(shop: Shop, how: Any, then: str) -> None:
    """Beyond the deadline of the task neither its connection is shut down, which may serve another task by then, nor
    whatever has the descriptor of the connection if that was closed."""
    opened = []

    @shop.task(soft_time_limit=LIMIT)
    def task(self: Any) -> float:
        connection = self.db.connect()
        connection.exec_driver_sql("select 1")
        with suppress(SoftTimeLimitExceeded, TypeError, ValueError, DBAPIError):
            how(connection, shop.database)
        # psycopg 3 has given an interrupted connection up in the middle.
        with suppress(DBAPIError):
            connection.rollback()
        if then != "kept":
            connection.close()
            connection = None
        if then == "closed":
            self.db.dispose()
        # The next connection gets the descriptor of the one that was closed.
        late = connection or self.db.connect()
        # An interrupted one is replaced here; and what is left in use would be given back at the attempt's end.
        assert late.connection
        late.detach()
        opened.append(late)
        remaining = self.deadline.remaining()
        assert remaining is not None
        return remaining

    remaining = task.apply().get()
    # A second is more than the slack and the grace of the watchdog together.
    time.sleep(remaining + 1.0)
    with opened.pop() as connection:
        socket = connection.connection.dbapi_connection
        # One that was shut down has something to read: its end.
        assert select.select([socket.fileno()], [], [], 0)[0] == []
        assert connection.scalar(text("select 1")) == 1


def test_a_commit_that_was_interrupted_may_have_been_done(shop: Shop) -> None:
    """It stays an effect, whatever the body makes of the interruption: nothing is replayed after it."""
    shop.database.execute(
        "create function slow() returns trigger language plpgsql as 'begin perform pg_sleep(0.5); return null; end'"
    )
    shop.database.execute(
        "create constraint trigger slow after insert on orders deferrable initially deferred "
        "for each row when (new.id = 1) execute function slow()"
    )
    runs: list[int] = []

    @shop.task()
    def task(self: Any) -> None:
        runs.append(1)
        insert(self.session, len(runs))
        with suppress(SoftTimeLimitExceeded), interrupted_asleep(shop.database):
            self.session.commit()
        # psycopg 3 has given the connection up in the middle.
        with suppress(DBAPIError):
            self.session.rollback()
        self.session.connection()
        terminate_backends(shop.database)
        insert(self.session, 10)

    with pytest.raises(DBAPIError):
        task()
    assert len(runs) == 1


@pytest.mark.parametrize("step", range(5))
def test_an_attempt_that_was_interrupted_as_it_ended_owns_nothing_of_later_ones(shop: Shop, step: int) -> None:
    """A time limit strikes in the very last steps of an attempt: what the next task of the process does is committed,
    and the deadline is its own."""

    def strike(frame: Any, happened: str, _: object) -> Any:
        nonlocal step
        if frame.f_code is Attempt.end.__code__:
            if step == 0:
                sys.settrace(before)
                raise SoftTimeLimitExceeded
            step -= 1
        return strike

    @shop.task(soft_time_limit=0.2)
    def task(self: Any, number: int) -> float | None:
        insert(self.session, number)
        return self.deadline.remaining()

    before = sys.gettrace()
    sys.settrace(strike)
    try:
        result = task.apply((1,))
    finally:
        sys.settrace(before)
    assert isinstance(result.result, SoftTimeLimitExceeded)
    assert attempts.current() is None
    assert attempts.running() == []
    time.sleep(0.2)
    assert task(2) is None
    assert shop.rows() == [1, 2]
