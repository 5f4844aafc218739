"""Past SQLAlchemy: raw connections and what only one driver has."""

from __future__ import annotations

import io
import select
import time
from typing import Any

import sqlalchemy
from sqlalchemy import text
from sqlalchemy.orm import Session

from tests.sqlalchemy.uses.transactions import COUNT, add
from tests.sqlalchemy.uses.use import PSYCOPG, PSYCOPG2, caught, driver_of, status_of, use

INSERT = "insert into orders (sku) values (%s)"
SERIES = "select n from generate_series(1, 2500) n"


def count(connection: Any) -> object:
    cursor = connection.cursor()
    cursor.execute("select count(*) from orders")
    return cursor.fetchone()


# Raw connections.


@use()
def a_raw_connection(engine: sqlalchemy.Engine) -> object:
    raw = engine.raw_connection()
    cursor = raw.cursor()
    cursor.execute(INSERT, ("lost",))
    raw.rollback()
    cursor.execute(INSERT, ("kept",))
    raw.commit()
    found = [cursor.rowcount, status_of(raw)]
    cursor.execute(INSERT, ("lost at the end",))
    found.append(status_of(raw))
    cursor.close()
    raw.close()
    return found, raw.is_valid


@use()
def a_raw_connection_in_blocks(engine: sqlalchemy.Engine) -> object:
    raw = engine.raw_connection()
    driver: Any = raw.dbapi_connection

    def fails() -> None:
        with driver if engine.dialect.driver == "psycopg2" else driver.transaction():
            driver.cursor().execute(INSERT, ("lost",))
            driver.cursor().execute(INSERT, ("cup",))

    with driver if engine.dialect.driver == "psycopg2" else driver.transaction(), driver.cursor() as cursor:
        cursor.execute(INSERT, ("kept",))
    found = [caught(fails), status_of(driver)]
    with raw.cursor() as cursor:
        cursor.execute(INSERT, ("lost too",))
    raw.close()
    return found


@use()
def autocommit_switched_by_hand(engine: sqlalchemy.Engine) -> object:
    raw = engine.raw_connection()
    driver: Any = raw.dbapi_connection
    found = [driver.autocommit, count(raw), status_of(raw)]

    def switch(to: bool) -> None:
        driver.autocommit = to

    found.append(caught(switch, True))
    raw.rollback()
    switch(True)
    raw.cursor().execute(INSERT, ("kept",))
    found.append(status_of(raw))
    raw.rollback()
    switch(False)
    raw.cursor().execute(INSERT, ("lost",))
    raw.close()
    with engine.connect() as connection:
        return found, driver_of(connection).autocommit, connection.scalar(COUNT)


@use()
def what_the_driver_says_of_a_transaction(engine: sqlalchemy.Engine) -> object:
    with engine.connect() as connection:
        driver = driver_of(connection)

        def state() -> tuple[object, ...]:
            level = getattr(driver, "isolation_level", None)
            return driver.autocommit, status_of(driver), getattr(driver, "status", None), level, driver.closed

        found = [state()]
        connection.begin()
        found.append(state())
        connection.scalar(COUNT)
        found.append(state())
        caught(connection.execute, text("selec"))
        found.append(state())
        connection.rollback()
        found.append(state())
        caught(connection.execute, text("selec"))
        found.append(state())
        connection.rollback()
        connection.execution_options(isolation_level="AUTOCOMMIT").scalar(COUNT)
        return [*found, state()]


@use()
def raw_errors(engine: sqlalchemy.Engine) -> object:
    raw = engine.raw_connection()
    found = []
    for statement in ("selec", "select 1/0", "insert into orders (sku) values ('cup')"):
        cursor = raw.cursor()
        found.append((caught(cursor.execute, statement), status_of(raw), caught(cursor.execute, "select 1")))
        raw.rollback()
        found.append((caught(cursor.fetchall), count(raw)))
        raw.rollback()
    raw.close()
    return found, caught(raw.cursor)


@use()
def a_connection_between_sqlalchemy_and_the_driver(engine: sqlalchemy.Engine) -> object:
    with engine.connect() as connection:
        driver = driver_of(connection)
        connection.scalar(COUNT)
        driver.cursor().execute(INSERT, ("lost",))
        driver.rollback()
        driver.cursor().execute(INSERT, ("kept",))
        found = [status_of(driver), connection.scalar(COUNT)]
        driver.commit()
        found.append(status_of(driver))
        driver.cursor().execute(INSERT, ("lost too",))
        connection.rollback()
        return found, connection.scalar(COUNT)


@use()
def a_raw_cursor_first(engine: sqlalchemy.Engine) -> object:
    with engine.connect() as connection:
        connection.begin()
        connection.connection.cursor().execute(INSERT, ("kept",))
        found = [connection.scalar(COUNT)]
        connection.commit()
        connection.connection.cursor().execute(INSERT, ("lost",))
        return found


@use()
def detached(engine: sqlalchemy.Engine) -> object:
    with engine.connect() as connection:
        connection.detach()
        driver = driver_of(connection)
        found = [add(connection, "kept")]
        connection.commit()
        found += [connection.scalar(COUNT), add(connection, "lost")]
    with engine.connect() as connection:
        return found, bool(driver.closed), connection.scalar(COUNT), driver_of(connection) is driver


@use()
def invalidated(engine: sqlalchemy.Engine) -> object:
    with engine.connect() as connection:
        driver = driver_of(connection)
        add(connection, "lost")
        connection.invalidate()
        found = [connection.invalidated, bool(driver.closed), caught(connection.execute, COUNT)]
        connection.rollback()
        found += [connection.scalar(COUNT), connection.invalidated, add(connection, "kept")]
        connection.commit()
    raw = engine.raw_connection()
    raw.invalidate()
    return found, raw.is_valid


@use()
def closed_by_hand(engine: sqlalchemy.Engine) -> object:
    with engine.connect() as connection:
        add(connection, "lost")
        driver_of(connection).close()
        found = [caught(connection.execute, COUNT)]
        connection.rollback()
        return found, connection.scalar(COUNT)


@use()
def an_engine_that_is_disposed_of(engine: sqlalchemy.Engine) -> object:
    with engine.connect() as connection:
        add(connection, "kept")
        engine.dispose()
        connection.commit()
    with engine.connect() as connection:
        return connection.scalar(COUNT)


# Cursors.


@use()
def named_cursors(engine: sqlalchemy.Engine) -> object:
    with engine.connect() as connection:
        driver = driver_of(connection)
        first = driver.cursor("first")
        first.execute(SERIES)
        found = [first.fetchmany(2), status_of(driver)]
        first.close()
        add(connection, "kept")
        second = driver.cursor("second", scrollable=True)
        second.execute("select n from generate_series(1, %s) n", (50,))
        second.scroll(10)
        found += [second.fetchone(), sum(n for (n,) in second)]
        second.close()
        connection.commit()
        third = driver.cursor("third", withhold=True)
        third.execute(SERIES)
        connection.commit()
        found.append(third.fetchone())
        third.close()
        connection.rollback()
        broken = driver.cursor("broken")
        return found, caught(broken.execute, "selec"), status_of(driver), connection.rollback()


@use(PSYCOPG2)
def cursor_factories_of_psycopg2(engine: sqlalchemy.Engine) -> object:
    from psycopg2 import extras

    raw = engine.raw_connection()
    found = []
    for factory in (extras.RealDictCursor, extras.DictCursor, extras.NamedTupleCursor, extras.LoggingCursor):
        if factory is extras.LoggingCursor:
            continue
        cursor = raw.cursor(cursor_factory=factory)
        cursor.execute("select id, sku from orders order by id")
        found.append(
            (
                type(cursor).__name__,
                type(cursor.fetchone()).__name__,
                [dict(row) if hasattr(row, "keys") else row for row in cursor],
            )
        )
        assert isinstance(cursor, factory)
    raw.close()
    return found


@use(PSYCOPG)
def row_factories_of_psycopg(engine: sqlalchemy.Engine) -> object:
    from psycopg import ClientCursor, rows

    raw = engine.raw_connection()
    driver: Any = raw.dbapi_connection
    found: list[object] = []
    for factory in (rows.dict_row, rows.namedtuple_row, rows.scalar_row):
        found.append(driver.cursor(row_factory=factory).execute("select id, sku from orders order by id").fetchall())
    before = driver.row_factory
    driver.row_factory = rows.dict_row
    found.append(driver.execute("select 1 as one").fetchall())
    driver.row_factory = before
    found.append(ClientCursor(driver).execute("select %s; select %s", (1, 2)).fetchall())
    found.append(driver.execute("select %b", (7,), binary=True, prepare=True).fetchall())
    raw.close()
    return found


def _dictionaries() -> dict[str, Any]:
    from psycopg2 import extras

    return {"cursor_factory": extras.DictCursor}


def _subclass() -> dict[str, Any]:
    from psycopg2 import extensions

    class Own(extensions.connection):
        """A user's own."""

        own = 7

    return {"connection_factory": Own}


@use(PSYCOPG2, connect_args=_dictionaries())
def an_engine_with_a_cursor_factory(engine: sqlalchemy.Engine) -> object:
    with engine.begin() as connection:
        found = [add(connection, "kept"), connection.execute(text("select id, sku from orders order by id")).all()]
        cursor = driver_of(connection).cursor()
        cursor.execute("select 1 as one")
        return found, type(cursor).__name__, cursor.fetchone()["one"]


@use(PSYCOPG2, connect_args=_subclass())
def an_engine_with_a_connection_factory(engine: sqlalchemy.Engine) -> object:
    with engine.begin() as connection:
        return add(connection, "kept"), driver_of(connection).own, connection.scalar(COUNT)


def _client_cursor() -> dict[str, Any]:
    from psycopg import ClientCursor

    return {"cursor_factory": ClientCursor}


@use(PSYCOPG, connect_args=_client_cursor())
def an_engine_that_binds_on_the_client(engine: sqlalchemy.Engine) -> object:
    with engine.begin() as connection:
        found = [
            add(connection, "kept"),
            connection.scalar(COUNT),
            caught(connection.execute, text("select :n"), {"n": 1}),
        ]
    with engine.connect() as connection:
        return found, caught(connection.execute, text("select 1 / :n"), {"n": 0})


@use(PSYCOPG2)
def cursors_of_psycopg2(engine: sqlalchemy.Engine) -> object:
    from psycopg2 import extras

    with engine.begin() as connection:
        cursor = connection.connection.cursor()
        extras.execute_values(cursor, "insert into orders (sku) values %s", [(f"v{n}",) for n in range(250)])
        extras.execute_batch(cursor, INSERT, [(f"b{n}",) for n in range(250)])
        found = [cursor.rowcount, cursor.mogrify("select %s", ("a'b",)), cursor.query]
        cursor.callproc("lower", ["ABC"])
        found += [cursor.fetchall(), cursor.query]
        cursor.execute("select 'a' || %s", ("%",))
        found += [cursor.query, cursor.statusmessage, cursor.description[0].name]
        streamed = connection.execute(text("select :n"), {"n": 1})
        return found, streamed.cursor.query, streamed.all(), connection.scalar(COUNT)


@use(PSYCOPG)
def pipelines_of_psycopg(engine: sqlalchemy.Engine) -> object:
    with engine.begin() as connection:
        driver = driver_of(connection)
        with driver.pipeline():
            cursors = [driver.execute(INSERT + " returning id", (f"p{n}",)) for n in range(3)]
        found = [cursor.fetchone() for cursor in cursors]
        cursor = driver.cursor()
        cursor.executemany(INSERT + " returning id", [("x",), ("y",)], returning=True)
        found.append(cursor.fetchone())
    with engine.connect() as connection:
        driver = driver_of(connection)

        def fails() -> None:
            with driver.pipeline():
                driver.execute("select 1/0")
                driver.execute("select 1")

        return found, caught(fails), status_of(driver)


@use(PSYCOPG)
def transactions_of_psycopg(engine: sqlalchemy.Engine) -> object:
    raw = engine.raw_connection()
    driver: Any = raw.dbapi_connection
    with driver.transaction():
        driver.execute(INSERT, ("kept",))
        with driver.transaction(force_rollback=True):
            driver.execute(INSERT, ("lost",))
    driver.read_only = True
    found = [caught(driver.execute, INSERT, ("refused",))]
    driver.rollback()
    driver.read_only = None
    driver.isolation_level = 4
    found.append(driver.execute("show transaction_isolation").fetchone())
    driver.rollback()
    driver.isolation_level = None
    raw.close()
    with engine.connect() as connection:
        return found, connection.scalar(text("show transaction_isolation"))


@use(PSYCOPG2)
def sessions_of_psycopg2(engine: sqlalchemy.Engine) -> object:
    raw = engine.raw_connection()
    driver: Any = raw.dbapi_connection
    driver.set_session(isolation_level="SERIALIZABLE", readonly=True)
    cursor = driver.cursor()
    found = [caught(cursor.execute, INSERT, ("refused",))]
    driver.rollback()
    cursor.execute("show transaction_isolation")
    found.append(cursor.fetchone())
    driver.rollback()
    driver.set_session(isolation_level="DEFAULT", readonly="DEFAULT")
    found += [driver.get_parameter_status("server_encoding"), driver.encoding, driver.async_, driver.server_version > 0]
    raw.close()
    return found


# COPY, large objects, LISTEN.


def _copy_in(driver: Any, rows: str) -> object:
    cursor = driver.cursor()
    if hasattr(cursor, "copy_expert"):
        cursor.copy_expert("copy orders (sku) from stdin", io.StringIO(rows))
    else:
        with cursor.copy("copy orders (sku) from stdin") as copy:
            copy.write(rows)
    return cursor.rowcount


def _copy_out(driver: Any) -> object:
    cursor = driver.cursor()
    statement = "copy (select sku, amount from orders order by id) to stdout"
    if hasattr(cursor, "copy_expert"):
        written = io.StringIO()
        cursor.copy_expert(statement, written)
        return written.getvalue()
    with cursor.copy(statement) as copy:
        return b"".join(bytes(part) for part in copy)


@use()
def copy_first(engine: sqlalchemy.Engine) -> object:
    with engine.connect() as connection:
        driver = driver_of(connection)
        found = [_copy_in(driver, "a\nb\n"), status_of(driver), connection.scalar(COUNT)]
        driver.commit()
        found.append(_copy_in(driver, "lost\n"))
        connection.rollback()
        return found, _copy_out(driver), status_of(driver)


@use()
def copy_in_the_middle(engine: sqlalchemy.Engine) -> object:
    with Session(engine) as session:
        add(session, "kept")
        driver = session.connection().connection.dbapi_connection
        found = [_copy_in(driver, "a\nb\n"), _copy_out(driver)]
        session.commit()
        add(session, "lost")
        found.append(_copy_in(driver, "lost too\n"))
        session.rollback()
        return found, session.scalar(COUNT)


@use()
def copy_that_fails(engine: sqlalchemy.Engine) -> object:
    with engine.connect() as connection:
        driver = driver_of(connection)
        found = [caught(_copy_in, driver, "new\ncup\n"), status_of(driver), caught(connection.scalar, COUNT)]
        connection.rollback()
        found.append(caught(_copy_in, driver, "one\ttoo many\n"))
        connection.rollback()
        return found, caught(connection.exec_driver_sql, "copy orders to stdout"), status_of(driver)


@use(PSYCOPG2)
def copy_of_psycopg2(engine: sqlalchemy.Engine) -> object:
    with engine.begin() as connection:
        cursor = connection.connection.cursor()
        cursor.copy_from(io.StringIO("x\t7\ny\t8\n"), "orders", columns=("sku", "amount"))
        written = io.StringIO()
        cursor.copy_to(written, "orders", columns=("sku",))
        return cursor.rowcount, written.getvalue()


@use(PSYCOPG2)
def large_objects_of_psycopg2(engine: sqlalchemy.Engine) -> object:
    with engine.connect() as connection:
        driver = driver_of(connection)
        lost = driver.lobject()
        lost.write("x")
        connection.rollback()
        kept = driver.lobject()
        number = kept.oid
        kept.write("a text that is kept")
        kept.seek(2)
        found = [kept.read(4), kept.tell()]
        kept.close()
        connection.commit()
        found.append(driver.lobject(number, "r").read())
        return found, caught(lost.read)


@use()
def large_objects_as_functions(engine: sqlalchemy.Engine) -> object:
    with engine.connect() as connection:
        number = connection.scalar(text("select lo_from_bytea(0, 'a text')"))
        found = [connection.scalar(text("select lo_get(:n, 2, 4)"), {"n": number})]
        connection.commit()
        found.append(connection.scalar(text("select lo_put(:n, 0, 'A')"), {"n": number}))
        connection.rollback()
        return found, connection.scalar(text("select lo_get(:n)"), {"n": number})


def _heard(driver: Any, expected: int) -> list[tuple[str, str]]:
    """Return the notifications that have arrived, after waiting for the expected number of them."""
    found: list[Any] = []
    until = time.monotonic() + 5.0
    while True:
        if callable(driver.notifies):
            found += driver.notifies(timeout=0.05 if not expected else 5.0, stop_after=expected or None)
        else:
            driver.poll()
            found += driver.notifies
            driver.notifies.clear()
        if len(found) >= expected or time.monotonic() > until:
            return [(notification.channel, notification.payload) for notification in found]
        select.select([driver.fileno()], [], [], 0.1)


def _keeps_its_session(connection: sqlalchemy.Connection) -> bool:
    """Ask the server; through PgBouncer a session that listens is nobody's between two statements.

    What has not come with the answer to a statement that was sent later never comes then.
    """
    return bool(connection.scalar(text("select pg_backend_pid()")) == driver_of(connection).info.backend_pid)


@use()
def notifications(engine: sqlalchemy.Engine) -> object:
    with engine.connect() as listener, engine.connect() as speaker:
        listener.execution_options(isolation_level="AUTOCOMMIT")
        listener.execute(text("listen news"))
        speaker.execute(text("notify news, 'lost'"))
        speaker.rollback()
        speaker.execute(text("select pg_notify('news', 'first')"))
        unsent = _heard(driver_of(listener), 0)
        speaker.execute(text("notify news, 'second'"))
        speaker.commit()
        found = _heard(driver_of(listener), 2 if _keeps_its_session(listener) else 0)
        listener.execute(text("unlisten *"))
        return unsent, found


@use()
def notifications_of_itself(engine: sqlalchemy.Engine) -> object:
    with engine.connect() as connection:
        connection.execute(text("listen news"))
        connection.commit()
        connection.execute(text("notify news, 'to myself'"))
        found = [_heard(driver_of(connection), 0)]
        connection.commit()
        found.append(_heard(driver_of(connection), 1))
        connection.rollback()
        connection.execute(text("unlisten news"))
        connection.commit()
        return found
