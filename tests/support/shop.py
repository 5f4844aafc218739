"""The app of the tests that need no worker: its pools, a task base, and what was told of them."""

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
from workerpools import PooledTask, Resource, WorkerPools
from workerpools.events import Event, EventKind
from workerpools.httpx import HttpxClient
from workerpools.sqlalchemy import SQLAlchemyEngine, TaskSession

NUMBERS = itertools.count()

_TABLES = {
    "postgresql": "create table orders (id int primary key deferrable initially deferred)",
    "mysql": "create table orders (id int primary key)",
}


class Shop:
    """An app of its own name, whose tasks have one base.

    Args:
        database: Where the base's engine and session lead; a table `orders` is made there. None for no engine yet.
        driver: SQLAlchemy's name of the driver.
        proxy: What the engine's connections go through.
        eager: Whether a task runs where it is called; otherwise it is sent to a memory broker of the process.

    Attributes:
        base: The base of the tasks to come.
        events: What the library told its listeners.
    """

    database: Database
    engine: Resource[sqlalchemy.Engine]
    api: Resource[httpx.Client]
    proxy: TcpProxy

    def __init__(
        self,
        database: Database | None = None,
        driver: str = "psycopg2",
        proxy: TcpProxy | None = None,
        *,
        eager: bool = True,
    ) -> None:
        name = f"shop{next(NUMBERS)}"
        self.driver = driver
        self.events: list[Event] = []
        if eager:
            self.app = Celery(name, set_as_current=False, backend="cache+memory://")
            self.app.conf.task_always_eager = True
        else:
            self.app = Celery(name, broker="memory://", set_as_current=False)
            # The memory broker's queues belong to the process: a queue of its own for each app.
            self.app.conf.task_default_queue = name
        self.pools = WorkerPools(self.app)
        self.pools.subscribe(self.events.append)
        self.base: type[PooledTask] = type("ShopTask", (PooledTask,), {"abstract": True})
        if database is not None:
            self.database = database
            if proxy is not None:
                self.proxy = proxy
            reached = database if proxy is None else database.through(proxy)
            engine = self.add_database(reached.url(driver)).get()
            with engine.begin() as connection:
                connection.execute(text(_TABLES[engine.dialect.name]))

    def add_database(self, url: Any, **options: Any) -> Resource[sqlalchemy.Engine]:
        """Give the base an engine, ``self.db``, and ``self.session``; options are those of `SQLAlchemyEngine`."""
        # However slow the machine is, an idle connection is trusted: what finds it dead is the task.
        self.engine = engine = self.pools.add(SQLAlchemyEngine(url, **{"check_after": 600.0, **options}), name="db")
        self._extend(db=engine, session=TaskSession(engine))
        return engine

    def add_api(self, base_url: str, **options: Any) -> Resource[httpx.Client]:
        """Give the base a client, ``self.api``; options are those of `HttpxClient`."""
        if options.keys().isdisjoint(("max_connections", "transport")):
            options.setdefault("limits", httpx.Limits(keepalive_expiry=600.0))
        self.api = api = self.pools.add(HttpxClient(base_url=base_url, **options), name="api")
        self._extend(api=api)
        return api

    def another(self, **options: Any) -> tuple[Resource[sqlalchemy.Engine], type[PooledTask]]:
        """Add an engine with other options; return it, and a base whose session uses it."""
        url = self.database.through(self.proxy).url(self.driver)
        engine = self.pools.add(SQLAlchemyEngine(url, **options), name=f"db{next(NUMBERS)}")
        members = {"abstract": True, "db": engine, "session": TaskSession(engine)}
        return engine, type("Another", (self.base,), members)

    def task(self, **options: Any) -> Callable[[Callable[..., Any]], Any]:
        """Register the decorated body; options are those of `Celery.task`."""
        options.setdefault("bind", True)
        options.setdefault("base", self.base)
        options.setdefault("name", f"task{next(NUMBERS)}")
        # Celery keeps a shared task, with its base and its resources, for every app of the process to come.
        options.setdefault("shared", False)
        return lambda body: self.app.task(**options)(body)

    def close(self) -> None:
        """Close the connections."""
        self.pools.close()

    def replays(self) -> int:
        """Return how often a body was run again."""
        return sum(event.kind is EventKind.ATTEMPT_REPLAYED for event in self.events)

    def rows(self) -> list[int]:
        """Return the committed orders."""
        with sqlalchemy.create_engine(self.database.url(), poolclass=sqlalchemy.NullPool).connect() as connection:
            return list(connection.execute(text("select id from orders order by id")).scalars())

    def checked_out(self) -> int:
        """Return how many of the engine's connections are in use."""
        pool = self.engine.get().pool
        assert isinstance(pool, sqlalchemy.pool.QueuePool)
        return pool.checkedout()

    def _extend(self, **members: Any) -> None:
        self.base = type("ShopTask", (self.base,), {"abstract": True, **members})


def insert(session: Any, number: int) -> None:
    """Add an order."""
    session.execute(text("insert into orders values (:number)"), {"number": number})
