"""What a task does past its engine, through the driver's connection: bounded by the deadline, and classified."""

from __future__ import annotations

import io
import time
from collections.abc import Callable
from typing import Any

import pytest
from celery.exceptions import SoftTimeLimitExceeded
from sqlalchemy import text

from tests.support.faults import terminate_backends
from tests.support.shop import Shop, insert
from workerpools import FailureKind, classify

#: Takes rows, calls a function in between, and goes on.
Use = Callable[[Any, Callable[[], object]], object]

#: Rows of which the third takes its time, if the server is to.
_SLOW = "select n, pg_sleep(case when n = 3 then 20 else 0 end) from generate_series(1, 5) n"
_LONG = "select repeat('x', 1000) from generate_series(1, 20000) n"


class Lines:
    """A file whose second line comes after a call."""

    def __init__(self, between: Callable[[], object]) -> None:
        self.between = between
        self.count = 0

    def read(self, size: int = -1) -> bytes:
        self.count += 1
        if self.count == 2:
            self.between()
        return b"%d\n" % (100 + self.count) if self.count <= 3 else b""

    def write(self, data: bytes) -> None:
        self.count += 1
        if self.count == 2:
            self.between()


def executes(connection: Any, between: Callable[[], object]) -> None:
    with connection.cursor() as cursor:
        cursor.execute("select 1")
        between()
        cursor.execute("select pg_sleep(20)")


def copies_out(connection: Any, between: Callable[[], object]) -> None:
    with connection.cursor() as cursor:
        if hasattr(cursor, "copy_expert"):
            cursor.copy_expert(f"copy ({_LONG}) to stdout", Lines(between))
        else:
            with cursor.copy(f"copy ({_LONG}) to stdout") as copy:
                for number, _ in enumerate(copy):
                    if number == 2:
                        between()


def copies_out_slowly(connection: Any, between: Callable[[], object]) -> None:
    with connection.cursor() as cursor:
        if hasattr(cursor, "copy_expert"):
            cursor.copy_expert(f"copy ({_SLOW}) to stdout", io.StringIO())
        else:
            with cursor.copy(f"copy ({_SLOW}) to stdout") as copy:
                list(copy)


def copies_in(connection: Any, between: Callable[[], object]) -> None:
    with connection.cursor() as cursor:
        if hasattr(cursor, "copy_expert"):
            cursor.copy_expert("copy orders from stdin", Lines(between))
        else:
            with cursor.copy("copy orders from stdin") as copy:
                copy.write("7\n")
                between()
                copy.write("8\n")


def copies_in_slowly(connection: Any, between: Callable[[], object]) -> None:
    with connection.cursor() as cursor:
        cursor.execute("create temp table slow (n int check (pg_sleep(n)::text is not null))")
        if hasattr(cursor, "copy_expert"):
            cursor.copy_expert("copy slow from stdin", io.StringIO("20\n"))
        else:
            with cursor.copy("copy slow from stdin") as copy:
                copy.write("20\n")


def copies_in_from_a_thread(connection: Any, between: Callable[[], object]) -> None:
    """The driver's own thread writes."""
    from psycopg.copy import QueuedLibpqWriter

    with connection.cursor() as cursor, cursor.copy("copy orders from stdin", writer=QueuedLibpqWriter(cursor)) as copy:
        copy.write("7\n")
        between()
        for number in range(200):
            copy.write(f"{number}{' ' * 100000}\n")


def leaves_a_copy(connection: Any, between: Callable[[], object]) -> None:
    """The driver cancels the query over a connection of its own, and reads what is left."""
    with connection.cursor() as cursor, cursor.copy(f"copy ({_LONG}) to stdout") as copy:
        copy.read()
        between()
        raise ValueError("a bug")


def fetches(connection: Any, between: Callable[[], object]) -> None:
    with connection.cursor("named") as cursor:
        cursor.execute("select n from generate_series(1, 10) n")
        cursor.fetchmany(2)
        between()
        cursor.fetchmany(2)


def fetches_slowly(connection: Any, between: Callable[[], object]) -> None:
    with connection.cursor("named") as cursor:
        cursor.execute(_SLOW)
        for _ in range(5):
            cursor.fetchmany(1)


def streams(connection: Any, between: Callable[[], object]) -> None:
    with connection.cursor() as cursor:
        for number, _ in enumerate(cursor.stream(_LONG)):
            if number == 2:
                between()


def streams_slowly(connection: Any, between: Callable[[], object]) -> None:
    with connection.cursor() as cursor:
        list(cursor.stream(_SLOW))


def is_notified(connection: Any, between: Callable[[], object]) -> None:
    connection.execute("listen orders")
    between()
    list(connection.notifies())


def writes_a_large_object(connection: Any, between: Callable[[], object]) -> None:
    written = connection.lobject(0, "wb")
    written.write(b"x")
    between()
    written.write(b"y")


def opens_a_large_object(connection: Any, between: Callable[[], object]) -> None:
    number = connection.lobject(0, "wb").oid
    between()
    connection.lobject(number, "rb")


def commits(connection: Any, between: Callable[[], object]) -> None:
    connection.cursor().execute("insert into orders values (7)")
    between()
    connection.commit()


def commits_in_a_block(connection: Any, between: Callable[[], object]) -> None:
    with connection.transaction():
        connection.execute("insert into orders values (7)")
        between()


def rolls_back(connection: Any, between: Callable[[], object]) -> None:
    connection.cursor().execute("insert into orders values (7)")
    between()
    connection.rollback()


PSYCOPG2 = (opens_a_large_object, writes_a_large_object)
PSYCOPG = (
    commits_in_a_block,
    copies_in_from_a_thread,
    is_notified,
    leaves_a_copy,
    streams,
    streams_slowly,
)


def uses(*found: Use) -> Any:
    return pytest.mark.parametrize("use", found, ids=lambda use: use.__name__)


@pytest.fixture(autouse=True)
def _has_it(shop: Shop, request: pytest.FixtureRequest) -> None:
    use = request.node.callspec.params.get("use")
    if (shop.driver == "psycopg2" and use in PSYCOPG) or (shop.driver == "psycopg" and use in PSYCOPG2):
        pytest.skip("the driver has no such method")


@uses(executes, copies_out_slowly, copies_in_slowly, fetches_slowly, streams_slowly, is_notified)
def test_the_deadline_ends_what_takes_too_long(shop: Shop, use: Use) -> None:
    """The server does, or the watchdog where it has nothing to end; the task fails with its own time limit."""
    runs = []

    @shop.task(soft_time_limit=1.0)
    def task(self: Any) -> None:
        runs.append(1)
        insert(self.session, 1)
        use(self.session.connection().connection.dbapi_connection, lambda: None)

    started = time.monotonic()
    with pytest.raises(SoftTimeLimitExceeded):
        task.apply().get()
    assert 0.5 < time.monotonic() - started < 2.0
    assert (len(runs), shop.rows(), shop.checked_out()) == (1, [], 0)


@uses(
    executes,
    copies_out,
    copies_in,
    copies_in_from_a_thread,
    fetches,
    streams,
    is_notified,
    writes_a_large_object,
    opens_a_large_object,
    commits_in_a_block,
    rolls_back,
)
def test_the_deadline_ends_waits_for_a_silent_server(shop: Shop, use: Use) -> None:
    """It is alive and says nothing: the socket is shut down, and the task fails with its own time limit."""

    @shop.task(soft_time_limit=1.0)
    def task(self: Any) -> None:
        insert(self.session, 1)
        use(self.session.connection().connection.dbapi_connection, shop.proxy.blackhole)

    started = time.monotonic()
    with pytest.raises(SoftTimeLimitExceeded):
        task.apply().get()
    assert 0.5 < time.monotonic() - started < 2.5
    shop.proxy.pass_through()
    assert (shop.rows(), shop.checked_out()) == ([], 0)


@uses(leaves_a_copy)
def test_a_body_that_fails_meanwhile_does_not_wait_for_a_silent_server(shop: Shop, use: Use) -> None:
    """Its own error comes out."""

    @shop.task(soft_time_limit=1.0)
    def task(self: Any) -> None:
        use(self.session.connection().connection.dbapi_connection, shop.proxy.blackhole)

    started = time.monotonic()
    with pytest.raises(ValueError, match="a bug"):
        task.apply().get()
    assert time.monotonic() - started < 3.5


@uses(executes, copies_out, copies_in, copies_in_from_a_thread, fetches, streams, opens_a_large_object, rolls_back)
def test_a_lost_connection_is_replayed(shop: Shop, use: Use) -> None:
    """It was lost before COMMIT: nothing was applied."""
    runs = []

    @shop.task()
    def task(self: Any) -> None:
        runs.append(1)
        insert(self.session, 1)
        if len(runs) == 1:
            use(self.session.connection().connection.dbapi_connection, lambda: terminate_backends(shop.database))

    task.apply().get()
    assert (len(runs), shop.rows(), shop.checked_out()) == (2, [1], 0)


@uses(commits, commits_in_a_block)
@pytest.mark.parametrize("after", [False, True], ids=["COMMIT lost", "acknowledgement lost"])
def test_a_lost_commit_is_indeterminate(shop: Shop, use: Use, after: bool) -> None:
    """Nobody noted its transaction's id, so that it cannot be resolved."""
    runs = []

    def cut() -> None:
        shop.proxy.cut_when(lambda chunk: b"COMMIT" in chunk, deliver=after)

    @shop.task()
    def task(self: Any) -> None:
        runs.append(1)
        connection = self.session.connection().connection.dbapi_connection
        use(connection, cut)

    with pytest.raises(Exception, match=r"closed|lost|terminat") as caught:
        task.apply().get()
    failure = classify(caught.value)
    assert failure is not None
    assert failure.kind is FailureKind.INDETERMINATE
    assert (len(runs), shop.rows()) == (1, [7] if after else [])


def test_a_wait_that_found_nothing_is_no_effect(shop: Shop) -> None:
    """Until it times out, as its caller wants it to; what follows is replayed."""
    if shop.driver == "psycopg2":
        pytest.skip("the driver has no such method")
    runs = []

    @shop.task(soft_time_limit=60)
    def task(self: Any) -> None:
        runs.append(1)
        connection = self.session.connection().connection.dbapi_connection
        connection.execute("listen orders")
        assert list(connection.notifies(timeout=0.1)) == []
        if len(runs) == 1:
            terminate_backends(shop.database)
        insert(self.session, 1)

    task.apply().get()
    assert (len(runs), shop.rows()) == (2, [1])


@uses(executes, copies_out_slowly, commits)
def test_a_raw_connection_is_bounded(shop: Shop, use: Use) -> None:
    """It may have committed, unseen: nothing runs again, and a lost COMMIT stays what it is."""

    @shop.task(soft_time_limit=1.0)
    def task(self: Any) -> None:
        connection = self.db.raw_connection()
        try:
            use(connection.dbapi_connection, shop.proxy.blackhole if use is commits else lambda: None)
        finally:
            connection.close()

    started = time.monotonic()
    with pytest.raises(Exception, match=r"closed|lost|terminat|SoftTimeLimit") as caught:
        task.apply().get()
    assert 0.5 < time.monotonic() - started < 3.5
    failure = classify(caught.value)
    assert (failure and failure.kind) == (FailureKind.INDETERMINATE if use is commits else None)
    assert isinstance(caught.value, SoftTimeLimitExceeded) == (use is not commits)
    assert shop.checked_out() == 0


def test_a_server_that_is_no_longer_the_primary_is_left(shop: Shop) -> None:
    """The replay has a new connection, which reaches the new one."""
    runs = []
    name = shop.database.name
    shop.database.execute(f"alter database {name} set default_transaction_read_only to on")
    shop.engine.close()

    @shop.task()
    def task(self: Any) -> None:
        runs.append(1)
        connection = self.session.connection().connection.dbapi_connection
        if len(runs) == 1:
            shop.database.execute(
                f"begin read write; alter database {name} reset default_transaction_read_only; commit"
            )
        connection.cursor().execute("insert into orders values (1)")

    task.apply().get()
    assert (len(runs), shop.rows()) == (2, [1])


def test_a_large_object_that_was_committed_is_an_effect(shop: Shop) -> None:
    """Nothing but its methods has begun the driver's transaction."""
    if shop.driver == "psycopg":
        pytest.skip("the driver has no such method")
    runs = []

    @shop.task()
    def task(self: Any) -> None:
        runs.append(1)
        connection = self.db.raw_connection()
        connection.dbapi_connection.lobject(0, "wb").write(b"x")
        connection.commit()
        connection.close()
        self.session.execute(text("select 1"))
        terminate_backends(shop.database)
        insert(self.session, 1)

    with pytest.raises(Exception, match=r"closed|lost|terminat"):
        task.apply().get()
    assert len(runs) == 1
    assert len(shop.database.execute("select 1 from pg_largeobject_metadata")) == 1


def test_a_caught_error_of_a_lost_commit_is_an_effect(shop: Shop) -> None:
    """The body goes on, and its next connection is lost in a way that could be replayed."""
    runs = []

    @shop.task()
    def task(self: Any) -> None:
        runs.append(1)
        connection = self.session.connection().connection.dbapi_connection
        shop.proxy.cut_when(lambda chunk: b"COMMIT" in chunk, deliver=True)
        with pytest.raises(Exception, match=r"closed|lost|terminat"):
            commits(connection, lambda: None)
        self.session.rollback()
        self.session.execute(text("select 1"))
        terminate_backends(shop.database)
        insert(self.session, 2)

    with pytest.raises(Exception, match=r"closed|lost|terminat"):
        task.apply().get()
    assert (len(runs), shop.rows()) == (1, [7])
