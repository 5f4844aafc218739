"""Transactions: isolation, savepoints, two phases, and their ends as text."""

from __future__ import annotations

from typing import Any

import sqlalchemy
from sqlalchemy import text
from sqlalchemy.orm import Session

from tests.sqlalchemy.uses.use import caught, driver_of, status_of, use

ADD = text("insert into orders (sku) values (:sku)")
COUNT = text("select count(*) from orders")
SETTINGS = text(
    "select current_setting('transaction_isolation'), current_setting('transaction_read_only'),"
    " current_setting('transaction_deferrable')"
)


def add(connection: Any, sku: str) -> int:
    return int(connection.execute(ADD, {"sku": sku}).rowcount)


# Isolation.


@use()
def isolation_of_each_connection(engine: sqlalchemy.Engine) -> object:
    found = []
    for level in ("SERIALIZABLE", "REPEATABLE READ", "READ UNCOMMITTED", "READ COMMITTED", "AUTOCOMMIT"):
        with engine.connect().execution_options(isolation_level=level) as connection:
            found.append((connection.execute(SETTINGS).one(), connection.get_isolation_level()))
            add(connection, level)
    with engine.connect() as connection:
        return found, connection.execute(SETTINGS).one()


@use(isolation_level="SERIALIZABLE")
def isolation_of_the_engine(engine: sqlalchemy.Engine) -> object:
    with engine.begin() as connection:
        add(connection, "a")
        return connection.execute(SETTINGS).one(), connection.default_isolation_level


@use(isolation_level="REPEATABLE READ")
def a_snapshot_begins_with_the_first_statement(engine: sqlalchemy.Engine) -> object:
    with engine.connect() as one, engine.connect() as other:
        one.begin()
        add(other, "before")
        other.commit()
        found = [one.scalar(COUNT)]
        add(other, "after")
        other.commit()
        return [*found, one.scalar(COUNT)]


@use()
def an_engine_with_execution_options(engine: sqlalchemy.Engine) -> object:
    strict = engine.execution_options(isolation_level="SERIALIZABLE")
    at_once = engine.execution_options(isolation_level="AUTOCOMMIT")
    with strict.connect() as one, at_once.connect() as other, engine.connect() as third:
        add(other, "kept")
        add(one, "lost")
        return one.execute(SETTINGS).one(), third.scalar(COUNT), third.execute(SETTINGS).one()


@use(isolation_level="AUTOCOMMIT")
def an_engine_in_autocommit(engine: sqlalchemy.Engine) -> object:
    with engine.connect() as connection:
        add(connection, "kept")
        connection.rollback()
        with connection.begin():
            add(connection, "too")
        times = connection.scalar(text("select now()")) == connection.scalar(text("select now()"))
        return connection.scalar(COUNT), times, status_of(driver_of(connection))


@use()
def isolation_changed_midway(engine: sqlalchemy.Engine) -> object:
    with engine.connect() as connection:
        add(connection, "lost")
        refused = caught(lambda: connection.execution_options(isolation_level="SERIALIZABLE"))
        connection.rollback()
        connection.execution_options(isolation_level="SERIALIZABLE")
        found = [connection.execute(SETTINGS).one()]
        connection.rollback()
        connection.execution_options(isolation_level="AUTOCOMMIT")
        add(connection, "kept")
        connection.rollback()
        connection.execution_options(isolation_level="REPEATABLE READ")
        return refused, found, connection.execute(SETTINGS).one()


@use()
def read_only(engine: sqlalchemy.Engine) -> object:
    with engine.connect().execution_options(postgresql_readonly=True) as connection:
        found = [caught(add, connection, "refused"), caught(connection.scalar, COUNT)]
        connection.rollback()
        found += [connection.execute(SETTINGS).one(), connection.scalar(COUNT)]
    with engine.begin() as connection:
        return found, add(connection, "kept"), connection.execute(SETTINGS).one()


@use()
def deferrable(engine: sqlalchemy.Engine) -> object:
    options: dict[str, Any] = {"isolation_level": "SERIALIZABLE", "postgresql_readonly": True}
    with engine.connect().execution_options(**options, postgresql_deferrable=True) as connection:
        found = connection.execute(SETTINGS).one()
        connection.commit()
    with engine.connect() as connection:
        return found, connection.execute(SETTINGS).one()


@use()
def set_transaction(engine: sqlalchemy.Engine) -> object:
    with engine.connect() as connection:
        connection.execute(text("set transaction isolation level serializable, read only"))
        found = [connection.execute(SETTINGS).one(), connection.scalar(COUNT)]
        connection.rollback()
        add(connection, "lost")
        late = caught(connection.execute, text("set transaction isolation level serializable"))
        connection.rollback()
        return found, late, connection.execute(SETTINGS).one()


@use()
def set_transaction_after_a_comment(engine: sqlalchemy.Engine) -> object:
    with engine.begin() as connection:
        connection.execute(text("-- first\n/* of all */ SET TRANSACTION ISOLATION LEVEL REPEATABLE READ"))
        return connection.execute(SETTINGS).one(), add(connection, "kept")


@use()
def session_characteristics(engine: sqlalchemy.Engine) -> object:
    with engine.connect() as connection:
        connection.execute(text("set session characteristics as transaction isolation level serializable"))
        first = connection.execute(SETTINGS).one()
        connection.commit()
        second = connection.execute(SETTINGS).one()
        connection.execute(text("reset default_transaction_isolation"))
        connection.commit()
        return first, second, connection.execute(SETTINGS).one()


@use()
def an_imported_snapshot(engine: sqlalchemy.Engine) -> object:
    repeatable = engine.execution_options(isolation_level="REPEATABLE READ")
    with repeatable.connect() as one, repeatable.connect() as other, engine.connect() as third:
        name = one.scalar(text("select pg_export_snapshot()"))
        add(third, "unseen")
        third.commit()
        other.exec_driver_sql(f"set transaction snapshot '{name}'")
        return other.scalar(COUNT), third.scalar(COUNT)


@use(isolation_level="SERIALIZABLE")
def a_serialization_failure(engine: sqlalchemy.Engine) -> object:
    with engine.connect() as one, engine.connect() as other:
        one.scalar(COUNT)
        other.scalar(COUNT)
        add(one, "one")
        add(other, "other")
        one.commit()
        lost = caught(other.commit)
        return lost, caught(other.scalar, COUNT)


@use()
def an_update_of_a_changed_row(engine: sqlalchemy.Engine) -> object:
    change = text("update orders set amount = amount + 1 where sku = 'cup'")
    repeatable = engine.execution_options(isolation_level="REPEATABLE READ")
    with repeatable.connect() as one, engine.connect() as other:
        one.scalar(COUNT)
        other.execute(change)
        other.commit()
        lost = caught(one.execute, change)
        one.rollback()
        return lost, one.execute(change).rowcount


# Ends.


@use()
def commit_as_you_go(engine: sqlalchemy.Engine) -> object:
    with engine.connect() as connection:
        add(connection, "kept")
        connection.commit()
        add(connection, "lost")
        connection.rollback()
        add(connection, "kept too")
        connection.commit()
        add(connection, "lost at the end")
        found = connection.in_transaction()
    return found, connection.closed


@use()
def begin_once(engine: sqlalchemy.Engine) -> object:
    def fails() -> None:
        with engine.begin() as connection:
            add(connection, "lost")
            raise ValueError("by the body")

    with engine.begin() as connection:
        add(connection, "kept")
    with engine.connect() as connection, connection.begin() as transaction:
        add(connection, "rolled back")
        transaction.rollback()
        late = caught(add, connection, "too late")
    return caught(fails), late


@use()
def a_transaction_without_statements(engine: sqlalchemy.Engine) -> object:
    with engine.begin() as connection:
        begun = status_of(driver_of(connection))
    with engine.connect() as connection:
        transaction = connection.begin()
        transaction.rollback()
        connection.begin()
        connection.commit()
        return begun, status_of(driver_of(connection)), caught(connection.commit)


@use()
def ends_as_text(engine: sqlalchemy.Engine) -> object:
    found = []
    for end in ("COMMIT", "end", "ROLLBACK", "abort", "-- done\nCOMMIT", "/* x */ commit and chain"):
        with engine.connect() as connection:
            add(connection, end)
            connection.execute(text(end))
            found.append((status_of(driver_of(connection)), caught(add, connection, f"{end} and then")))
            connection.rollback()
            found.append((connection.scalar(COUNT), status_of(driver_of(connection))))
    return found


@use()
def begin_as_text(engine: sqlalchemy.Engine) -> object:
    found = []
    for begin in ("BEGIN", "start transaction", "begin isolation level serializable", "commit"):
        with engine.connect() as connection:
            found.append(caught(connection.execute, text(begin)))
            found.append((caught(connection.execute, SETTINGS), status_of(driver_of(connection))))
            add(connection, begin)
            connection.commit()
    return found


@use()
def times_of_a_transaction(engine: sqlalchemy.Engine) -> object:
    now = text("select now(), pg_current_xact_id()::text")
    with engine.connect() as connection:
        first, second = connection.execute(now).one(), connection.execute(now).one()
        connection.commit()
        third = connection.execute(now).one()
        return first == second, first[0] == third[0], first[1] == third[1]


@use()
def a_constraint_checked_at_commit(engine: sqlalchemy.Engine) -> object:
    def orphan() -> None:
        with engine.begin() as connection:
            connection.execute(text("insert into lines (order_id) values (99)"))

    found = [caught(orphan)]
    with engine.connect() as connection:
        connection.execute(text("insert into lines (order_id) values (99)"))
        found += [caught(connection.commit), connection.in_transaction()]
        connection.rollback()
        found.append(status_of(driver_of(connection)))
        add(connection, "kept")
        connection.commit()
        connection.execute(text("set constraints all immediate"))
        return found, caught(connection.execute, text("insert into lines (order_id) values (99)"))


# Savepoints.


@use()
def savepoints(engine: sqlalchemy.Engine) -> object:
    with engine.begin() as connection:
        first = connection.begin_nested()
        add(connection, "lost")
        first.rollback()
        second = connection.begin_nested()
        add(connection, "kept")
        second.commit()
        with connection.begin_nested():
            add(connection, "outer")
            inner = connection.begin_nested()
            add(connection, "inner")
            inner.rollback()
            with connection.begin_nested():
                add(connection, "second inner")
        return connection.scalar(COUNT), status_of(driver_of(connection))


@use()
def an_error_in_a_savepoint(engine: sqlalchemy.Engine) -> object:
    with engine.begin() as connection:

        def fails() -> None:
            with connection.begin_nested():
                add(connection, "cup")

        first = caught(fails)
        add(connection, "kept")
        return first, caught(fails), status_of(driver_of(connection)), add(connection, "too")


@use()
def a_savepoint_rolled_back_with_all(engine: sqlalchemy.Engine) -> object:
    with engine.connect() as connection:
        add(connection, "lost")
        nested = connection.begin_nested()
        add(connection, "lost too")
        connection.rollback()
        return nested.is_active, caught(nested.commit), connection.scalar(COUNT)


@use()
def savepoints_as_text(engine: sqlalchemy.Engine) -> object:
    with engine.begin() as connection:
        connection.execute(text("savepoint a"))
        add(connection, "lost")
        connection.execute(text("rollback to savepoint a"))
        add(connection, "kept")
        connection.execute(text("release savepoint a"))
    with engine.connect() as connection:
        connection.begin_nested()
        found = [caught(connection.execute, text("rollback to savepoint nowhere")), status_of(driver_of(connection))]
        connection.rollback()
        return found, connection.scalar(COUNT)


@use()
def a_setting_since_a_savepoint(engine: sqlalchemy.Engine) -> object:
    with engine.begin() as connection:
        nested = connection.begin_nested()
        connection.execute(text("set local work_mem = '1234kB'"))
        inside = connection.scalar(text("show work_mem"))
        nested.rollback()
        return inside, connection.scalar(text("show work_mem"))


# Two phases.


@use()
def two_phases(engine: sqlalchemy.Engine) -> object:
    with engine.connect() as connection:
        committed = connection.begin_twophase("first")
        add(connection, "kept")
        committed.prepare()
        with engine.connect() as other:
            listed = other.recover_twophase()
        committed.commit()
        rolled_back = connection.begin_twophase("second")
        add(connection, "lost")
        rolled_back.prepare()
        rolled_back.rollback()
        unprepared = connection.begin_twophase("third")
        add(connection, "lost too")
        unprepared.rollback()
        at_once = connection.begin_twophase("fourth")
        add(connection, "kept too")
        at_once.commit()
        return listed, connection.recover_twophase(), connection.scalar(COUNT)


@use()
def two_phases_recovered(engine: sqlalchemy.Engine) -> object:
    with engine.connect() as connection:
        transaction = connection.begin_twophase("left")
        add(connection, "kept")
        transaction.prepare()
        connection.detach()
    with engine.connect() as connection:
        found = connection.recover_twophase()
        for identifier in found:
            connection.commit_prepared(identifier, recover=True)
        return found, caught(connection.commit_prepared, "nothing", True)


@use()
def two_phases_of_a_session(engine: sqlalchemy.Engine) -> object:
    with Session(engine, twophase=True) as session:
        add(session, "kept")
        session.commit()
        add(session, "lost")
        session.rollback()
        return session.scalar(COUNT)


@use()
def two_phases_with_an_error(engine: sqlalchemy.Engine) -> object:
    def fails() -> None:
        with Session(engine, twophase=True) as session:
            session.execute(text("insert into lines (order_id) values (99)"))
            session.commit()

    found = caught(fails)
    with Session(engine) as session:
        return found, session.scalar(COUNT)


# Settings and locks.


@use()
def settings_of_a_transaction(engine: sqlalchemy.Engine) -> object:
    show = text("show work_mem")
    with engine.connect() as connection:
        connection.execute(text("SET LOCAL work_mem = '1234kB'"))
        found = [connection.scalar(show)]
        connection.commit()
        found.append(connection.scalar(show))
        connection.execute(text("select set_config('work_mem', '2345kB', true)"))
        found.append(connection.scalar(show))
        connection.rollback()
        return [*found, connection.scalar(show)]


@use()
def settings_of_a_session(engine: sqlalchemy.Engine) -> object:
    show = text("show work_mem")
    with engine.connect() as connection:
        connection.execute(text("set work_mem = '1234kB'"))
        connection.rollback()
        found = [connection.scalar(show)]
        connection.execute(text("set work_mem = '2345kB'"))
        connection.commit()
        found.append(connection.scalar(show))
        connection.execute(text("RESET work_mem"))
        connection.commit()
        return [*found, connection.scalar(show), caught(connection.execute, text("set no_such = 1"))]


@use()
def a_statement_timeout_of_the_user(engine: sqlalchemy.Engine) -> object:
    with engine.connect() as connection:
        connection.execute(text("set local statement_timeout = 40"))
        found = caught(connection.execute, text("select pg_sleep(10)"))
        connection.rollback()
        return found, connection.scalar(COUNT)


@use()
def a_lock_timeout(engine: sqlalchemy.Engine) -> object:
    lock = text("select id from orders where sku = 'cup' for update")
    with engine.connect() as one, engine.connect() as other:
        one.execute(lock)
        other.execute(text("set local lock_timeout = 20"))
        found = [caught(other.execute, lock)]
        other.rollback()
        found.append(caught(other.execute, text("select id from orders where sku = 'cup' for update nowait")))
        other.rollback()
        skipped = text("select sku from orders order by sku for update skip locked")
        return found, other.execute(skipped).all()


@use()
def advisory_locks(engine: sqlalchemy.Engine) -> object:
    tried = text("select pg_try_advisory_xact_lock(7)")
    with engine.connect() as one, engine.connect() as other:
        one.execute(text("select pg_advisory_xact_lock(7)"))
        found = [other.scalar(tried)]
        one.commit()
        found.append(other.scalar(tried))
        other.commit()
        return (
            found,
            one.scalar(text("select pg_try_advisory_lock(8)")),
            one.scalar(text("select pg_advisory_unlock(8)")),
        )


@use()
def a_lock_of_a_session(engine: sqlalchemy.Engine) -> object:
    with engine.connect() as one:
        one.execute(text("select pg_advisory_lock(9)"))
        one.commit()
        found = one.scalar(text("select count(*) from pg_locks where locktype = 'advisory' and objid = 9"))
        one.commit()
        return found, one.scalar(text("select pg_advisory_unlock(9)"))


@use()
def other_sessions_see_what_is_committed(engine: sqlalchemy.Engine) -> object:
    with engine.connect() as one, engine.connect() as other:
        add(one, "new")
        found = [one.scalar(COUNT), other.scalar(COUNT)]
        one.commit()
        return [*found, other.scalar(COUNT)]
