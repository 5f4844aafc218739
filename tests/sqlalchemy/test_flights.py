"""A transaction's first statement takes along what is due: no round trip more, and nothing lost."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import sqlalchemy
from sqlalchemy import event, text
from sqlalchemy.exc import DBAPIError

from tests.support.shop import Shop, insert
from tests.support.trips import trips
from workerpools.events import EventKind


@pytest.mark.parametrize("limit", [None, 30], ids=["without a limit", "with a limit"])
@pytest.mark.parametrize("does", ["reads", "writes", "reads, then writes"])
def test_a_transaction_takes_one_trip_per_statement_and_one(shop: Shop, does: str, limit: float | None) -> None:
    """The check, the deadline, the reset of the session and the transaction's id are on board."""

    @shop.task(soft_time_limit=limit)
    def task(self: Any, number: int) -> None:
        if does.startswith("reads"):
            self.session.scalar(text("select count(*) from orders where id < :n"), {"n": number})
        if does.endswith("writes"):
            insert(self.session, number)

    task.apply((1,)).get()
    with trips(shop.proxy) as sent:
        task.apply((2,)).get()
    assert len(sent) == (3 if "," in does else 2), sent
    assert shop.rows() == ([] if does == "reads" else [1, 2])


def test_without_batches_each_has_its_own(shop: Shop) -> None:
    """BEGIN, the statement, the question for the id, COMMIT."""
    _, base = shop.another(batch=False, reset_session=False, check_after=None)

    @shop.task(base=base)
    def task(self: Any, number: int) -> None:
        insert(self.session, number)

    task.apply((1,)).get()
    with trips(shop.proxy) as sent:
        task.apply((2,)).get()
    assert len(sent) == 4, sent
    assert shop.rows() == [1, 2]


@pytest.mark.parametrize(
    ("first", "counted"),
    [
        ("select count(*) from orders", 0),
        ("insert into orders values (5)", 0),
        ("declare kept cursor for select 1", 0),
        ("set local work_mem = '1MB'", 1),
        ("raw", 1),
        ("many", 1),
        ("autocommit", 0),
    ],
)
def test_transactions_that_begin_without_a_batch_are_counted(shop: Shop, first: str, counted: int) -> None:
    """Only their first statements count, and what is no transaction does not."""
    engine = shop.engine.get()
    with engine.connect() as connection:
        if first == "raw":
            connection.connection.cursor().execute("select 1")
        elif first == "many":
            connection.execute(text("insert into orders values (:n)"), [{"n": 6}, {"n": 7}])
        elif first == "autocommit":
            connection.execution_options(isolation_level="AUTOCOMMIT").exec_driver_sql("set work_mem = '1MB'")
        else:
            connection.exec_driver_sql(first)
        connection.exec_driver_sql("select 1")
        connection.rollback()
    [process] = shop.pools.stats().processes
    [numbers] = [each for each in process.resources if each.name == shop.engine.name]
    assert numbers.value("unbatched") == counted


def test_a_user_who_turned_batches_off_has_none_counted(shop: Shop) -> None:
    resource, _ = shop.another(batch=False)
    with resource.get().begin() as connection:
        connection.exec_driver_sql("select 1")
    [process] = shop.pools.stats().processes
    [numbers] = [each for each in process.resources if each.name == resource.name]
    assert numbers.value("unbatched") == 0


@pytest.mark.parametrize(
    "wrong", ["selec 1", "select nothing from orders", "select 1/0", "insert into orders values (null)"]
)
def test_an_error_in_the_first_statement_is_the_servers(shop: Shop, wrong: str) -> None:
    """A string with a syntax error is rejected as a whole: the transaction begins all the same, and is aborted."""
    plain = sqlalchemy.create_engine(shop.database.url(shop.driver), poolclass=sqlalchemy.NullPool)

    def use(engine: Any) -> Any:
        with engine.connect() as connection:
            with pytest.raises(DBAPIError) as raised:
                connection.execute(text(wrong))
            with pytest.raises(DBAPIError) as later:
                connection.execute(text("select 1"))
            connection.rollback()
            return (
                type(raised.value.orig),
                str(raised.value.orig).split("\n")[0],
                type(later.value.orig),
                connection.scalar(text("select 7")),
            )

    assert use(shop.engine.get()) == use(plain)


def test_what_writes_although_it_plainly_reads_is_known(shop: Shop) -> None:
    """A view over a function that writes: psycopg2 lets the server refuse and sends the statement again."""
    with shop.engine.get().begin() as connection:
        connection.exec_driver_sql(
            "create function sell() returns int language sql as 'insert into orders values (7) returning id'"
        )
        connection.exec_driver_sql("create view sales as select sell() as id")
    runs: list[int] = []

    @shop.task()
    def task(self: Any) -> int:
        runs.append(1)
        self.session.execute(text("select count(*) from orders"))
        return int(self.session.scalar(text("select id from sales")))

    shop.proxy.cut_when(lambda chunk: b"COMMIT" in chunk, deliver=True)
    assert task() == 7
    assert (shop.rows(), len(runs)) == ([7], 1)
    assert [event.detail for event in shop.events if event.kind is EventKind.COMMIT_RESOLVED] == ["outcome=committed"]


@pytest.mark.parametrize("deliver", [False, True], ids=["server never got it", "server got it"])
@pytest.mark.parametrize("what", ["select pg_notify('sold', '7')", "notify sold"])
def test_a_lost_notification_is_no_success(shop: Shop, what: str, deliver: bool) -> None:
    """It has no id before COMMIT, and is delivered by it: heard once if it succeeded."""
    heard: list[str] = []
    with sqlalchemy.create_engine(shop.database.url("psycopg2"), isolation_level="AUTOCOMMIT").connect() as listener:
        listener.exec_driver_sql("listen sold")

        @shop.task()
        def task(self: Any) -> None:
            self.session.execute(text(what))

        shop.proxy.cut_when(lambda chunk: b"COMMIT" in chunk, deliver=deliver)
        task()
        listener.exec_driver_sql("select 1")
        heard = [notice.channel for notice in listener.connection.dbapi_connection.notifies]  # type: ignore[union-attr]
    assert heard == ["sold"]


@pytest.mark.parametrize(
    "how", ["raw cursor", "driver's commit", "raw cursor in autocommit", "text", "comment and text"]
)
def test_what_was_committed_past_the_session_is_not_done_twice(shop: Shop, how: str) -> None:
    """The server's word on the transaction shows it, before the decision to run the body again."""
    runs: list[int] = []

    @shop.task()
    def task(self: Any) -> None:
        runs.append(1)
        connection = self.session.connection()
        driver = connection.connection.dbapi_connection
        if how == "raw cursor in autocommit":
            driver.autocommit = True
        if "raw" in how:
            with driver.cursor() as cursor:
                cursor.execute("insert into orders values (1)")
                if how == "raw cursor":
                    cursor.execute("commit")
        else:
            insert(self.session, 1)
            if how == "driver's commit":
                driver.commit()
            elif "text" in how:
                connection.exec_driver_sql("commit" if how == "text" else "-- done; /* */\ncommit")
        shop.proxy.close_all()
        self.session.execute(text("select 1"))

    with pytest.raises(DBAPIError):
        task()
    assert (shop.rows(), runs) == ([1], [1])


def test_what_a_raw_cursor_did_in_a_transaction_that_goes_on_may_be_done_again(shop: Shop) -> None:
    """The server has rolled it back."""
    runs: list[int] = []

    @shop.task()
    def task(self: Any) -> None:
        runs.append(1)
        self.session.scalar(text("select count(*) from orders"))
        with self.session.connection().connection.cursor() as cursor:
            cursor.execute("insert into orders values (1)")
        if len(runs) == 1:
            shop.proxy.close_all()
        self.session.execute(text("select 1"))

    task()
    assert (shop.rows(), len(runs)) == ([1], 2)


def test_the_id_of_an_earlier_transaction_is_not_used(shop: Shop) -> None:
    """COMMIT as a text ends one; the next one is asked anew."""
    runs: list[int] = []

    @shop.task(idempotent=True)
    def task(self: Any) -> None:
        runs.append(1)
        insert(self.session, len(runs))
        connection = self.session.connection()
        connection.exec_driver_sql("commit")
        connection.exec_driver_sql("begin")
        insert(self.session, 10 + len(runs))

    shop.proxy.cut_when(lambda chunk: b"COMMIT" in chunk, deliver=False)
    task()
    assert shop.rows() == [1, 2, 12]


LEFT = {
    "a setting": ("set work_mem = '7MB'", "show work_mem"),
    "a setting by a function": ("select set_config('work_mem', '7MB', false)", "show work_mem"),
    "a tenant": ("set app.tenant = '7'", "select coalesce(current_setting('app.tenant', true), '')"),
    "a role": ("set role pg_monitor", "select current_user"),
    "a path": ("set search_path to pg_catalog", "show search_path"),
    "a time-out": ("set statement_timeout = 7777", "show statement_timeout"),
    "a default": ("set default_transaction_read_only = on", "show transaction_read_only"),
    "a default isolation": (
        "set session characteristics as transaction isolation level serializable",
        "show transaction_isolation",
    ),
    "an advisory lock": ("select pg_advisory_lock(7)", "select count(*) from pg_locks where locktype = 'advisory'"),
    "a temporary table": ("create temp table scratch (n int)", "select to_regclass('pg_temp.scratch')::text"),
    "a channel": ("listen sold", "select count(*) from pg_listening_channels()"),
    "a channel by a block": (
        "do 'begin execute ''listen sold''; end'",
        "select count(*) from pg_listening_channels()",
    ),
    "a cursor": ("declare kept cursor with hold for select 1", "select count(*) from pg_cursors where is_holdable"),
}


@pytest.mark.parametrize("batch", [True, False], ids=["in the flight", "apart"])
@pytest.mark.parametrize(("leaves", "asks"), LEFT.values(), ids=LEFT.keys())
def test_what_a_task_left_on_its_session_is_gone_for_the_next(shop: Shop, leaves: str, asks: str, batch: bool) -> None:
    """The same connection, with the settings that it had when it was opened."""
    _, base = shop.another(batch=batch)
    _pids: set[int] = set()

    @shop.task(base=base)
    def ask(self: Any) -> Any:
        _pids.add(self.session.scalar(text("select pg_backend_pid()")))
        return self.session.scalar(text(asks))

    @shop.task(base=base)
    def leave(self: Any) -> None:
        self.session.execute(text(leaves))

    @shop.task(base=base)
    def fail(self: Any) -> None:
        self.session.execute(text("select 1"))
        raise RuntimeError

    fresh = "" if "tenant" in asks else ask()
    leave()
    assert ask() == fresh
    leave()
    # A rollback does not take the reset back.
    with pytest.raises(RuntimeError):
        fail()
    assert ask() == fresh
    assert len(_pids) == 1


def test_a_session_that_is_kept_keeps_everything(shop: Shop) -> None:
    """The option for those who count on it."""
    _, base = shop.another(reset_session=False)

    @shop.task(base=base)
    def leave(self: Any) -> None:
        self.session.execute(text("set work_mem = '7MB'"))

    @shop.task(base=base)
    def ask(self: Any) -> Any:
        return self.session.scalar(text("show work_mem"))

    leave()
    assert ask() == "7MB"


def test_settings_of_one_attempt_outlast_its_transactions(shop: Shop) -> None:
    """Only another attempt finds them gone; an advisory lock outlasts a rollback, too."""

    @shop.task()
    def task(self: Any) -> list[Any]:
        found = []
        self.session.execute(text("set work_mem = '7MB'"))
        self.session.execute(text("select pg_advisory_lock(7)"))
        self.session.commit()
        found.append(self.session.scalar(text("show work_mem")))
        self.session.rollback()
        found.append(self.session.scalar(text("select count(*) from pg_locks where locktype = 'advisory'")))
        return found

    assert task() == ["7MB", 1]
    assert task() == ["7MB", 1]


def test_settings_made_when_a_connection_is_opened_are_kept(shop: Shop) -> None:
    """A reset restores what the user's listener has set."""
    engine, base = shop.another()

    @event.listens_for(engine.get(), "connect")
    def settle(connection: Any, record: object) -> None:
        with connection.cursor() as cursor:
            cursor.execute('set search_path to "it\'s 100 %", public')
            cursor.execute("set role pg_monitor")
            cursor.execute("set statement_timeout = 7000")
        connection.commit()

    @shop.task(base=base)
    def task(self: Any) -> Any:
        row = self.session.execute(
            text("select current_setting('search_path'), current_user, current_setting('statement_timeout'), :n"),
            {"n": 1},
        ).one()
        self.session.execute(text("set search_path to public"))
        self.session.execute(text("reset role"))
        self.session.execute(text("set statement_timeout = 70000"))
        return tuple(row)

    assert task() == task() == ('"it\'s 100 %", public', "pg_monitor", "7s", 1)


@pytest.mark.parametrize("batch", [True, False], ids=["in the flight", "apart"])
def test_a_reset_takes_back_the_timeout_of_the_session(shop: Shop, batch: bool) -> None:
    """A statement in autocommit has it set for a deadline; the next task, with the same one, has its own."""
    _, base = shop.another(batch=batch)

    @shop.task(base=base, soft_time_limit=30)
    def alone(self: Any) -> None:
        with self.db.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.scalar(text("select 1"))

    @shop.task(base=base, soft_time_limit=30)
    def task(self: Any) -> Any:
        return self.session.scalar(text("select setting::int from pg_settings where name = 'statement_timeout'"))

    alone.apply().get()
    assert 28_000 < task.apply().get() <= 30_000


def test_serializable_transactions_that_read_first_still_conflict(shop: Shop) -> None:
    """The savepoint in which psycopg2 reads must not have the server take the transaction for READ ONLY."""
    engine = shop.engine.get()
    with engine.begin() as connection:
        connection.execute(text("create table seats (n int)"))
    both = threading.Barrier(2, timeout=20)
    errors: list[str] = []

    def book(number: int) -> None:
        with engine.connect().execution_options(isolation_level="SERIALIZABLE") as connection:
            try:
                connection.execute(text("select count(*) from seats"))
                both.wait()
                connection.execute(text("insert into seats values (:n)"), {"n": number})
                both.wait()
                connection.commit()
            except DBAPIError as error:
                errors.append(str(getattr(error.orig, "sqlstate", None) or getattr(error.orig, "pgcode", None)))

    threads = [threading.Thread(target=book, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert errors == ["40001"]


def test_users_classes_of_cursors_take_part(shop: Shop) -> None:
    """A raw cursor that returns rows as dictionaries: its transaction has an id, too."""
    if shop.driver == "psycopg2":
        from psycopg2.extras import RealDictCursor

        options: dict[str, Any] = {"cursor_factory": RealDictCursor}
    else:
        from psycopg.rows import dict_row

        options = {"row_factory": dict_row}

    @shop.task()
    def task(self: Any, number: int) -> Any:
        self.session.scalar(text("select count(*) from orders"))
        with self.session.connection().connection.cursor(**options) as cursor:
            cursor.execute("insert into orders values (%s) returning id", (number,))
            return dict(cursor.fetchone())

    shop.proxy.cut_when(lambda chunk: b"COMMIT" in chunk, deliver=True)
    assert task(5) == {"id": 5}
    assert shop.rows() == [5]


def test_the_drivers_own_interface_sees_a_transaction(shop: Shop) -> None:
    """A transaction that a string has begun looks like the driver's own."""
    with shop.engine.get().connect() as connection:
        insert(connection, 1)
        driver: Any = connection.connection.dbapi_connection
        assert driver.autocommit is False
        with pytest.raises(Exception, match=r"transaction|INTRANS"):
            driver.autocommit = True
        driver.rollback()
        assert driver.autocommit is False
        driver.autocommit = True
        driver.autocommit = False
        insert(connection, 2)
        connection.commit()
    assert shop.rows() == [2]


def test_a_statement_that_the_driver_refused_is_no_effect(shop: Shop) -> None:
    """Nothing was sent; what follows may be done again."""
    runs: list[int] = []

    @shop.task()
    def task(self: Any) -> None:
        runs.append(1)
        connection = self.session.connection()
        with pytest.raises(DBAPIError):
            connection.exec_driver_sql("select %s", (object(),))
        insert(self.session, 1)
        if len(runs) == 1:
            shop.proxy.close_all()
        self.session.execute(text("select 1"))

    task()
    assert (shop.rows(), len(runs)) == ([1], 2)
