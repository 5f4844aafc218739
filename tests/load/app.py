"""The application under load: eleven kinds of tasks, each over psycopg2 and over psycopg 3, behind proxies.

Configured by `LOAD_…` variables, because the library reads and checks every name that begins with `WORKERPOOLS_`.
"""

from __future__ import annotations

import os
from typing import Any

from celery import Celery, signals
from sqlalchemy import select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from tests.support.recorder import record
from workerpools import PooledTask, RetryPolicy, WorkerPools
from workerpools.httpx import HttpxClient
from workerpools.sqlalchemy import SQLAlchemyEngine, TaskSession

app = Celery("load", broker=os.environ["LOAD_BROKER"], backend=os.environ["LOAD_BROKER"])
pools = WorkerPools(app)

#: Outlasts a server that is away for a few seconds: the eight delays add up to 17 s on average.
POLICY = RetryPolicy(replays=2, max_retries=8, backoff=0.5, backoff_max=4.0)


class Model(DeclarativeBase):
    """The tables; the test makes them."""


class Product(Model):
    """What `read` reads."""

    __tablename__ = "products"
    number: Mapped[int] = mapped_column(primary_key=True)
    value: Mapped[int]


class Entry(Model):
    """One row for each time that something was done: no constraint hides what is done twice."""

    __tablename__ = "entries"
    id: Mapped[int] = mapped_column(primary_key=True)
    number: Mapped[int]


class Stock(Model):
    """What the idempotent tasks write: the same row again, however often they run."""

    __tablename__ = "stock"
    number: Mapped[int] = mapped_column(primary_key=True)


class FirstTask(PooledTask):
    """Over psycopg2."""

    replay = POLICY
    api = pools.add(HttpxClient(base_url=os.environ["LOAD_API"]))
    db = pools.add(SQLAlchemyEngine(os.environ["LOAD_PSYCOPG2"]), name="first")
    session = TaskSession(db)


class SecondTask(PooledTask):
    """Over psycopg 3, with the same client."""

    replay = POLICY
    api = FirstTask.api
    db = pools.add(SQLAlchemyEngine(os.environ["LOAD_PSYCOPG"]), name="second")
    session = TaskSession(db)


@signals.task_failure.connect(weak=False)
def task_failed(task_id: str, exception: BaseException, **_: object) -> None:
    """Record the notes: before Python 3.11 no traceback shows them."""
    record("failed", [task_id, getattr(exception, "__notes__", [])])


@app.task(base=PooledTask, name="load.child")
def child(number: int) -> None:
    """Sent by other tasks; uses nothing that breaks, so that each message is one run."""
    record("child", number)


def _declare(base: Any, driver: str) -> None:
    holding = type("Holding", (base,), {"abstract": True, "publish": "on_commit"})

    def task(base: Any = base, **options: Any) -> Any:
        def register(body: Any) -> Any:
            return app.task(base=base, bind=True, name=f"load.{driver}.{body.__name__}", **options)(body)

        return register

    @task()
    def read(self: Any, number: int) -> int:
        return int(self.session.scalars(select(Product.value).where(Product.number == number % 10)).one())

    @task()
    def get(self: Any, number: int) -> int:
        return int(self.api.get(f"/echo/{number}").raise_for_status().text)

    @task()
    def write(self: Any, number: int) -> int:
        self.session.add(Entry(number=number))
        return number

    @task(idempotent=True)
    def write_idempotent(self: Any, number: int) -> int:
        self.session.execute(insert(Stock).values(number=number).on_conflict_do_nothing())
        return number

    @task()
    def write_and_commit_itself(self: Any, number: int) -> int:
        self.session.add(Entry(number=number))
        self.session.commit()
        # On a connection that may be gone by now, with an effect that nothing takes back.
        self.session.scalars(select(Product.value).where(Product.number == 0)).one()
        return number

    @task()
    def pay(self: Any, number: int) -> int:
        answer = int(self.api.post(f"/pay/{number}").raise_for_status().text)
        self.session.add(Entry(number=number))
        return answer

    @task()
    def pay_with_key(self: Any, number: int) -> int:
        headers = {"Idempotency-Key": str(number)}
        answer = int(self.api.post(f"/pay/{number}", headers=headers).raise_for_status().text)
        self.session.add(Entry(number=number))
        return answer

    @task(idempotent=True)
    def pay_idempotent(self: Any, number: int) -> int:
        answer = int(self.api.post(f"/pay/{number}").raise_for_status().text)
        self.session.execute(insert(Stock).values(number=number).on_conflict_do_nothing())
        return answer

    @task()
    def send_on_commit(self: Any, number: int) -> int:
        child.delay_on_commit(number)
        self.session.add(Entry(number=number))
        return number

    @task(base=holding)
    def send_held(self: Any, number: int) -> int:
        child.delay(number)
        self.session.add(Entry(number=number))
        return number

    @task()
    def send_at_once(self: Any, number: int) -> int:
        self.session.add(Entry(number=number))
        self.session.flush()
        child.delay(number)
        # On a connection that may be gone by now, with a message that nothing takes back.
        self.session.scalars(select(Product.value).where(Product.number == 0)).one()
        return number


_declare(FirstTask, "psycopg2")
_declare(SecondTask, "psycopg")
