"""An application whose tasks fail after their COMMIT, or lose the library's loggers."""

from __future__ import annotations

import os

from celery import Celery
from sqlalchemy import event, text
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from workerpools import PooledTask, RetryPolicy, WorkerPools
from workerpools.sqlalchemy import SQLAlchemyEngine, TaskSession

broker = os.environ["SHOP_BROKER"]
app = Celery("sessions", broker=broker, backend=broker)
app.conf.broker_connection_retry_on_startup = True
pools = WorkerPools(app)


class Base(DeclarativeBase):
    pass


class Order(Base):
    __tablename__ = "orders"
    number: Mapped[int] = mapped_column(primary_key=True)
    run: Mapped[int]


class SessionsTask(PooledTask):
    db = pools.add(SQLAlchemyEngine(os.environ["SHOP_DATABASE"], check_after=600.0))
    session = TaskSession(db)


def fail(_: object) -> None:
    raise ZeroDivisionError


@app.task(base=SessionsTask, bind=True, name="shop.hook")
def hook(self: SessionsTask, number: int) -> None:
    """Have a listener fail after the COMMIT."""
    event.listen(self.session, "after_commit", fail)
    self.session.add(Order(number=number, run=0))


@app.task(base=SessionsTask, bind=True, name="shop.row")
def row(self: SessionsTask, number: int) -> Order:
    """Return what no result store can encode."""
    order = Order(number=number, run=0)
    self.session.add(order)
    return order


@app.task(base=SessionsTask, bind=True, name="shop.read_row")
def read_row(self: SessionsTask) -> object:
    """Return such a thing, having done nothing."""
    self.session.scalar(text("select 1"))
    return object()


@app.task(base=SessionsTask, bind=True, name="shop.ignored_row", ignore_result=True)
def ignored_row(self: SessionsTask, number: int) -> Order:
    """The same, with nobody to read it."""
    order = Order(number=number, run=0)
    self.session.add(order)
    return order


@app.task(base=SessionsTask, bind=True, name="shop.lost", replay=RetryPolicy(replays=1, max_retries=0))
def lost(self: SessionsTask) -> None:
    """Lose the session, in each of its two runs."""
    self.session.execute(text("select pg_terminate_backend(pg_backend_pid())"))


@app.task(base=SessionsTask, bind=True, name="shop.migrate")
def migrate(self: SessionsTask, ini: str, configures: bool) -> None:
    """Migrate over the session's connection."""
    from alembic import command
    from alembic.config import Config

    config = Config(ini)
    config.attributes.update(connection=self.session.connection(), configure_logger=configures)
    command.upgrade(config, "head")
