"""What users attach to an engine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import sqlalchemy
from sqlalchemy import event, text
from sqlalchemy.orm import Session

from tests.sqlalchemy.uses.transactions import COUNT, add
from tests.sqlalchemy.uses.use import caught, status_of, use


@contextmanager
def listening(target: Any, name: str, listener: Any, **options: Any) -> Iterator[None]:
    """Listen to an event inside the block."""
    event.listen(target, name, listener, **options)
    try:
        yield
    finally:
        event.remove(target, name, listener)


@use()
def statements_are_changed(engine: sqlalchemy.Engine) -> object:
    def change(_: object, cursor: object, statement: str, parameters: Any, *rest: object) -> tuple[str, Any]:
        return f"/* by us */ {statement.replace('orders', 'lines')}", parameters

    with listening(engine, "before_cursor_execute", change, retval=True), engine.connect() as connection:
        found = [connection.scalar(COUNT), caught(connection.execute, text("select sku from orders"))]
    with engine.connect() as connection:
        return found, connection.scalar(COUNT)


@use()
def statements_are_counted(engine: sqlalchemy.Engine) -> object:
    seen: list[object] = []

    def before(_: object, cursor: Any, statement: str, parameters: Any, context: Any, executemany: bool) -> None:
        seen.append(("before", statement, parameters, executemany))

    def after(_: object, cursor: Any, statement: str, parameters: Any, context: Any, executemany: bool) -> None:
        seen.append(("after", statement, cursor.rowcount, cursor.statusmessage))

    with (
        listening(engine, "before_cursor_execute", before),
        listening(engine, "after_cursor_execute", after),
        engine.connect() as connection,
    ):
        connection.scalar(COUNT)
        add(connection, "lost")
        caught(connection.execute, text("selec"))
        connection.rollback()
        connection.execute(text("insert into orders (sku) values (:sku)"), [{"sku": "a"}, {"sku": "b"}])
        connection.commit()
    return seen


@use()
def statements_are_executed_by_the_user(engine: sqlalchemy.Engine) -> object:
    seen: list[str] = []

    def run(cursor: Any, statement: str, parameters: Any, context: Any) -> bool:
        seen.append(statement)
        cursor.execute(statement, parameters)
        return True

    def run_plain(cursor: Any, statement: str, context: Any) -> bool:
        seen.append(statement)
        cursor.execute(statement)
        return True

    def run_many(cursor: Any, statement: str, parameters: Any, context: Any) -> bool:
        seen.append(f"{len(parameters)} x {statement}")
        for one in parameters:
            cursor.execute(statement, one)
        return True

    with (
        listening(engine, "do_execute", run),
        listening(engine, "do_execute_no_params", run_plain),
        listening(engine, "do_executemany", run_many),
        engine.connect() as connection,
    ):
        found = [connection.scalar(COUNT), add(connection, "lost")]
        connection.rollback()
        add(connection, "kept")
        connection.commit()
        connection.execute(text("insert into orders (sku) values (:sku)"), [{"sku": "a"}, {"sku": "b"}])
        connection.commit()
        connection.execution_options(no_parameters=True).exec_driver_sql("select '%'")
        return found, seen, caught(connection.execute, text("select 1/0"))


@use()
def statements_are_only_seen(engine: sqlalchemy.Engine) -> object:
    seen: list[object] = []

    def see(cursor: Any, statement: str, parameters: Any, context: Any) -> None:
        seen.append((statement, parameters, status_of(cursor.connection)))

    with listening(engine, "do_execute", see), engine.connect() as connection:
        found = [connection.scalar(COUNT), add(connection, "lost"), caught(connection.execute, text("selec"))]
        connection.rollback()
        return found, connection.scalar(COUNT), [statement for statement, *_ in map(tuple, seen)]


@use()
def transactions_are_followed(engine: sqlalchemy.Engine) -> object:
    seen: list[str] = []
    names = (
        *("begin", "commit", "rollback", "savepoint", "rollback_savepoint", "release_savepoint"),
        *("begin_twophase", "prepare_twophase", "commit_twophase", "rollback_twophase", "engine_connect"),
    )
    listeners = {name: lambda *_, name=name: seen.append(name) for name in names}
    for name, listener in listeners.items():
        event.listen(engine, name, listener)
    with engine.begin() as connection:
        add(connection, "kept")
        with connection.begin_nested():
            add(connection, "too")
        connection.begin_nested().rollback()
    with engine.connect() as connection:
        caught(connection.execute, text("select 1/0"))
    with Session(engine, twophase=True) as session:
        add(session, "in two")
        session.commit()
    for name, listener in listeners.items():
        event.remove(engine, name, listener)
    return seen


@use()
def connections_are_followed(engine: sqlalchemy.Engine) -> object:
    seen: list[str] = []
    names = (
        "connect",
        "first_connect",
        "checkout",
        "checkin",
        "reset",
        "invalidate",
        "soft_invalidate",
        "close",
        "detach",
    )
    listeners = {name: lambda *_, name=name: seen.append(name) for name in names}
    for name, listener in listeners.items():
        event.listen(engine.pool, name, listener)
    with engine.connect() as connection:
        add(connection, "lost")
    with engine.connect() as connection:
        connection.invalidate()
        connection.scalar(COUNT)
        connection.detach()
    with engine.connect() as connection:
        connection.scalar(COUNT)
    for name, listener in listeners.items():
        event.remove(engine.pool, name, listener)
    # The first run's pool is new, and a pool forgets who listened to its first connection.
    return [name for name in seen if name != "first_connect"]


@use()
def connections_are_prepared(engine: sqlalchemy.Engine) -> object:
    def prepare(connection: Any, record: Any) -> None:
        cursor = connection.cursor()
        cursor.execute("set work_mem = '1234kB'")
        cursor.close()
        connection.commit()
        record.info["prepared"] = True

    def greet(connection: Any, record: Any, proxy: Any) -> None:
        cursor = connection.cursor()
        cursor.execute("select 1")
        cursor.close()
        connection.rollback()

    engine.dispose()
    with listening(engine, "connect", prepare), listening(engine, "checkout", greet):
        with engine.connect() as connection:
            found = [connection.scalar(text("show work_mem")), connection.info.get("prepared")]
            connection.execute(text("reset work_mem"))
            connection.commit()
        with engine.connect() as connection:
            found.append(connection.info.get("prepared"))
    engine.dispose()
    return found


@use()
def errors_are_replaced(engine: sqlalchemy.Engine) -> object:
    seen: list[object] = []

    def replace(context: Any) -> Exception | None:
        seen.append((context.statement, context.is_disconnect, context.original_exception))
        return LookupError("replaced") if "nowhere" in (context.statement or "") else None

    with listening(engine, "handle_error", replace), engine.connect() as connection:
        found = [caught(connection.execute, text("select * from nowhere"))]
        connection.rollback()
        found.append(caught(connection.execute, text("selec")))
        connection.rollback()
        return found, caught(add, connection, "cup"), seen


@use()
def statements_inside_a_listener(engine: sqlalchemy.Engine) -> object:
    def audit(connection: sqlalchemy.Connection, *_: object) -> None:
        connection.connection.cursor().execute("insert into lines (order_id, note) values (1, 'audit')")

    def settle(connection: sqlalchemy.Connection) -> None:
        connection.exec_driver_sql("set local work_mem = '1234kB'")

    with listening(engine, "commit", audit), listening(engine, "begin", settle), engine.connect() as connection:
        found = [add(connection, "kept"), connection.scalar(text("show work_mem"))]
        connection.commit()
        return found, connection.scalar(text("show work_mem"))


@use(pool_reset_on_return=None)
def a_reset_of_the_user(engine: sqlalchemy.Engine) -> object:
    seen: list[object] = []

    def reset(connection: Any, record: object, state: Any) -> None:
        seen.append((status_of(connection), state.terminate_only, state.asyncio_safe))
        connection.rollback()

    with listening(engine, "reset", reset):
        with engine.connect() as connection:
            add(connection, "lost")
        raw = engine.raw_connection()
        raw.cursor().execute("insert into orders (sku) values ('lost too')")
        raw.close()
    return seen


@use()
def what_a_connection_carries(engine: sqlalchemy.Engine) -> object:
    with engine.connect() as connection:
        connection.info["own"] = 7
        options = connection.execution_options(own=8).get_execution_options()
        found = [options.get("own"), connection.connection.record_info is not None]
        connection.scalar(COUNT)
    with engine.connect() as connection:
        found.append(connection.info.get("own"))
        connection.invalidate()
        return found, connection.info.get("own")
