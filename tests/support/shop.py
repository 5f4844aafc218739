"""The app that the attempts of these tests belong to."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import httpx
import sqlalchemy
from celery import Celery
from sqlalchemy import text

from tests.support.databases import Database
from tests.support.proxy import TcpProxy
from workerpools import PooledTask, WorkerPools
from workerpools.events import Event, EventKind
from workerpools.httpx import HttpxClient
from workerpools.sqlalchemy import SQLAlchemyEngine, TaskSession

NUMBERS = itertools.count()


class Shop:
    """An app with one base, eager, on a database of its own."""

    TABLE = "create table orders (id int primary key deferrable initially deferred)"

    def __init__(self, database: Database, driver: str, proxy: TcpProxy | None = None) -> None:
        self.database = database
        self.events: list[Event] = []
        self.app = Celery(f"shop{next(NUMBERS)}", set_as_current=False, backend="cache+memory://")
        self.app.conf.task_always_eager = True
        self.pools = WorkerPools(self.app)
        self.pools.subscribe(self.events.append)
        reached = database if proxy is None else database.through(proxy)
        # However slow the machine is, an idle connection is trusted: what finds it dead is the task.
        engine = self.pools.add(SQLAlchemyEngine(reached.url(driver), check_after=600.0), name="db")

        class ShopTask(PooledTask):
            abstract = True
            db = engine
            session = TaskSession(engine)

        self.base = ShopTask
        self.engine = engine
        if proxy is not None:
            self.proxy = proxy
        with engine.get().begin() as connection:
            connection.execute(text(self.TABLE))

    def close(self) -> None:
        """Close the connections."""
        self.pools.close()

    def add_api(self, base_url: str) -> None:
        """Give the base a client as well."""
        limits = httpx.Limits(keepalive_expiry=600.0)
        self.api = api = self.pools.add(HttpxClient(base_url=base_url, limits=limits), name="api")
        self.base = type("ShopTask", (self.base,), {"abstract": True, "api": api})

    def replays(self) -> int:
        """Return how often a body was run again."""
        return sum(event.kind is EventKind.ATTEMPT_REPLAYED for event in self.events)

    def task(self, **options: Any) -> Callable[[Callable[..., Any]], Any]:
        options.setdefault("bind", True)
        options.setdefault("base", self.base)
        options.setdefault("name", f"task{next(NUMBERS)}")
        # Celery keeps a shared task, with its base and its resources, for every app of the process to come.
        options.setdefault("shared", False)
        return lambda body: self.app.task(**options)(body)

    def rows(self) -> list[int]:
        with sqlalchemy.create_engine(self.database.url()).connect() as connection:
            return list(connection.execute(text("select id from orders order by id")).scalars())

    def checked_out(self) -> int:
        pool = self.engine.get().pool
        assert isinstance(pool, sqlalchemy.pool.QueuePool)
        return pool.checkedout()


def insert(session: Any, number: int) -> None:
    session.execute(text("insert into orders values (:number)"), {"number": number})
