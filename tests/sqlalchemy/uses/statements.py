"""Statements: one, many, and several in one string; results, cursors, and what a session holds."""

from __future__ import annotations

import inspect
from typing import Any

import sqlalchemy
from sqlalchemy import bindparam, text
from sqlalchemy.dialects.postgresql import insert

from tests.sqlalchemy.uses.orm import LINES, ORDERS
from tests.sqlalchemy.uses.transactions import COUNT, add
from tests.sqlalchemy.uses.use import PSYCOPG2, caught, driver_of, status_of, use

#: New in SQLAlchemy 2.0.10.
SORTS = "sort_by_parameter_order" in inspect.signature(sqlalchemy.Insert.returning).parameters

# One and many.


@use()
def row_counts(engine: sqlalchemy.Engine) -> object:
    with engine.begin() as connection:
        return [
            connection.execute(text(statement)).rowcount
            for statement in (
                "insert into orders (sku) values ('a'), ('b')",
                "update orders set amount = 7 where amount = 1",
                "update orders set amount = 7 where amount = 99",
                "delete from orders where sku = 'a'",
                "select * from orders",
                "create table made (id int)",
                "set local work_mem = '1MB'",
            )
        ]


@use()
def executemany(engine: sqlalchemy.Engine) -> object:
    with engine.begin() as connection:
        inserted = connection.execute(
            text("insert into orders (sku, amount) values (:sku, :amount)"),
            [{"sku": str(number), "amount": number + 1} for number in range(50)],
        )
        changed = ORDERS.update().where(ORDERS.c.sku == bindparam("which")).values(amount=99)
        updated = connection.execute(changed, [{"which": "1"}, {"which": "2"}])
        deleted = connection.exec_driver_sql("delete from orders where sku = %s", [("3",), ("4",)])
        return inserted.rowcount, updated.rowcount, deleted.rowcount


@use(PSYCOPG2, executemany_mode="values_plus_batch", executemany_batch_page_size=7)
def executemany_in_batches(engine: sqlalchemy.Engine) -> object:
    with engine.begin() as connection:
        changed = ORDERS.update().where(ORDERS.c.sku == bindparam("which")).values(amount=bindparam("to"))
        connection.execute(ORDERS.insert(), [{"sku": str(number)} for number in range(40)])
        updated = connection.execute(changed, [{"which": str(number), "to": number + 1} for number in range(40)])
        return updated.rowcount, connection.scalar(text("select sum(amount) from orders"))


@use()
def many_rows_returned(engine: sqlalchemy.Engine) -> object:
    rows = [{"sku": f"{number:04}"} for number in range(2500)]
    with engine.begin() as connection:
        kept = connection.execute(ORDERS.insert().returning(ORDERS.c.sku), rows).scalars().all()
        sorts: Any = {"sort_by_parameter_order": True} if SORTS else {}
        ordered = ORDERS.insert().returning(ORDERS.c.id, ORDERS.c.sku, **sorts)
        more = connection.execute(ordered, [{"sku": f"x{number}"} for number in range(30)]).all()
        return kept, more, connection.scalar(COUNT)


@use(insertmanyvalues_page_size=10)
def many_rows_in_pages(engine: sqlalchemy.Engine) -> object:
    rows = [{"sku": str(number)} for number in range(35)]
    with engine.begin() as connection:
        first = connection.execute(ORDERS.insert().returning(ORDERS.c.id), rows).all()

    def fails() -> None:
        with engine.begin() as connection:
            connection.execute(ORDERS.insert().returning(ORDERS.c.id), [{"sku": f"n{n % 30}"} for n in range(35)])

    return first, caught(fails)


@use()
def returning(engine: sqlalchemy.Engine) -> object:
    with engine.begin() as connection:
        added = connection.execute(ORDERS.insert().values(sku="new").returning(ORDERS.c.id, ORDERS.c.amount)).one()
        changed = connection.execute(ORDERS.update().values(amount=9).returning(ORDERS.c.sku)).scalars().all()
        gone = connection.execute(text("delete from orders where sku = 'pot' returning *")).mappings().all()
        moved = text(
            "with gone as (delete from orders where sku = 'pan' returning id)"
            " insert into orders (sku) select 'pan ' || id from gone returning sku"
        )
        return added, changed, [dict(row) for row in gone], connection.execute(moved).all()


@use()
def primary_keys_of_inserts(engine: sqlalchemy.Engine) -> object:
    with engine.begin() as connection:
        one = connection.execute(ORDERS.insert().values(sku="new"))
        many = connection.execute(ORDERS.insert(), [{"sku": "x"}, {"sku": "y"}])
        default = connection.execute(LINES.insert().values(order_id=1))
        return one.inserted_primary_key, many.rowcount, default.inserted_primary_key, caught(lambda: one.lastrowid)


@use()
def upsert(engine: sqlalchemy.Engine) -> object:
    wanted = insert(ORDERS).values(sku="cup", amount=5)
    with engine.begin() as connection:
        changed = wanted.on_conflict_do_update(index_elements=["sku"], set_={"amount": wanted.excluded.amount})
        found = [connection.execute(changed).rowcount]
        found.append(connection.execute(wanted.on_conflict_do_nothing()).rowcount)
        merge = "merge into orders o using (values ('cup'), ('jug')) s(k) on o.sku = s.k"
        merge += " when matched then update set amount = 8 when not matched then insert (sku) values (s.k)"
        return [*found, connection.execute(text(merge)).rowcount]


@use()
def the_same_statement_often(engine: sqlalchemy.Engine) -> object:
    with engine.connect() as connection:
        found: list[object] = []
        for number in range(12):
            found.append(connection.execute(text("select :n + amount from orders order by id"), {"n": number}).all())
            if number % 2:
                found.append(caught(add, connection, f"n{number // 4}"))
                connection.rollback()
            else:
                found.append(add(connection, f"m{number}"))
                connection.commit()
        return found


@use()
def no_rows_and_no_columns(engine: sqlalchemy.Engine) -> object:
    with engine.connect() as connection:
        bare = connection.execute(text("select from orders"))
        found = [bare.returns_rows, caught(bare.all)]
        twice = connection.execute(text("select 1 as a, 2 as a, 3"))
        found += [list(twice.keys()), twice.one()]
        nothing = connection.execute(text("create table made ()"))
        return found, nothing.returns_rows, caught(nothing.all), connection.scalar(text("select null"))


@use()
def a_result_after_its_transaction(engine: sqlalchemy.Engine) -> object:
    with engine.connect() as connection:
        result = connection.execute(text("select sku from orders order by id"))
        first = result.fetchone()
        connection.commit()
        rest = caught(result.fetchall)
        again = connection.execute(text("select sku from orders order by id"))
        connection.rollback()
        return first, rest, caught(again.all), caught(result.all)


@use()
def large_values(engine: sqlalchemy.Engine) -> object:
    with engine.begin() as connection:
        connection.execute(text("create table big (body text)"))
        connection.execute(text("insert into big values (:body)"), {"body": "ä" * 700_000})
        found = connection.scalar(text("select body from big"))
        return len(found), connection.scalar(text("select octet_length(body) from big"))


@use()
def cursor_attributes(engine: sqlalchemy.Engine) -> object:
    with engine.connect() as connection:
        found: list[object] = []
        for statement in ("select id, sku, amount::numeric(5, 2) from orders", "update orders set amount = 2"):
            cursor = connection.execute(text(statement)).cursor
            columns = None if cursor is None or cursor.description is None else [tuple(c) for c in cursor.description]
            found.append((columns, getattr(cursor, "statusmessage", None), getattr(cursor, "rowcount", None)))
        cursor = driver_of(connection).cursor()
        cursor.execute("insert into orders (sku) values ('raw') returning id")
        found.append((cursor.statusmessage, cursor.rowcount, cursor.fetchall(), cursor.rownumber))
        return found


# Texts.


@use()
def percent_signs(engine: sqlalchemy.Engine) -> object:
    with engine.connect() as connection:
        found = [
            connection.scalar(text("select 'a%b%%c' || :x"), {"x": "%s"}),
            connection.scalar(text("select 7 % 4, 'a' like '%'")),
            connection.exec_driver_sql("select '100%%' || %s", ("%",)).scalar(),
            connection.exec_driver_sql("select '100%%' || %(x)s", {"x": "%"}).scalar(),
        ]
        for statement, parameters in (("select '100%'", ()), ("select '100%%'", ()), ("select '100%' || %s", ("x",))):
            found.append(caught(connection.exec_driver_sql, statement, parameters))
            connection.rollback()
        bare = connection.execution_options(no_parameters=True)
        return found, caught(bare.exec_driver_sql, "select '5%%', '%(x)s'")


@use()
def colons(engine: sqlalchemy.Engine) -> object:
    with engine.connect() as connection:
        return [
            connection.scalar(text("select '7'::int + (:n)::int"), {"n": 1}),
            connection.scalar(text("select cast(:n as text) || '\\:x :: y'"), {"n": "a"}),
            connection.scalar(text("select (array[1,2,3])[2\\:3]")),
            caught(connection.scalar, text("select :missing")),
            caught(connection.scalar, text("select ':a' || :b"), {"b": "c"}),
            caught(connection.scalar, text("select :n::int"), {"n": 1}),
        ]


@use()
def empty_statements(engine: sqlalchemy.Engine) -> object:
    found: list[object] = []
    for statement in ("", " ", ";", "-- nothing", "/* nothing */", "/* nothing */;", ";;"):
        with engine.connect() as connection:
            found.append((statement, caught(connection.exec_driver_sql, statement), status_of(driver_of(connection))))
            connection.rollback()
            found.append(caught(connection.scalar, COUNT))
            found.append((caught(connection.exec_driver_sql, statement), caught(add, connection, "lost")))
    return found


@use()
def comments_and_semicolons(engine: sqlalchemy.Engine) -> object:
    found: list[object] = []
    for statement in (
        "select 1;",
        "select 1 ; -- end",
        "-- first\nselect 2",
        "/* a /* nested */ b */ select 3",
        "\n\t select 4 -- no newline",
        "(select 5)",
        "with a as (select 6) select * from a",
        "values (7), (8)",
        "table orders",
        "select 'it''s; -- no end', $$a;'b$$, e'\\'', \"sku\" from orders limit 1",
        "explain (costs off) select 1",
    ):
        with engine.connect() as connection:
            found.append((statement, caught(connection.exec_driver_sql, statement)))
            found.append(caught(connection.execute, text(statement.replace(":", "\\:"))))
            connection.commit()
    return found


@use()
def several_statements(engine: sqlalchemy.Engine) -> object:
    found: list[object] = []
    for script in (
        "insert into orders (sku) values ('one'); select count(*) from orders",
        "select 1; select 2;",
        "insert into orders (sku) values ('two'); update orders set amount = 5",
        "select 1; select 1/0; select 2",
        "insert into orders (sku) values ('lost'); selec",
        "insert into orders (sku) values ('three'); commit; insert into orders (sku) values ('four')",
        "insert into orders (sku) values ('five'); rollback; insert into orders (sku) values ('six')",
        "begin; insert into orders (sku) values ('seven'); commit; select 1",
        "create temp table t (a int); insert into t values (1); select * from t; drop table t",
    ):
        with engine.connect() as connection:
            found.append((script, caught(connection.exec_driver_sql, script), status_of(driver_of(connection))))
            connection.rollback()
            found.append(connection.scalar(COUNT))
    return found


@use()
def several_statements_after_a_first(engine: sqlalchemy.Engine) -> object:
    found: list[object] = []
    for end in ("commit", "rollback"):
        with engine.connect() as connection:
            add(connection, f"{end} 1")
            script = f"insert into orders (sku) values ('{end} 2'); insert into orders (sku) values ('{end} 3')"
            found.append(caught(connection.exec_driver_sql, script))
            getattr(connection, end)()
            found.append(connection.scalar(COUNT))
    return found


@use()
def several_statements_with_parameters(engine: sqlalchemy.Engine) -> object:
    script = text("insert into orders (sku) values (:a); insert into orders (sku) values (:b)")
    found: list[object] = []
    for first in (True, False):
        with engine.connect() as connection:
            if not first:
                add(connection, "lost")
            found.append(caught(connection.execute, script, {"a": "a", "b": "b"}))
            connection.rollback()
            found.append(connection.scalar(COUNT))
    return found


@use(isolation_level="AUTOCOMMIT")
def several_statements_in_autocommit(engine: sqlalchemy.Engine) -> object:
    with engine.connect() as connection:
        found = [caught(connection.exec_driver_sql, "insert into orders (sku) values ('lost'); select 1/0")]
        script = "insert into orders (sku) values ('kept'); insert into orders (sku) values ('kept too')"
        found.append(caught(connection.exec_driver_sql, script))
        return found, connection.scalar(COUNT)


# Not in a transaction.


@use()
def statements_that_refuse_a_transaction(engine: sqlalchemy.Engine) -> object:
    found: list[object] = []
    for statement in (
        "vacuum orders",
        "create database workerpools_compared",
        "drop database workerpools_compared",
        "create index concurrently on orders (amount)",
        "alter system reset work_mem",
    ):
        with engine.connect() as connection:
            found.append((statement, caught(connection.execute, text(statement)), status_of(driver_of(connection))))
            connection.rollback()
            connection.execution_options(isolation_level="AUTOCOMMIT")
            found.append((caught(connection.execute, text(statement)), status_of(driver_of(connection))))
        with engine.connect() as connection:
            add(connection, "lost")
    return found


@use()
def procedures(engine: sqlalchemy.Engine) -> object:
    with engine.begin() as connection:
        connection.execute(
            text("create procedure adds(inout n int) language plpgsql as 'begin n := n + 1; perform 1; end'")
        )
        connection.execute(
            text(
                "create procedure commits() language plpgsql as "
                "'begin insert into orders (sku) values (''a''); commit; insert into orders (sku) values (''b''); end'"
            )
        )
    with engine.connect() as connection:
        found = [caught(connection.execute, text("call adds(41)")), caught(connection.execute, text("call commits()"))]
        connection.rollback()
        found.append(connection.scalar(COUNT))
        connection.rollback()
        connection.execution_options(isolation_level="AUTOCOMMIT")
        found.append(caught(connection.execute, text("call commits()")))
        return found, connection.scalar(COUNT)


# What the server runs.


@use()
def blocks_of_code(engine: sqlalchemy.Engine) -> object:
    block = "do $$ begin insert into orders (sku) values ('by code'); perform 1 / {}; end $$"
    with engine.connect() as connection:
        found = [caught(connection.execute, text(block.format(0)))]
        connection.rollback()
        found.append(caught(connection.execute, text(block.format(1))))
        connection.commit()
        return found, connection.scalar(COUNT)


@use()
def functions_that_write(engine: sqlalchemy.Engine) -> object:
    with engine.begin() as connection:
        body = "insert into orders (sku) values ($1) returning id"
        connection.execute(text(f"create function adds(text) returns int language sql as '{body}'"))
        connection.execute(text("create view adding as select adds('by view') as id"))
    with engine.begin() as connection:
        found = [connection.scalar(text("select adds('a')"))]
        found.append(connection.scalar(sqlalchemy.select(sqlalchemy.func.adds("b"))))
        return [*found, connection.scalar(text("select id from adding"))]


@use()
def sequences(engine: sqlalchemy.Engine) -> object:
    with engine.connect() as connection:
        found = [caught(connection.scalar, text("select lastval()"))]
        connection.rollback()
        found.append(connection.scalar(text("select nextval('lines_id_seq')")))
        connection.rollback()
        found.append(connection.scalar(text("select currval('lines_id_seq')")))
        found.append(connection.scalar(sqlalchemy.Sequence("lines_id_seq")))
        return (
            found,
            connection.scalar(text("select lastval(), setval('lines_id_seq', 70)")),
            caught(lambda: connection.execute(LINES.insert().values(order_id=1)).inserted_primary_key),
        )


@use()
def statements_prepared_by_hand(engine: sqlalchemy.Engine) -> object:
    with engine.connect() as connection:
        connection.execute(text("prepare counts (int) as select count(*) from orders where amount >= $1"))
        found = [connection.scalar(text("execute counts(2)")), connection.scalar(text("execute counts(3)"))]
        connection.rollback()
        found.append(caught(connection.scalar, text("execute counts(1)")))
        connection.rollback()
        connection.execute(text("deallocate counts"))
        connection.commit()
        return found, caught(connection.scalar, text("execute counts(1)"))


@use()
def cursors_as_text(engine: sqlalchemy.Engine) -> object:
    with engine.connect() as connection:
        connection.execute(text("declare c scroll cursor for select sku from orders order by id"))
        found = [connection.execute(text(f"fetch {which} from c")).all() for which in ("2", "prior", "all")]
        connection.execute(text("close c"))
        connection.execute(text("declare h cursor with hold for select sku from orders order by id"))
        connection.commit()
        found.append(connection.execute(text("fetch 2 from h")).all())
        connection.execute(text("close h"))
        connection.commit()
        return found, caught(connection.execute, text("fetch 1 from c"))


@use()
def temporary_tables(engine: sqlalchemy.Engine) -> object:
    with engine.connect() as connection:
        connection.execute(text("create temporary table kept (a int)"))
        connection.execute(text("create temporary table emptied (a int) on commit delete rows"))
        connection.execute(text("create temporary table dropped (a int) on commit drop"))
        for table in ("kept", "emptied", "dropped"):
            connection.execute(text(f"insert into {table} values (1)"))
        connection.commit()
        found = [connection.scalar(text(f"select count(*) from {table}")) for table in ("kept", "emptied")]
        found.append(caught(connection.scalar, text("select count(*) from dropped")))
        connection.rollback()
        connection.execute(text("drop table kept, emptied"))
        connection.commit()
        return found


@use()
def a_schema_changed_and_rolled_back(engine: sqlalchemy.Engine) -> object:
    with engine.connect() as connection:
        connection.execute(text("alter table orders add column more int default 7"))
        found = [connection.execute(text("select more from orders")).all()]
        connection.rollback()
        found.append(caught(connection.execute, text("select more from orders")))
        connection.rollback()
        connection.execute(text("truncate orders restart identity cascade"))
        found.append(add(connection, "first"))
        connection.commit()
        return found


@use()
def a_search_path(engine: sqlalchemy.Engine) -> object:
    with engine.begin() as connection:
        connection.execute(text("create schema if not exists tenant"))
        connection.execute(text("create table tenant.orders (id serial, sku text, amount int)"))
        connection.execute(text("set local search_path = tenant, public"))
        found = [connection.scalar(COUNT)]
        mapped = connection.execution_options(schema_translate_map={None: "tenant"})
        found.append(mapped.execute(ORDERS.insert().values(sku="mapped")).rowcount)
        found.append(mapped.execute(sqlalchemy.select(ORDERS.c.sku)).all())
    with engine.begin() as connection:
        connection.execute(text("drop schema tenant cascade"))
        return found, connection.scalar(COUNT)


# Results in parts.


@use()
def streamed_rows(engine: sqlalchemy.Engine) -> object:
    series = text("select n from generate_series(1, 2500) n")
    with engine.connect() as connection:
        streamed = connection.execute(series, execution_options={"stream_results": True})
        found = [streamed.fetchmany(3), status_of(driver_of(connection))]
        streamed.close()
        add(connection, "kept")
        connection.commit()
        options = {"stream_results": True, "max_row_buffer": 20}
        with connection.execute(series, execution_options=options) as again:
            found.append(sum(row.n for row in again))
        return found, connection.scalar(COUNT)


@use()
def rows_in_partitions(engine: sqlalchemy.Engine) -> object:
    series = text("select n from generate_series(1, 95) n")
    with engine.connect() as connection:
        add(connection, "kept")
        with connection.execute(series, execution_options={"yield_per": 10}) as result:
            found = [len(part) for part in result.scalars().partitions()]
        connection.commit()
        with connection.execute(series, execution_options={"yield_per": 10}) as result:
            first = result.fetchone()
            return found, first, add(connection, "lost")


@use()
def an_error_while_rows_are_fetched(engine: sqlalchemy.Engine) -> object:
    failing = text("select 1 / (300 - n) from generate_series(1, 1000) n")
    with engine.connect() as connection:
        result = connection.execute(failing, execution_options={"yield_per": 100})
        found = [len(result.fetchmany(100)), len(result.fetchmany(100)), caught(result.fetchmany, 100)]
        found += [status_of(driver_of(connection)), caught(connection.scalar, COUNT)]
        connection.rollback()
        return found, connection.scalar(COUNT)


@use()
def rows_streamed_after_commit(engine: sqlalchemy.Engine) -> object:
    series = text("select n from generate_series(1, 5000) n")
    with engine.connect() as connection:
        options = {"stream_results": True, "max_row_buffer": 10}
        result = connection.execute(series, execution_options=options)
        found = [result.fetchone()]
        connection.commit()
        return found, caught(result.all)


# The catalogue.


@use()
def reflection(engine: sqlalchemy.Engine) -> object:
    inspector = sqlalchemy.inspect(engine)
    columns = [(column["name"], str(column["type"])) for column in inspector.get_columns("orders")]
    found = [sorted(inspector.get_table_names()), columns, inspector.get_pk_constraint("lines")]
    found += [inspector.get_foreign_keys("lines"), inspector.get_unique_constraints("orders")]
    found += [inspector.has_table("nowhere"), caught(inspector.get_columns, "nowhere")]
    table = sqlalchemy.Table("orders", sqlalchemy.MetaData(), autoload_with=engine)
    return found, sorted(table.columns.keys())


@use()
def reflection_in_a_transaction(engine: sqlalchemy.Engine) -> object:
    with engine.connect() as connection:
        connection.execute(text("create table made (a int primary key, b text)"))
        found = [sorted(sqlalchemy.inspect(connection).get_table_names())]
        connection.rollback()
        return found, sorted(sqlalchemy.inspect(connection).get_table_names())


@use()
def tables_from_metadata(engine: sqlalchemy.Engine) -> object:
    metadata = sqlalchemy.MetaData()
    sqlalchemy.Table("made", metadata, sqlalchemy.Column("a", sqlalchemy.Enum("x", "y", name="xy"), primary_key=True))
    metadata.create_all(engine)
    metadata.create_all(engine)
    with engine.begin() as connection:
        found = connection.execute(metadata.tables["made"].insert().values(a="x")).inserted_primary_key
    metadata.drop_all(engine)
    return found, sqlalchemy.inspect(engine).has_table("made")


# Notifications.


@use()
def notices(engine: sqlalchemy.Engine) -> object:
    heard: list[object] = []
    with engine.connect() as connection:
        driver = driver_of(connection)
        if hasattr(driver, "add_notice_handler"):
            driver.add_notice_handler(lambda notice: heard.append((notice.severity, notice.message_primary)))
        connection.execute(text("do $$ begin raise notice 'first'; raise warning 'second'; end $$"))
        connection.execute(text("drop table if exists nowhere"))
        connection.execute(text("set local client_min_messages = debug1"))
        connection.execute(text("do $$ begin raise info 'third'; raise debug 'fourth'; end $$"))
        connection.rollback()
        connection.execute(text("commit"))
        connection.execute(text("select 1"))
        return heard, [*getattr(driver, "notices", [])]
