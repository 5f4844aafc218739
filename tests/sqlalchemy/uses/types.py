"""Values on their way to the server and back."""

from __future__ import annotations

import datetime as dt
import uuid
from decimal import Decimal
from typing import Any

import sqlalchemy
from sqlalchemy import Column, MetaData, Table, bindparam, cast, literal, select, text
from sqlalchemy.dialects import postgresql as pg

from tests.sqlalchemy.uses.use import PSYCOPG, PSYCOPG2, caught, driver_of, use

_UTC = dt.timezone.utc
_MOMENT = dt.datetime(2024, 2, 29, 23, 59, 59, 123456, tzinfo=dt.timezone(dt.timedelta(hours=-3)))

VALUES: tuple[tuple[Any, Any], ...] = (
    (pg.JSONB(), {"a": [1, None, "ä%s :x"], "b": {"c": 1.5}}),
    (pg.JSON(), None),
    (pg.JSON(none_as_null=True), None),
    (pg.ARRAY(sqlalchemy.Integer), [1, 2, None]),
    (pg.ARRAY(sqlalchemy.String, dimensions=2), [["a", "b,"], ['"', "\\"]]),
    (pg.ARRAY(pg.UUID()), [uuid.UUID(int=7)]),
    (pg.UUID(), uuid.UUID(int=7)),
    (pg.UUID(as_uuid=False), str(uuid.UUID(int=7))),
    (pg.BYTEA(), b"\0\xff%'\\"),
    (sqlalchemy.Numeric(20, 5), Decimal("-12345678901.12345")),
    (sqlalchemy.Numeric(asdecimal=False), 1.25),
    (pg.DOUBLE_PRECISION(), float("nan")),
    (pg.DOUBLE_PRECISION(), float("-inf")),
    (sqlalchemy.BigInteger(), 2**62),
    (sqlalchemy.Boolean(), True),
    (sqlalchemy.Text(), "ünï % :x '\" \\ \U0001f600\n"),
    (pg.TIMESTAMP(timezone=True), _MOMENT),
    (pg.TIMESTAMP(), dt.datetime(2024, 2, 29, 1, 2, 3)),
    (sqlalchemy.Date(), dt.date(1, 1, 1)),
    (pg.TIME(timezone=True), dt.time(1, 2, 3, tzinfo=_UTC)),
    (pg.INTERVAL(), dt.timedelta(days=-3, seconds=5, microseconds=7)),
    (pg.INT4RANGE(), pg.Range(1, 5, bounds="[)")),
    (pg.TSTZRANGE(), pg.Range(_MOMENT, None)),
    (pg.INET(), "10.0.0.1"),
    (pg.BIT(3), "101"),
    (pg.HSTORE(), {"a": "b", "c": None}),
)


@use()
def values_of_every_type(engine: sqlalchemy.Engine) -> object:
    columns = [Column(f"c{number}", kind) for number, (kind, _) in enumerate(VALUES)]
    table = Table("kinds", MetaData(), Column("id", sqlalchemy.Integer, primary_key=True), *columns)
    with engine.begin() as connection:
        # Where the test's database has the extension.
        connection.execute(text("set local search_path = public, extensions"))
        table.create(connection)
        row = {f"c{number}": value for number, (_, value) in enumerate(VALUES)}
        connection.execute(table.insert(), row)
        connection.execute(table.insert(), [row, {**row, "c0": None}])
        found = [tuple(row) for row in connection.execute(select(table).order_by(table.c.id))]
        back = connection.execute(table.insert().returning(*columns), [row, row]).all()
        return found, [tuple(row) for row in back]


@use()
def values_as_parameters(engine: sqlalchemy.Engine) -> object:
    found = []
    for kind, value in VALUES[:-1]:
        with engine.connect() as connection:
            found.append((str(kind), caught(connection.scalar, select(cast(literal(value, kind), kind)))))
            found.append(caught(connection.scalar, text("select :v").bindparams(bindparam("v", value, kind))))
    return found


@use()
def values_without_types(engine: sqlalchemy.Engine) -> object:
    values = (1, 2**40, 1.5, "a", b"b", None, True, Decimal("1.50"), _MOMENT, dt.date(2024, 1, 1), [1, 2], (1, 2))
    found: list[object] = []
    for value in (*values, {"a": 1}, {1, 2}, uuid.UUID(int=7), dt.timedelta(1), 3 + 4j):
        with engine.connect() as connection:
            found.append(caught(connection.exec_driver_sql, "select %s", (value,)))
            connection.rollback()
            found.append(caught(connection.execute, text("select pg_typeof(:v)::text, :v"), {"v": value}))
    return found


@use()
def lists_of_parameters(engine: sqlalchemy.Engine) -> object:
    among = text("select sku from orders where id in :ids order by id").bindparams(bindparam("ids", expanding=True))
    with engine.connect() as connection:
        found = [connection.execute(among, {"ids": ids}).all() for ids in ([1, 3], [], [2])]
        found.append(connection.execute(text("select id from orders where id = any(:ids)"), {"ids": [1, 2]}).all())
        compiled = select(literal("it's %")).compile(engine, compile_kwargs={"literal_binds": True})
        return found, str(compiled), connection.execute(select(literal("it's %"))).scalar()


@use()
def times_in_a_zone(engine: sqlalchemy.Engine) -> object:
    moment = text("select timestamptz '2024-07-01 12:00:00+00'")
    with engine.connect() as connection:
        connection.execute(text("set local time zone 'Asia/Tokyo'"))
        inside = connection.scalar(moment)
        connection.commit()
        after = connection.scalar(moment)
        return str(inside), str(after), connection.scalar(text("select timestamptz 'infinity' > now()"))


@use()
def values_that_python_lacks(engine: sqlalchemy.Engine) -> object:
    found = []
    for literal_ in ("date 'infinity'", "timestamp '10000-01-01'", "'(1,2)'::point", "row(1, 'a')", "'a=>1'::text"):
        with engine.connect() as connection:
            found.append((literal_, caught(connection.exec_driver_sql, f"select {literal_}")))
    return found


@use(PSYCOPG2)
def types_registered_with_psycopg2(engine: sqlalchemy.Engine) -> object:
    from psycopg2 import extensions, extras

    with engine.connect() as connection:
        driver = driver_of(connection)
        shout = extensions.new_type((1043, 25), "SHOUT", lambda value, _: value and value.upper())
        extensions.register_type(shout, driver)
        extras.register_composite("orders", driver)
        found = [
            connection.scalar(text("select 'quiet'::text")),
            str(connection.scalar(text("select o from orders o"))),
        ]
        connection.invalidate()
    with engine.connect() as connection:
        return found, connection.scalar(text("select 'quiet'::text"))


@use(PSYCOPG)
def types_registered_with_psycopg(engine: sqlalchemy.Engine) -> object:
    from psycopg.adapt import Loader
    from psycopg.types.composite import CompositeInfo, register_composite

    class Shout(Loader):
        def load(self, data: Any) -> str:
            return bytes(data).decode().upper()

    with engine.connect() as connection:
        driver = driver_of(connection)
        driver.adapters.register_loader("text", Shout)
        register_composite(CompositeInfo.fetch(driver, "orders"), driver)
        found = [
            connection.scalar(text("select 'quiet'::text")),
            str(connection.scalar(text("select o from orders o"))),
        ]
        connection.invalidate()
    with engine.connect() as connection:
        return found, connection.scalar(text("select 'quiet'::text"))
