"""What a process may have open at the moment it forks."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import sqlalchemy
from sqlalchemy import text

State = Callable[[sqlalchemy.Engine], Any]


@contextmanager
def idle(engine: sqlalchemy.Engine) -> Iterator[None]:
    """A connection that lies in the pool."""
    with engine.connect() as connection:
        connection.execute(text("select 1"))
    yield


@contextmanager
def checked_out(engine: sqlalchemy.Engine) -> Iterator[None]:
    """A transaction half-way in this thread; it must still commit after the child has ended."""
    with engine.begin() as connection:
        connection.execute(text("insert into kept values (1)"))
        yield
    assert rows(engine) == 1


@contextmanager
def in_a_thread_local(engine: sqlalchemy.Engine) -> Iterator[None]:
    """A transaction half-way that only the thread-locals of another thread hold.

    CPython frees those in the child before any hook runs.
    """
    local = threading.local()
    begun, go_on = threading.Event(), threading.Event()
    failures: list[BaseException] = []

    def transaction() -> None:
        # Not an engine.connect(), which is part of a cycle and so waits for the garbage collector.
        local.connection = engine.raw_connection()
        local.connection.cursor().execute("insert into kept values (1)")
        begun.set()
        go_on.wait(60)
        try:
            local.connection.commit()
            local.connection.close()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=transaction)
    thread.start()
    begun.wait(60)
    try:
        yield
    finally:
        go_on.set()
        thread.join()
    assert not failures, failures
    assert rows(engine) == 1


@contextmanager
def detached(engine: sqlalchemy.Engine) -> Iterator[None]:
    """A connection that was taken out of its pool, with a transaction half-way."""
    connection = engine.connect()
    connection.detach()
    connection.execute(text("insert into kept values (1)"))
    yield
    connection.commit()
    connection.close()
    assert rows(engine) == 1


@contextmanager
def closing(engine: sqlalchemy.Engine) -> Iterator[None]:
    """A result that has not been read to its end, in a transaction."""
    with engine.connect() as connection:
        connection.execute(text("insert into kept values (1)"))
        result = connection.execution_options(stream_results=True).execute(text("select generate_series(1, 50000)"))
        assert result.fetchone() == (1,)
        yield
        assert len(result.fetchall()) == 49_999
        connection.commit()
    assert rows(engine) == 1


STATES: dict[str, State] = {
    state.__name__: state for state in (idle, checked_out, in_a_thread_local, detached, closing)
}


def rows(engine: sqlalchemy.Engine) -> int:
    with engine.connect() as connection:
        return int(connection.execute(text("select count(*) from kept")).scalar_one())


def make_table(engine: sqlalchemy.Engine) -> None:
    with engine.begin() as connection:
        connection.execute(text("create table if not exists kept (n int)"))
        connection.execute(text("truncate kept"))


def collect_garbage() -> None:
    """Run every finalizer that can run."""
    for _ in range(3):
        gc.collect()
