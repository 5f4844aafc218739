"""Sessions and mapped classes."""

from __future__ import annotations

import sqlalchemy
from sqlalchemy import ForeignKey, event, select, text
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, relationship, selectinload, sessionmaker

from tests.sqlalchemy.uses.use import caught, driver_of, status_of, use


class Base(DeclarativeBase):
    """The classes' base."""


class Order(Base):
    __tablename__ = "orders"

    id: Mapped[int] = mapped_column(primary_key=True)
    sku: Mapped[str]
    amount: Mapped[int] = mapped_column(server_default=text("1"))
    lines: Mapped[list[Line]] = relationship(back_populates="order", cascade="all, delete-orphan", order_by="Line.id")


class Line(Base):
    __tablename__ = "lines"

    id: Mapped[int] = mapped_column(primary_key=True)
    order_id: Mapped[int] = mapped_column(ForeignKey("orders.id"))
    note: Mapped[str | None]
    order: Mapped[Order] = relationship(back_populates="lines")


ORDERS: sqlalchemy.Table = Base.metadata.tables["orders"]
LINES: sqlalchemy.Table = Base.metadata.tables["lines"]


@use()
def objects_are_added(engine: sqlalchemy.Engine) -> object:
    with Session(engine) as session:
        order = Order(sku="new", lines=[Line(note="a"), Line(note="b")])
        session.add(order)
        session.flush()
        found = [order.id, order.amount, [line.id for line in order.lines]]
        session.commit()
        order.amount = 5
        session.commit()
        session.refresh(order)
        return found, order.amount, len(order.lines), session.in_transaction()


@use()
def objects_are_added_in_bulk(engine: sqlalchemy.Engine) -> object:
    with Session(engine) as session, session.begin():
        session.add_all(Order(sku=f"a{number}", lines=[Line()]) for number in range(120))
        session.flush()
        inserted = session.scalars(sqlalchemy.insert(Order).returning(Order), [{"sku": f"b{n}"} for n in range(30)])
        found = [(order.id, order.sku) for order in inserted]
        session.execute(sqlalchemy.update(Order), [{"id": 1, "amount": 8}, {"id": 2, "amount": 9}])
        changed = sqlalchemy.update(Order).where(Order.amount > 7).values(amount=4)
        session.execute(changed, execution_options={"synchronize_session": "fetch"})
        return found, session.scalar(select(sqlalchemy.func.sum(Order.amount)))


@use()
def relationships_are_loaded(engine: sqlalchemy.Engine) -> object:
    with Session(engine) as session:
        session.add(Line(order_id=1, note="x"))
        session.add(Line(order_id=2, note="y"))
        session.commit()
        lazily = [(order.sku, [line.note for line in order.lines]) for order in session.scalars(select(Order))]
        session.expunge_all()
        eager = session.scalars(select(Order).options(selectinload(Order.lines)).order_by(Order.id))
        return sorted(lazily), [[line.note for line in order.lines] for order in eager]


@use()
def objects_are_deleted_and_merged(engine: sqlalchemy.Engine) -> object:
    with Session(engine) as session:
        order = session.scalars(select(Order).where(Order.id == 1)).one()
        session.delete(order)
        merged = session.merge(Order(id=2, sku="pot", amount=77))
        session.merge(Order(id=50, sku="merged"))
        session.commit()
        return merged.amount, session.get(Order, 1), caught(session.scalars(select(Order).where(Order.id == 1)).one)


@use()
def a_flush_that_fails(engine: sqlalchemy.Engine) -> object:
    with Session(engine) as session:
        session.add(Order(sku="cup"))
        found = [caught(session.flush), caught(session.scalar, text("select 1"))]
        session.rollback()
        session.add(Order(sku="new"))
        session.commit()
        return found, session.scalar(text("select count(*) from orders"))


@use()
def an_object_in_a_savepoint(engine: sqlalchemy.Engine) -> object:
    def adds(session: Session, sku: str) -> None:
        with session.begin_nested():
            session.add(Order(sku=sku))

    with Session(engine) as session:
        found = [caught(adds, session, sku) for sku in ("a", "cup", "b", "a")]
        session.commit()
        return found


@use()
def a_row_that_is_gone(engine: sqlalchemy.Engine) -> object:
    with Session(engine) as one, Session(engine) as other:
        order = one.scalars(select(Order).where(Order.id == 3)).one()
        one.commit()
        other.execute(text("delete from orders where id = 3"))
        other.commit()
        order.amount = 9
        return caught(one.commit), caught(one.commit)


@use()
def a_session_begins_by_itself(engine: sqlalchemy.Engine) -> object:
    with sessionmaker(engine)() as session:
        found: list[object] = [session.in_transaction()]
        session.add(Order(sku="lost"))
        found.append(session.in_transaction())
        session.rollback()
        session.scalar(text("select 1"))
        found.append(session.in_transaction())
        session.close()
        session.add(Order(sku="kept"))
        session.commit()
    with sessionmaker(engine).begin() as session:
        session.add(Order(sku="kept too"))
    return found


@use()
def options_of_a_sessions_connection(engine: sqlalchemy.Engine) -> object:
    show = text("show transaction_isolation")
    with Session(engine) as session:
        session.connection(execution_options={"isolation_level": "SERIALIZABLE"})
        found = [session.scalar(show), status_of(driver_of(session.connection()))]
        session.commit()
        return found, session.scalar(show)


@use()
def a_raw_cursor_of_a_session(engine: sqlalchemy.Engine) -> object:
    with Session(engine) as session:
        cursor = session.connection().connection.cursor()
        cursor.execute("insert into orders (sku) values ('first'), ('second')")
        found = [cursor.rowcount]
        cursor.close()
        session.rollback()
        session.add(Order(sku="kept"))
        session.flush()
        cursor = session.connection().connection.cursor()
        cursor.execute("insert into orders (sku) values (%s) returning id", ("raw",))
        found.append(cursor.fetchone())
        cursor.close()
        session.commit()
        return found


@use()
def a_driver_that_commits_under_a_session(engine: sqlalchemy.Engine) -> object:
    with Session(engine) as session:
        session.add(Order(sku="kept"))
        session.flush()
        driver = driver_of(session.connection())
        driver.commit()
        found = [status_of(driver)]
        session.add(Order(sku="lost"))
        session.flush()
        session.rollback()
        return found, session.scalar(text("select count(*) from orders"))


@use()
def events_of_a_session(engine: sqlalchemy.Engine) -> object:
    seen: list[str] = []
    with Session(engine) as session:
        for name in ("after_begin", "before_flush", "after_flush", "before_commit", "after_commit", "after_rollback"):
            event.listen(session, name, lambda *_, name=name: seen.append(name))
        session.add(Order(sku="kept"))
        session.commit()
        session.add(Order(sku="cup"))
        failed = caught(session.commit)
        session.rollback()
        return failed, seen


@use()
def a_session_of_a_connection(engine: sqlalchemy.Engine) -> object:
    with engine.connect() as connection, connection.begin() as outer:
        with Session(connection, join_transaction_mode="create_savepoint") as session:
            session.add(Order(sku="lost in the end"))
            session.commit()
            found = session.scalar(text("select count(*) from orders"))
        outer.rollback()
    return found
