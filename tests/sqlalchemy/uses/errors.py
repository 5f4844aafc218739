"""Errors: classes, codes and texts, and what a transaction is worth after one."""

from __future__ import annotations

from typing import Any

import pytest
import sqlalchemy
from sqlalchemy import text
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

from tests.sqlalchemy.uses.orm import LINES, ORDERS
from tests.sqlalchemy.uses.transactions import COUNT, add
from tests.sqlalchemy.uses.use import PSYCOPG2, caught, driver_of, status_of, use

#: One of each kind that a server answers.
WRONG = (
    "selec 1",
    "select 1/0",
    "select * from nowhere",
    "select nothing\nfrom orders",
    "select no_such_function(1)",
    "select 'x'::int",
    "select 99999999999999999999::int",
    "select sku + 1 from orders",
    "select id from orders o, lines l",
    "insert into orders (sku) values ('cup')",
    "insert into orders (sku, amount) values ('new', 0)",
    "insert into orders (sku, amount) values ('new', null)",
    "insert into lines (order_id, note) values (1, 'more than twenty characters')",
    "select * from orders where",
    "drop table orders",
    "select '{1,2'::int[]",
    "do $$ begin raise exception 'own %', 7 using errcode = 'WP001', hint = 'a hint', detail = 'a detail'; end $$",
    "do $$ begin\n  perform 1;\n  perform 1/0;\nend $$",
    "set role nobody_at_all",
    "select pg_terminate_backend(1, 2, 3)",
    "commit prepared 'nothing'",
    "lock table nowhere",
    "refresh materialized view nowhere",
    "select 1 as a group by b order by",
)


def after(connection: sqlalchemy.Connection) -> object:
    """Return what the connection is worth after an error: first in its transaction, then in the next."""
    driver = driver_of(connection)
    found = [status_of(driver), caught(connection.scalar, COUNT)]
    connection.rollback()
    return [*found, status_of(driver), connection.scalar(COUNT), add(connection, "after")]


@use()
def errors_in_a_first_statement(engine: sqlalchemy.Engine) -> object:
    found = []
    for statement in WRONG:
        with engine.connect() as connection:
            found.append(
                (statement, caught(connection.execute, text(statement.replace(":", "\\:"))), after(connection))
            )
    return found


@use()
def errors_in_the_middle(engine: sqlalchemy.Engine) -> object:
    found = []
    for statement in WRONG:
        with engine.connect() as connection:
            add(connection, "lost")
            found.append((statement, caught(connection.exec_driver_sql, statement), after(connection)))
    return found


@use(isolation_level="AUTOCOMMIT")
def errors_in_autocommit(engine: sqlalchemy.Engine) -> object:
    with engine.connect() as connection:
        return [
            (statement, caught(connection.exec_driver_sql, statement), status_of(driver_of(connection)))
            for statement in WRONG
        ]


@use()
def errors_without_a_rollback(engine: sqlalchemy.Engine) -> object:
    found = []
    for statement in ("selec", "select 1/0", "select * from nowhere"):
        with engine.connect() as connection:
            found.append(caught(connection.execute, text(statement)))
        with engine.connect() as connection:
            found.append((status_of(driver_of(connection)), connection.scalar(COUNT)))
    return found


@use()
def errors_with_parameters(engine: sqlalchemy.Engine) -> object:
    wrong: list[tuple[str, dict[str, Any]]] = [
        ("select :a / :b", {"a": 1, "b": 0}),
        ("select cast(:a as int)", {"a": "x"}),
        ("selec :a", {"a": 1}),
        ("select :a from nowhere", {"a": 1}),
        ("select :a, :b", {"a": 1}),
    ]
    found = []
    for statement, parameters in wrong:
        with engine.connect() as connection:
            found.append((statement, caught(connection.execute, text(statement), parameters), after(connection)))
    return found


@use()
def errors_of_the_driver(engine: sqlalchemy.Engine) -> object:
    wrong: list[tuple[str, Any]] = [
        ("select %s", (object,)),
        ("select %s", (1, 2)),
        ("select %s, %s", (1,)),
        ("select %(a)s", {"b": 1}),
        ("select %s", ("a\0b",)),
        ("select %s", ("\udc80",)),
        ("select 'a\0b'", ()),
        ("select %d", (1,)),
        ("select %(a", {"a": 1}),
    ]
    found = []
    for statement, parameters in wrong:
        with engine.connect() as connection:
            found.append((statement, caught(connection.exec_driver_sql, statement, parameters), after(connection)))
    return found


@use()
def errors_of_sqlalchemy(engine: sqlalchemy.Engine) -> object:
    with engine.connect() as connection:
        found = [caught(connection.execute, ORDERS.insert(), [{"sku": "a"}, {"amount": 1}])]
        found.append(caught(connection.execute, "select 1"))
        found.append(caught(connection.execute, ORDERS.insert().values(nothing=1)))
        found.append(caught(connection.scalar, COUNT))
        found.append(caught(connection.begin))
        connection.close()
        return found, caught(connection.execute, COUNT)


@use()
def errors_among_many(engine: sqlalchemy.Engine) -> object:
    rows = [{"sku": "a"}, {"sku": "b"}, {"sku": "cup"}, {"sku": "c"}]
    found = []
    for statement in (ORDERS.insert(), ORDERS.insert().returning(ORDERS.c.id), ORDERS.insert().values(amount=1)):
        with engine.connect() as connection:
            found.append((caught(connection.execute, statement, rows), after(connection)))
    with engine.connect() as connection:
        change = text("update orders set amount = :amount where sku = :sku")
        amounts = [{"sku": "cup", "amount": 4}, {"sku": "pot", "amount": 0}]
        return found, caught(connection.execute, change, amounts), after(connection)


@use()
def an_error_that_is_caught_and_goes_on(engine: sqlalchemy.Engine) -> object:
    with engine.connect() as connection:
        add(connection, "lost")
        found = [caught(add, connection, "cup"), caught(add, connection, "refused")]
        connection.rollback()
        add(connection, "kept")
        connection.commit()
        found.append(caught(add, connection, "pot"))
        connection.rollback()
        add(connection, "kept too")
        connection.commit()
        return found


@use()
def errors_that_leave_a_block(engine: sqlalchemy.Engine) -> object:
    def by_statement() -> None:
        with engine.begin() as connection:
            add(connection, "lost")
            add(connection, "cup")

    def by_body() -> None:
        with Session(engine) as session, session.begin():
            add(session, "lost")
            raise KeyError("by the body")

    return caught(by_statement), caught(by_body)


@use()
def a_foreign_key(engine: sqlalchemy.Engine) -> object:
    with engine.connect() as connection:
        connection.execute(text("set constraints of_order immediate"))
        found = [caught(connection.execute, LINES.insert().values(order_id=99)), after(connection)]
        connection.rollback()
        connection.execute(LINES.insert().values(order_id=1))
        connection.execute(text("set constraints of_order immediate"))
        return found, caught(connection.execute, ORDERS.delete().where(ORDERS.c.id == 1))


@use()
def a_trigger_that_raises(engine: sqlalchemy.Engine) -> object:
    with engine.begin() as connection:
        connection.execute(
            text(
                "create function no() returns trigger language plpgsql as"
                " 'begin raise exception ''not %'', new.sku using errcode = ''P0042''; end'"
            )
        )
        connection.execute(text("create trigger no before insert on orders for each row execute function no()"))
    with engine.connect() as connection:
        return caught(add, connection, "new"), status_of(driver_of(connection))


# In a pipeline psycopg drops the server's last words with what it had read before: OperationalError, without a code.
@use(PSYCOPG2)
def a_session_that_is_ended(engine: sqlalchemy.Engine) -> object:
    ended = text("select pg_terminate_backend(pg_backend_pid())")
    with engine.connect() as connection:
        first = caught(connection.execute, ended)
        refused = caught(connection.execute, COUNT)
        connection.rollback()
        return first, refused, connection.scalar(COUNT), add(connection, "lost")


@use()
def a_session_that_is_ended_and_replaced(engine: sqlalchemy.Engine) -> object:
    ended = text("select pg_terminate_backend(pg_backend_pid())")
    with engine.connect() as connection:
        with pytest.raises(OperationalError) as raised:
            connection.execute(ended)
        refused = caught(connection.execute, COUNT)
        connection.rollback()
        return raised.value.connection_invalidated, refused, connection.scalar(COUNT), add(connection, "lost")
