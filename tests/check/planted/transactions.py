"""Transactions."""

from __future__ import annotations

import httpx
import requests
from celery import shared_task
from django.db import transaction
from planted import services
from planted.app import app
from planted.hazards import Scoped, engine, pools
from planted.services import Order, UnitOfWork, cancel, give_up, mark_and_tell, session_scope, settle
from sqlalchemy import select, text, update
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session, sessionmaker

from workerpools import PooledTask
from workerpools.sqlalchemy import SQLAlchemyEngine, TaskSession, current_session

SessionLocal = sessionmaker(engine)


class OrderTask(PooledTask):
    """A base with a session that commits when the body returns."""

    abstract = True

    db = pools.add(SQLAlchemyEngine("sqlite://"))
    session = TaskSession(db)


class BusyTask(OrderTask):
    """A base that says it for all."""

    abstract = True
    autoretry_for = (OperationalError, ValueError)  # planted: WP208


@app.task(base=BusyTask, bind=True)
def pay(self: BusyTask) -> None:
    """Inherits it."""


@app.task(autoretry_for=(httpx.HTTPError,))  # planted: WP208
def charge(url: str) -> None:
    """Post."""
    httpx.post(url)  # planted: WP202


@shared_task(autoretry_for=(Exception,))  # planted: WP208
def notify(url: str) -> None:
    """Post."""
    requests.post(url, timeout=3)  # planted: WP202


@app.task
def place(order: object) -> None:
    """The message leaves before the commit."""
    with Session(engine) as session:
        session.add(order)
        pay.delay()  # planted: WP210
        session.commit()


@app.task
def place_in_a_block(order: object) -> None:
    """In a block that commits at its end."""
    with Session(engine) as session, session.begin():
        session.add(order)
        pay.apply_async()  # planted: WP210


@app.task
@transaction.atomic
def place_with_django(order: object) -> None:
    """The whole body is a transaction."""
    order.save()
    pay.delay()  # planted: WP210


@app.task(base=OrderTask, bind=True)
def place_by_pool(self: OrderTask, order: int) -> None:
    """The session commits when the body has returned."""
    self.session.execute(text("INSERT INTO orders VALUES (:id)"), {"id": order})
    pay.delay()  # planted: WP210


@app.task(base=OrderTask, bind=True)
def swallow(self: OrderTask, order: object) -> dict[str, str]:
    """Half of the work is committed."""
    try:
        self.session.add(order)
        charge("http://api.invalid")
    except ValueError:
        return {"status": "error"}  # planted: WP211
    return {"status": "ok"}


@app.task(base=OrderTask, bind=True)
def by_another_name(self: OrderTask, order: object) -> None:
    """The same session."""
    db = self.session
    db.add(order)
    pay.delay()  # planted: WP210


@app.task(base=OrderTask, bind=True)
def by_the_handle(self: OrderTask, order: object) -> None:
    """The same session."""
    OrderTask.session.get().add(order)
    pay.delay()  # planted: WP210


@app.task(base=OrderTask)
def by_the_current_one(order: object) -> None:
    """The same session."""
    current = current_session()
    current.add(order)
    pay.delay()  # planted: WP210


@app.task
def by_injection(order: object, session: Session = OrderTask.session.inject()) -> str:
    """The same session, without self."""
    try:
        session.add(order)
        pay.delay()  # planted: WP210
    except ValueError:
        return "error"  # planted: WP211
    return "ok"


@app.task(base=OrderTask, bind=True)
def change_what_was_loaded(self: OrderTask, order: int) -> None:
    """An attribute is written when the session commits."""
    found = self.session.get_one(Order, order)
    found.status = "PAID"
    pay.delay()  # planted: WP210


@app.task(base=OrderTask, bind=True)
def change_all(self: OrderTask) -> str:
    """Those of a loop, too."""
    try:
        for order in self.session.scalars(select(Order)).all():
            order.attempts += 1
        charge("http://api.invalid")
    except ValueError:
        return "error"  # planted: WP211
    return "ok"


@app.task(base=OrderTask, bind=True)
def change_in_bulk(self: OrderTask, order: int) -> str:
    """By a query."""
    try:
        self.session.query(Order).filter_by(id=order).update({"status": "PAID"})
        charge("http://api.invalid")
    except ValueError:
        return "error"  # planted: WP211
    return "ok"


@app.task(base=OrderTask, bind=True)
def change_by_a_statement(self: OrderTask, order: int) -> None:
    """Built before."""
    db = self.session
    statement = update(Order).values(status="PAID")
    statement = statement.where(Order.id == order)
    db.execute(statement)
    pay.delay()  # planted: WP210


@app.task
def begin_by_a_factory(order: object) -> None:
    """The block commits, whatever the session is called."""
    with SessionLocal.begin() as db:
        db.add(order)
        pay.delay()  # planted: WP210
    with Session(engine) as db, db.begin():
        db.add(order)
        pay.delay()  # planted: WP210
    mine = Scoped()
    mine.add(order)
    pay.delay()  # planted: WP210
    mine.commit()


@app.task(base=OrderTask, bind=True)
def by_a_service(self: OrderTask, order: int) -> None:
    """Of another module."""
    settle(self.session, Order())
    pay.delay()  # planted: WP210


@app.task(base=OrderTask, bind=True)
def sent_by_a_service(self: OrderTask, order: int) -> None:
    """Of another module, called by its module's name."""
    mark_and_tell(pay, self.session.get(Order, order))
    services.settle_by_itself(Order())
    pay.delay()  # planted: WP210


@app.task(base=OrderTask, bind=True)
def swallowed_after_a_service(self: OrderTask, order: int) -> str:
    """Half of the work is committed."""
    try:
        cancel(order, session=self.session)
        charge("http://api.invalid")
    except ValueError:
        return "error"  # planted: WP211
    return "ok"


@app.task(base=OrderTask, bind=True)
def swallowed_by_a_service(self: OrderTask, order: int) -> bool:
    """What it returns is the task's result."""
    return give_up(self.session, Order())


@app.task
def in_a_scope(order: object) -> None:
    """Each block commits at its end."""
    with session_scope() as db:
        db.add(order)
        pay.delay()  # planted: WP210
    with services.begun() as db:
        db.add(order)
        pay.delay()  # planted: WP210
    with UnitOfWork() as work:
        work.add(order)
        pay.delay()  # planted: WP210
    with Session(engine) as mine, services.kept(mine):
        mine.add(order)
        pay.delay()  # planted: WP210


@app.task(base=OrderTask)
def in_a_scope_of_the_run(order: object) -> None:
    """The session commits when the body has returned."""
    with services.of_the_run() as db:
        db.add(order)
    pay.delay()  # planted: WP210


class Step(OrderTask):
    """Its body is another method's, of each class that inherits from it."""

    abstract = True

    def run(self, order: object) -> str:
        """Call it."""
        said = self.run_impl(order)
        self.update_state(state="DONE")
        return said

    def run_impl(self, order: object) -> str:
        """None."""
        raise NotImplementedError


class TellingStep(Step):
    """The message leaves before the commit."""

    def run_impl(self, order: object) -> str:
        self.session.add(order)
        pay.delay()  # planted: WP210
        return requests.get("http://api.invalid").text  # planted: WP202, WP205


class SilentStep(Step):
    """Half of the work is committed."""

    def run_impl(self, order: object) -> str:
        try:
            self.session.add(order)
            charge("http://api.invalid")
        except ValueError:
            return "error"  # planted: WP211
        return "ok"
