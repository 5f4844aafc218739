"""Transactions that say what they mean."""

from __future__ import annotations

import requests
from clean.app import app
from clean.clients import ShopTask
from django.db import transaction
from sqlalchemy import select, text
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session


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
