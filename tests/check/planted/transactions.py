"""Transactions."""

from __future__ import annotations

import httpx
import requests
from celery import shared_task
from django.db import transaction
from planted.app import app
from planted.hazards import engine, pools
from sqlalchemy import text
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

from workerpools import PooledTask
from workerpools.sqlalchemy import SQLAlchemyEngine, TaskSession


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
