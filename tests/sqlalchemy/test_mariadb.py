"""On a real MariaDB: lost connections, lost COMMITs, and transactions that the server gives up."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import sqlalchemy
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError, OperationalError

from tests.sqlalchemy.mariadb import LATE, SESSION, kind_of
from tests.support.mariadb import MariaDatabase, MariaDBServer
from tests.support.shop import Shop, insert
from workerpools import FailureKind
from workerpools.sqlalchemy import SQLAlchemyEngine, TaskSession

# Lost connections.


@pytest.mark.parametrize("check_after", [None, 0.0], ids=["trusted", "checked"])
def test_a_connection_killed_in_the_pool_costs_nothing(maria_shop: Shop, check_after: float | None) -> None:
    """Trusted: the body runs again at once. Checked: it is replaced before. Its work is there once."""
    _, base = maria_shop.another(check_after=check_after)
    runs: list[int] = []

    @maria_shop.task(base=base)
    def task(self: Any, number: int) -> str:
        runs.append(number)
        insert(self.session, number)
        return "done"

    task(0)
    assert maria_shop.database.kill_sessions() >= 1
    assert task(1) == "done"
    assert runs == ([0, 1, 1] if check_after is None else [0, 1])
    assert maria_shop.rows() == [0, 1]


def test_a_transaction_that_was_killed_half_way_is_replayed_whole(maria_shop: Shop) -> None:
    """What the lost transaction did is undone by the server, so that the whole body runs again."""
    runs: list[int] = []

    @maria_shop.task()
    def task(self: Any) -> None:
        runs.append(1)
        insert(self.session, 1)
        if len(runs) == 1:
            maria_shop.database.kill_sessions()
        insert(self.session, 2)

    task()
    assert len(runs) == 2
    assert maria_shop.rows() == [1, 2]


def test_a_transaction_that_is_killed_in_a_statement_is_replayed_whole(maria_shop: Shop) -> None:
    """The server says so itself, with error 1927, or ends the connection: the same thing either way."""
    runs: list[int] = []

    @maria_shop.task()
    def task(self: Any) -> None:
        runs.append(1)
        insert(self.session, 1)
        if len(runs) == 1:
            self.session.execute(text("select sleep(60)"))

    def kill() -> None:
        wait_until(lambda: running("select sleep(60)") == 1)
        maria_shop.database.kill_sessions()

    def running(statement: str) -> Any:
        asked = "select count(*) from information_schema.processlist where info = %s and state = 'User sleep'"
        return maria_shop.database.execute(asked, statement)[0][0]

    with in_a_thread(kill):
        task()
    assert len(runs) == 2
    assert maria_shop.rows() == [1]


def test_nothing_is_replayed_after_a_statement_that_commits(maria_shop: Shop) -> None:
    """Without the word: CREATE TABLE has committed what was done before it."""
    runs: list[int] = []

    @maria_shop.task()
    def task(self: Any) -> None:
        runs.append(1)
        insert(self.session, len(runs))
        self.session.execute(text("create table if not exists notes (id int)"))
        maria_shop.database.kill_sessions()
        insert(self.session, 10)

    with pytest.raises(DBAPIError):
        task()
    assert len(runs) == 1
    assert maria_shop.rows() == [1]


def test_a_lost_statement_in_autocommit_is_raised(maria_shop: Shop) -> None:
    """The reply was lost, the row is there: nobody may insert it again."""
    runs: list[int] = []

    @maria_shop.task()
    def task(self: Any) -> None:
        runs.append(1)
        with self.db.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.execute(text("select 1"))
            maria_shop.proxy.cut_when(lambda chunk: b"insert into" in chunk.lower(), deliver=True, reply_wait=LATE)
            insert(connection, len(runs))

    with pytest.raises(DBAPIError) as caught:
        task()
    assert len(runs) == 1
    assert kind_of(caught.value) is FailureKind.INDETERMINATE
    assert maria_shop.rows() == [1]


@pytest.mark.parametrize("idempotent", [False, True], ids=["", "idempotent"])
@pytest.mark.parametrize("deliver", [False, True], ids=["server never got it", "server got it"])
def test_a_lost_commit_is_raised(maria_shop: Shop, deliver: bool, idempotent: bool) -> None:
    """MariaDB cannot be asked what became of a transaction: only an idempotent task runs again."""
    runs: list[int] = []

    @maria_shop.task(idempotent=idempotent)
    def task(self: Any) -> None:
        runs.append(1)
        insert(self.session, len(runs))

    maria_shop.proxy.cut_when(lambda chunk: b"COMMIT" in chunk, deliver=deliver, reply_wait=LATE)
    if idempotent:
        task()
        assert maria_shop.rows() == ([1, 2] if deliver else [2])
        return
    with pytest.raises(DBAPIError) as caught:
        task()
    assert len(runs) == 1
    assert kind_of(caught.value) is FailureKind.INDETERMINATE
    assert any("Not run again: it may have been done" in note for note in caught.value.__notes__)
    assert maria_shop.rows() == ([1] if deliver else [])


# Transactions that the server gives up.


def test_a_deadlock_is_replayed(maria_shop: Shop) -> None:
    """Error 1213: the server has rolled the whole transaction back."""
    maria_shop.database.execute("create table stock (id int primary key, amount int)")
    maria_shop.database.execute("insert into stock select seq, 0 from seq_1_to_50")
    runs: list[int] = []
    take = text("update stock set amount = amount + 1 where id = :id")

    with sqlalchemy.create_engine(maria_shop.database.url()).connect() as other:
        # The server gives up the transaction that has changed less.
        other.execute(text("update stock set amount = amount + 1 where id > 1"))

        def cross() -> None:
            other.execute(take, {"id": 1})
            other.commit()

        @maria_shop.task()
        def task(self: Any) -> None:
            runs.append(1)
            insert(self.session, 1)
            self.session.execute(take, {"id": 1})
            if len(runs) == 1:
                thread.start()
                wait_until(lambda: lock_waits(maria_shop.database) == 1)
            self.session.execute(take, {"id": 2})

        thread = threading.Thread(target=cross)
        task()
        thread.join()
    assert len(runs) == 2
    assert maria_shop.rows() == [1]
    assert maria_shop.database.execute("select amount from stock where id < 3") == [(2,), (2,)]


def test_a_lock_that_did_not_come_free_in_time_is_replayed(maria_shop: Shop) -> None:
    """Error 1205: the server has undone the statement alone, and the attempt undoes the rest."""
    maria_shop.database.execute("create table stock (id int primary key, amount int)")
    maria_shop.database.execute("insert into stock values (1, 0)")
    _, base = maria_shop.another(connect_args={"init_command": "set session innodb_lock_wait_timeout = 1"})
    runs: list[int] = []
    take = text("update stock set amount = amount + 1 where id = 1")

    with sqlalchemy.create_engine(maria_shop.database.url()).connect() as other:
        other.execute(take)

        @maria_shop.task(base=base)
        def task(self: Any) -> None:
            runs.append(1)
            insert(self.session, 1)
            if len(runs) == 2:
                other.commit()
            self.session.execute(take)

        task()
    assert len(runs) == 2
    assert maria_shop.rows() == [1]
    assert maria_shop.database.execute("select amount from stock") == [(2,)]


def test_a_server_that_is_read_only_is_left(maria_shop: Shop, mariadb_server: MariaDBServer) -> None:
    """Error 1290, to a user who may not write then: the connection is thrown away, and the body runs again."""
    root = mariadb_server.maintenance
    user, name = f"app_{maria_shop.database.name}", maria_shop.database.name
    root.execute(f"create user {user}@'127.0.0.1' identified by 'secret'")
    root.execute(f"grant all on {name}.* to {user}@'127.0.0.1'")
    url = sqlalchemy.make_url(maria_shop.database.url(maria_shop.driver)).set(username=user, password="secret")
    engine = maria_shop.pools.add(SQLAlchemyEngine(url), name="app")
    sessions: list[int] = []

    @maria_shop.task(base=type("App", (maria_shop.base,), {"abstract": True, "session": TaskSession(engine)}))
    def task(self: Any) -> None:
        sessions.append(self.session.scalar(SESSION))
        if len(sessions) == 2:
            root.execute("set global read_only = off")
        insert(self.session, 1)

    try:
        root.execute("set global read_only = on")
        task()
    finally:
        root.execute("set global read_only = off")
        engine.close()
        root.execute(f"drop user {user}@'127.0.0.1'")
    assert len(set(sessions)) == 2
    assert maria_shop.rows() == [1]


def test_what_cannot_be_connected_to_is_told_apart(maria_shop: Shop) -> None:
    """A wrong password and an unknown database stay wrong; a server that is down comes back."""
    good = sqlalchemy.make_url(maria_shop.database.through(maria_shop.proxy).url(maria_shop.driver))
    maria_shop.engine.close()
    expected = {
        good.set(password="wrong"): FailureKind.PERMANENT,
        good.set(database="nowhere"): FailureKind.PERMANENT,
        good: FailureKind.UNAVAILABLE,
    }
    for number, (url, kind) in enumerate(expected.items()):
        if url is good:
            maria_shop.proxy.stop()
        engine = maria_shop.pools.add(SQLAlchemyEngine(url), name=f"wrong {number}")
        with pytest.raises(OperationalError) as caught:
            engine.get().connect()
        assert kind_of(caught.value) is kind, url


def lock_waits(database: MariaDatabase) -> Any:
    asked = "select count(*) from information_schema.innodb_trx where trx_state = 'LOCK WAIT'"
    return database.execute(asked)[0][0]


def wait_until(reached: Callable[[], bool]) -> None:
    end = time.monotonic() + LATE
    while not reached():
        if time.monotonic() > end:
            raise TimeoutError("it has not come to pass")
        time.sleep(0.05)


@contextmanager
def in_a_thread(function: Callable[[], None]) -> Iterator[None]:
    """Run something beside the block; what it raises is raised at the end."""
    failures: list[BaseException] = []

    def run() -> None:
        try:
            function()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        thread.join()
    assert not failures, failures
