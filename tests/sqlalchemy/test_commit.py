"""A COMMIT whose acknowledgement was lost: the database is asked what became of it."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
import sqlalchemy
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError, IllegalStateChangeError, OperationalError
from sqlalchemy.orm import Session

from tests.support.databases import Database
from tests.support.shop import Shop, insert
from workerpools import FailureKind, classify
from workerpools.events import EventKind
from workerpools.sqlalchemy import SQLAlchemyEngine, TaskSession

DELIVERED = pytest.mark.parametrize("deliver", [False, True], ids=["server never got it", "server got it"])


def lose_commit(shop: Shop, *, deliver: bool, how: Any = "fin", wait: float = 1.0) -> Any:
    return shop.proxy.cut_when(lambda chunk: b"COMMIT" in chunk, deliver=deliver, how=how, reply_wait=wait)


def resolved(shop: Shop) -> list[str]:
    return [event.detail for event in shop.events if event.kind is EventKind.COMMIT_RESOLVED]


@DELIVERED
@pytest.mark.parametrize("how", ["fin", "rst"])
def test_a_lost_commit_is_resolved(shop: Shop, deliver: bool, how: str) -> None:
    """Committed: the task has succeeded and its body does not run again. Aborted: it runs again. One row either way."""
    runs: list[int] = []

    @shop.task()
    def task(self: Any) -> str:
        runs.append(1)
        insert(self.session, 1)
        return "done"

    cut = lose_commit(shop, deliver=deliver, how=how)
    assert task() == "done"
    assert cut.fired == 1
    assert len(runs) == (1 if deliver else 2)
    assert shop.rows() == [1]
    assert resolved(shop) == ["outcome=committed" if deliver else "outcome=aborted"]
    assert shop.replays() == (0 if deliver else 1)
    assert shop.checked_out() == 0


@DELIVERED
@pytest.mark.parametrize("how", ["session.commit()", "engine.begin()", "connection.commit()"])
def test_every_commit_of_the_engine_is_resolved(shop: Shop, deliver: bool, how: str) -> None:
    """The body's own one too; where it was committed, the body goes on with a fresh connection."""
    runs: list[int] = []

    @shop.task()
    def task(self: Any) -> str:
        runs.append(1)
        if how == "session.commit()":
            insert(self.session, 1)
            self.session.commit()
            assert self.session.scalar(text("select count(*) from orders")) == 1
        elif how == "engine.begin()":
            with self.db.begin() as connection:
                insert(connection, 1)
        else:
            with self.db.connect() as connection:
                insert(connection, 1)
                connection.commit()
                assert connection.scalar(text("select count(*) from orders")) == 1
        insert(self.session, 2)
        return "done"

    lose_commit(shop, deliver=deliver)
    assert task() == "done"
    assert len(runs) == (1 if deliver else 2)
    assert shop.rows() == [1, 2]


@DELIVERED
def test_a_transaction_that_wrote_nothing_has_nothing_to_lose(shop: Shop, deliver: bool) -> None:
    """It has no id, and its reads were complete: the task has succeeded."""
    runs: list[int] = []

    @shop.task()
    def task(self: Any) -> int:
        runs.append(1)
        return int(self.session.scalar(text("select 7")))

    lose_commit(shop, deliver=deliver)
    assert task() == 7
    assert len(runs) == 1
    assert task() == 7


@DELIVERED
@pytest.mark.parametrize("anew", ["", "set transaction read write", "set transaction_read_only = off"])
def test_a_read_only_transaction_is_not_asked_for_its_id(shop: Shop, deliver: bool, anew: str) -> None:
    """The server lets it write nothing: COMMIT costs no round trip more. Not so if a statement took that back."""
    runs: list[int] = []
    asked: list[bytes] = []

    def is_commit(chunk: bytes) -> bool:
        if b"pg_current_xact_id" in chunk:
            asked.append(chunk)
        return b"COMMIT" in chunk

    @shop.task()
    def task(self: Any) -> None:
        runs.append(1)
        self.session.connection(execution_options={"postgresql_readonly": True})
        if anew:
            self.session.execute(text(anew))
            insert(self.session, 1)
        else:
            self.session.execute(text("select 7"))

    cut = shop.proxy.cut_when(is_commit, deliver=deliver)
    task()
    assert cut.fired == 1
    assert len(runs) == (1 if deliver or not anew else 2)
    assert shop.rows() == ([1] if anew else [])
    assert bool(asked) == bool(anew)


def test_a_read_that_was_committed_is_no_effect(shop: Shop) -> None:
    """A body that ended its reading transaction itself may still be replayed."""
    runs: list[int] = []

    @shop.task()
    def task(self: Any) -> tuple[Any, ...]:
        runs.append(1)
        self.session.scalar(text("select 7"))
        self.session.commit()
        if len(runs) == 1:
            shop.proxy.close_all()
        insert(self.session, 1)
        return tuple(self.effects)

    assert task() == ()
    assert len(runs) == 2
    assert shop.rows() == [1]


def slow_commit(shop: Shop, seconds: float) -> None:
    """Have each COMMIT of a write take so long, in a deferred trigger, whether or not anybody waits for it."""
    body = f"begin perform pg_sleep({seconds}); return null; end"
    shop.database.execute(f"create function nap() returns trigger language plpgsql as '{body}'")
    shop.database.execute(
        "create constraint trigger nap after insert on orders deferrable initially deferred"
        " for each row execute function nap()"
    )


def test_a_commit_in_progress_is_waited_for(shop: Shop) -> None:
    """The server is still at it when it is asked: its answer is waited for."""
    slow_commit(shop, 0.6)
    runs: list[int] = []

    @shop.task()
    def task(self: Any) -> None:
        runs.append(1)
        insert(self.session, 1)

    lose_commit(shop, deliver=True, wait=0.1)
    task()
    assert len(runs) == 1
    assert shop.rows() == [1]
    assert resolved(shop) == ["outcome=committed"]


def test_a_commit_that_stays_in_progress_is_ended(shop: Shop) -> None:
    """Its session is ours, and nobody reads its answer: it is terminated, and then it is known that it was not done."""
    slow_commit(shop, 45)
    runs: list[int] = []

    @shop.task()
    def task(self: Any) -> None:
        runs.append(1)
        if len(runs) == 2:
            self.session.execute(text("alter table orders disable trigger nap"))
        insert(self.session, 1)

    lose_commit(shop, deliver=True, wait=0.1)
    started = time.monotonic()
    task()
    assert time.monotonic() - started < 20
    assert len(runs) == 2
    assert shop.rows() == [1]
    assert resolved(shop) == ["outcome=aborted"]


def test_the_database_is_asked_until_it_is_back(shop: Shop) -> None:
    """It refuses connections for a while after the COMMIT was lost."""
    runs: list[int] = []

    @shop.task()
    def task(self: Any) -> None:
        runs.append(1)
        insert(self.session, 1)

    insert_first = shop.engine.get()
    with insert_first.connect():
        pass
    lose_commit(shop, deliver=True)
    shop.proxy.stop()
    back = threading.Timer(1.0, shop.proxy.start)
    back.start()
    task()
    back.join()
    assert len(runs) == 1
    assert shop.rows() == [1]


def make_shop(shop: Shop, **options: Any) -> Any:
    """Return a task base on the same database, with other options of the engine."""
    url = shop.database.through(shop.proxy).url(shop.engine.get().dialect.driver)
    engine = shop.pools.add(SQLAlchemyEngine(url, **options), name="other")
    return type("Other", (shop.base,), {"abstract": True, "db": engine, "session": TaskSession(engine)})


@DELIVERED
@pytest.mark.parametrize("options", [{"resolve_commit": False}, {"resolve_timeout": 0.3}], ids=["off", "still down"])
@pytest.mark.parametrize("idempotent", [False, True])
def test_what_cannot_be_resolved_is_raised_unless_the_task_is_idempotent(
    shop: Shop, deliver: bool, options: dict[str, Any], idempotent: bool
) -> None:
    """The driver's own error comes out, with the transaction's id where it was noted, and says why."""
    runs: list[int] = []

    @shop.task(base=make_shop(shop, **options), idempotent=idempotent)
    def task(self: Any) -> None:
        runs.append(1)
        if len(runs) == 2:
            shop.proxy.start()
        else:
            self.session.scalar(text("select 1"))
            shop.proxy.stop()
        self.session.execute(text("insert into orders select 1 where not exists (select from orders)"))

    lose_commit(shop, deliver=deliver)
    if idempotent:
        task()
        assert len(runs) == 2
    else:
        with pytest.raises(OperationalError) as caught:
            task()
        assert len(runs) == 1
        failure = classify(caught.value)
        assert failure is not None
        assert (failure.kind, failure.phase.value, failure.resource) == (FailureKind.INDETERMINATE, "commit", "other")
        notes = " ".join(caught.value.__notes__)
        assert "Not run again: it may have been done" in notes
        assert ("pg_xact_status('" in notes) is ("resolve_timeout" in options)
    assert shop.rows() == ([1] if deliver or idempotent else [])


def test_an_answer_of_another_history_is_not_believed(shop: Shop) -> None:
    """After a failover the transaction's id may have been given away again: on another timeline nothing is known."""
    engine = shop.engine.get()

    @sqlalchemy.event.listens_for(engine, "checkout")
    def as_if_before_a_failover(connection: object, record: Any, borrower: object) -> None:
        if (state := record.info["workerpools"]).history is not None:
            state.history = state.history._replace(timeline="0000FFFF")

    @shop.task()
    def task(self: Any) -> None:
        insert(self.session, 1)

    lose_commit(shop, deliver=True)
    with pytest.raises(OperationalError) as caught:
        task()
    failure = classify(caught.value)
    assert failure is not None
    assert failure.kind is FailureKind.INDETERMINATE
    assert shop.rows() == [1]


def test_two_phase_commits_are_not_resolved(shop: Shop, postgres_server: Any) -> None:
    """PREPARE TRANSACTION is an effect: nothing runs again; the transaction manager decides."""
    runs: list[int] = []

    @shop.task(
        bind=True, base=type("Two", (shop.base,), {"abstract": True, "two": TaskSession(shop.engine, twophase=True)})
    )
    def task(self: Any) -> None:
        runs.append(1)
        insert(self.two, 1)

    shop.proxy.cut_when(lambda chunk: b"PREPARE TRANSACTION" in chunk.upper(), deliver=False)
    # Before 2.0.51 SQLAlchemy hides the driver's error behind one of its own.
    hidden = tuple(map(int, sqlalchemy.__version__.split(".")[:3])) < (2, 0, 51)
    with pytest.raises(IllegalStateChangeError if hidden else DBAPIError):
        task()
    assert len(runs) == 1
    assert shop.rows() == []


def test_a_partial_commit_is_an_effect(shop: Shop, database: Database) -> None:
    """Of two databases the first was committed: the second one's aborted transaction is not replayed."""
    with sqlalchemy.create_engine(database.url()).begin() as connection:
        connection.execute(text("create table stock (id int primary key)"))
    other = shop.pools.add(SQLAlchemyEngine(database.url(shop.engine.get().dialect.driver)), name="stock")
    base = type("Both", (shop.base,), {"abstract": True, "stock": TaskSession(other)})
    runs: list[int] = []

    @shop.task(base=base)
    def task(self: Any) -> None:
        runs.append(1)
        self.stock.execute(text("insert into stock values (:number)"), {"number": len(runs)})
        insert(self.session, 1)

    shop.engine.get()
    lose_commit(shop, deliver=False)
    with pytest.raises(OperationalError) as caught:
        task()
    assert len(runs) == 1
    assert any("COMMIT by 'stock' had left already" in note for note in caught.value.__notes__)
    assert shop.rows() == []
    with sqlalchemy.create_engine(database.url()).connect() as connection:
        assert connection.scalar(text("select count(*) from stock")) == 1


def test_a_transaction_that_the_server_aborts_at_commit_is_replayed(shop: Shop) -> None:
    """Serialization failures may come as late as COMMIT (PostgreSQL documentation, "Serializable Isolation Level")."""
    shop.database.execute("create table stock (id int primary key, amount int)")
    shop.database.execute("insert into stock values (1, 10), (2, 10)")
    runs: list[int] = []
    url = shop.database.through(shop.proxy).url(shop.engine.get().dialect.driver)
    serial = shop.pools.add(SQLAlchemyEngine(url, isolation_level="SERIALIZABLE"), name="serial")

    @shop.task(base=type("Serial", (shop.base,), {"abstract": True, "session": TaskSession(serial)}))
    def task(self: Any) -> int:
        runs.append(1)
        total = self.session.scalar(text("select sum(amount) from stock"))
        if len(runs) == 1:
            # Another transaction that reads what this one writes, and writes what this one reads.
            options = {"isolation_level": "SERIALIZABLE"}
            with sqlalchemy.create_engine(shop.database.url(), **options).begin() as other:
                other.execute(text("select sum(amount) from stock"))
                other.execute(text("update stock set amount = amount - 5 where id = 1"))
        self.session.execute(text("update stock set amount = :total where id = 2"), {"total": total})
        return int(total)

    assert task() == 15
    assert len(runs) == 2
    assert shop.replays() == 1


def test_the_loss_of_a_savepoint_is_the_loss_of_the_transaction(shop: Shop) -> None:
    """Nothing of it was committed: the whole body runs again."""
    runs: list[int] = []

    @shop.task()
    def task(self: Any) -> None:
        runs.append(1)
        insert(self.session, 1)
        with self.session.begin_nested():
            insert(self.session, 2)
            if len(runs) == 1:
                shop.proxy.close_all()

    task()
    assert len(runs) == 2
    assert shop.rows() == [1, 2]


def test_a_session_of_the_bodys_own_is_resolved_too(shop: Shop) -> None:
    """Whatever session uses the engine."""

    @shop.task()
    def task(self: Any) -> None:
        with Session(self.db) as session, session.begin():
            insert(session, 1)

    lose_commit(shop, deliver=True)
    task()
    assert shop.rows() == [1]
    assert resolved(shop) == ["outcome=committed"]
