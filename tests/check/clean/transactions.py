"""Transactions that say what they mean."""

from __future__ import annotations

import requests
from clean.app import app
from clean.clients import ShopTask
from clean.services import (
    Order,
    UnitOfWork,
    find,
    mark,
    reading,
    save_and_commit,
    session_scope,
    settle,
    try_to_keep,
    twice,
)
from django.db import transaction
from sqlalchemy import select, text, update
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session, sessionmaker

from workerpools.sqlalchemy import current_session

SessionLocal = sessionmaker()


@app.task(base=ShopTask, bind=True)
def pay(self: ShopTask, order: int) -> None:
    """Read, and send."""
    self.session.execute(select(text("1")))
    ship.delay(order)


@app.task(base=ShopTask, idempotent=True, autoretry_for=(OperationalError,))
def ship(order: int) -> None:
    """May run twice, and says so."""


@app.task(autoretry_for=(requests.RequestException,))
def ask(url: str) -> int:
    """May ask twice."""
    return requests.get(url, timeout=3).status_code


@app.task
def place(order: object) -> None:
    """Commit, then send."""
    with Session() as session:
        session.add(order)
        session.commit()
        pay.delay(1)


@app.task
def place_or_report(order: object, *, known: bool) -> None:
    """One or the other."""
    with Session() as session:
        if known:
            pay.delay(1)
        else:
            session.add(order)
        session.commit()


@app.task
def place_with_django(order: object) -> None:
    """After the commit."""
    seen = set()
    with transaction.atomic():
        order.save()
        transaction.on_commit(lambda: pay.delay(1))
    with transaction.atomic():
        seen.add(order)
        pay.delay(2)


@app.task(base=ShopTask, bind=True)
def place_by_pool(self: ShopTask, order: int) -> None:
    """After the commit."""
    self.session.execute(text("INSERT INTO orders VALUES (:id)"), {"id": order})
    pay.delay_on_commit(order)


@app.task(base=ShopTask, bind=True, publish="on_commit")
def place_and_hold(self: ShopTask, order: int) -> None:
    """All of its messages wait."""
    self.session.execute(text("INSERT INTO orders VALUES (:id)"), {"id": order})
    pay.delay(order)


@app.task(base=ShopTask, bind=True)
def undo(self: ShopTask, order: object) -> str:
    """Roll back what was done."""
    try:
        self.session.add(order)
    except ValueError:
        self.session.rollback()
        return "undone"
    return "done"


@app.task(base=ShopTask, bind=True)
def report(self: ShopTask, order: object) -> str:
    """Write with a session that does not commit by itself."""
    try:
        self.reports.add(order)
    except ValueError:
        return "not committed"
    return "done"


@app.task(base=ShopTask, bind=True)
def look_up(self: ShopTask, order: int) -> str:
    """Write nothing before the return."""
    try:
        return str(self.session.scalar(select(text("1"))))
    except ValueError:
        return "unknown"


@app.task(base=ShopTask, bind=True)
def by_another_name(self: ShopTask, order: object) -> None:
    """A session that does not commit by itself, and a name that is not one thing."""
    reports = self.reports
    reports.add(order)
    db = self.session
    db = self.reports
    db.add(order)
    pay.delay(1)


@app.task(base=ShopTask, bind=True)
def by_the_handle(self: ShopTask, order: object) -> None:
    """After the commit; and what does not commit."""
    ShopTask.session.get().add(order)
    ShopTask.reports.get().add(order)
    current_session().commit()
    pay.delay(1)


@app.task
def by_injection(order: object, session: Session = ShopTask.reports.inject()) -> str:
    """A session that does not commit by itself, and one of a client."""
    try:
        session.add(order)
        pay.delay(1)
    except ValueError:
        return "not committed"
    return "ok"


@app.task
def by_a_client(order: int, session: requests.Session) -> None:
    """A name that means something else."""
    session.delete("http://api.invalid", timeout=3)
    pay.delay(order)
    session.commit()  # type: ignore[attr-defined]


@app.task(base=ShopTask, bind=True)
def change_copies(self: ShopTask, order: int) -> None:
    """Attributes that are no columns, of what no session has loaded, or loads no longer."""
    found = self.session.get_one(Order, order)
    found.shown_total = "1.00"  # type: ignore[attr-defined]
    found._seen = True
    seen = Order()
    seen.status = found.status
    found.lines.update({"a": 1})
    pay.delay(order)


@app.task(base=ShopTask, bind=True)
def change_what_is_detached(self: ShopTask, order: int) -> None:
    """It belongs to no session."""
    found = self.session.get_one(Order, order)
    self.session.expunge(found)
    found.status = "shown"
    pay.delay(order)


@app.task(base=ShopTask, bind=True)
def read_in_bulk(self: ShopTask, order: int) -> None:
    """Nothing is written."""
    db = self.session
    statement = select(Order).where(Order.id == order)
    db.execute(statement)
    db.execute(text("SELECT 'INSERT INTO'"), {"what": "DELETE me"})
    db.query(Order).filter_by(id=order).first()
    pay.delay(order)


@app.task(base=ShopTask, bind=True)
def note_the_error(self: ShopTask, order: int) -> str:
    """What the handler writes is meant to be committed, and so is what was before."""
    found = self.session.get_one(Order, order)
    found.status = "CHARGING"
    try:
        requests.get("http://api.invalid", timeout=3)
    except requests.RequestException:
        found.status = "FAILED"
        return "failed"
    return "paid"


@app.task(base=ShopTask, bind=True)
def return_early(self: ShopTask, order: Order, *, known: bool) -> None:
    """One or the other."""
    if known:
        self.session.add(order)
        return
    pay.delay(1)


@app.task
def begin_by_a_factory(order: object) -> None:
    """After the block."""
    with SessionLocal.begin() as db:
        db.add(order)
    pay.delay(1)
    with SessionLocal() as db, db.begin():
        db.execute(update(Order))
    pay.delay(1)


@app.task(base=ShopTask, bind=True)
def by_a_service(self: ShopTask, order: int) -> None:
    """What reads, what commits, what nobody knows, and what may commit."""
    find(self.session, order)
    pay.delay(order)
    save_and_commit(self.session, Order())
    pay.delay(order)
    settle(self.session, Order())
    pay.delay(order)
    mark(Order())
    pay.delay(order)


@app.task(base=ShopTask, bind=True)
def by_a_service_that_tells(self: ShopTask, order: int) -> bool:
    """It returns, and an error is raised."""
    if not try_to_keep(self.session, Order()):
        raise ValueError(order)
    return True


@app.task
def in_a_scope(order: object) -> None:
    """After the block, after a commit of its own, without a commit, and in the block of another session."""
    with session_scope() as db:
        db.add(order)
    pay.delay(1)
    with session_scope() as db:
        db.add(order)
        db.commit()
        pay.delay(1)
    with session_scope() as db:
        db.scalar(select(Order))
        pay.delay(1)
    with reading() as db:
        db.add(order)
        pay.delay(1)
    with UnitOfWork() as work:
        work.add(order)
        work.commit()
        pay.delay(1)
    with twice() as entered:
        entered.add(order)
        pay.delay(1)


class Step(ShopTask):
    """Its body is another method's, of each class that inherits from it."""

    abstract = True

    def run(self, order: object) -> str:
        """Call it."""
        said = self.run_impl(order)
        if said == "error":
            raise ValueError(said)
        return said

    def run_impl(self, order: object) -> str:
        """None."""
        raise NotImplementedError


class PatientStep(Step):
    """The message waits for the commit, and an error is looked at by who calls."""

    def run_impl(self, order: object) -> str:
        try:
            self.session.add(order)
            pay.delay_on_commit(1)
        except ValueError:
            return "error"
        return "ok"
