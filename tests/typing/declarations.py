"""Type-checked by mypy and pyright, never run: what a user's declarations infer."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import requests
import sqlalchemy
from celery import Celery
from sqlalchemy.orm import Session
from typing_extensions import assert_type

from workerpools import Adapter, DatabaseTask, HTTPTask, PooledTask, Resource, WorkerPools
from workerpools.httpx import HttpxClient
from workerpools.requests import RequestsSession
from workerpools.sqlalchemy import SQLAlchemyEngine, TaskSession, current_session

app = Celery("shop")
pools = WorkerPools(app)


class Cache:
    """Any client at all."""


def make_cache() -> Cache:
    return Cache()


def yield_cache() -> Iterator[Cache]:
    yield Cache()


class OwnSession(Session):
    """As SQLModel's, with a method more."""

    def exec(self, statement: str) -> list[int]:
        return [len(statement)]


class ShopTask(PooledTask):
    api = pools.add(HttpxClient(base_url="https://api.example.com"))
    asked = pools.add(RequestsSession("https://api.example.com"))
    db = pools.add(SQLAlchemyEngine("postgresql+psycopg2://app@db/shop"))
    session = TaskSession(db)
    own = TaskSession(db, class_=OwnSession, expire_on_commit=False)
    bound = TaskSession(db, binds={Cache: db}, commit=False)
    cache = pools.add(make_cache)
    other = pools.add(yield_cache, name="other cache")


class EverythingTask(HTTPTask, DatabaseTask):
    """Both bases that need no declaration."""


def body(self: ShopTask) -> None:
    assert_type(self.api, httpx.Client)
    assert_type(self.asked, requests.Session)
    assert_type(self.db, sqlalchemy.Engine)
    assert_type(self.session, Session)
    assert_type(self.own, OwnSession)
    assert_type(self.own.exec("select"), list[int])
    assert_type(self.bound, Session)
    assert_type(self.cache, Cache)
    assert_type(self.other, Cache)


def settings_body(self: EverythingTask) -> None:
    assert_type(self.http, httpx.Client)
    assert_type(self.engine, sqlalchemy.Engine)
    assert_type(self.session, Session)


@app.task(base=ShopTask)
def injected(
    number: int,
    api: httpx.Client = ShopTask.api.inject(),
    session: Session = ShopTask.session.inject(),
    *,
    own: OwnSession = ShopTask.own.inject(),
    cache: Cache = ShopTask.cache.inject(),
    http: httpx.Client = HTTPTask.http.inject(),
    stored: Session = DatabaseTask.session.inject(),
) -> None:
    assert_type(ShopTask.db.inject(), sqlalchemy.Engine)
    assert_type(ShopTask.session.inject(), Session)
    assert_type(own, OwnSession)


def direct() -> None:
    injected(1)
    injected(1, api=httpx.Client())


@app.task(base=ShopTask)
def misdeclared(api: sqlalchemy.Engine = ShopTask.api.inject()) -> None:  # type: ignore[assignment]  # pyright: ignore
    """The default has the value's type: another annotation is an error."""


def handles() -> None:
    assert_type(ShopTask.api, Resource[httpx.Client])
    assert_type(ShopTask.api.get(), httpx.Client)
    assert_type(ShopTask.session, TaskSession)
    assert_type(ShopTask.session, TaskSession[Session])
    assert_type(ShopTask.session.get(), Session)
    assert_type(ShopTask.own, TaskSession[OwnSession])
    assert_type(ShopTask.own.get(), OwnSession)
    assert_type(DatabaseTask.session.get(), Session)
    assert_type(current_session(), Session)
    with ShopTask.own.override(OwnSession()) as own:
        assert_type(own, OwnSession)
    assert_type(HTTPTask.http.get(), httpx.Client)
    with ShopTask.api.override(httpx.Client()) as fake:
        assert_type(fake, httpx.Client)
    with HTTPTask.http.override(httpx.Client()) as fake:
        assert_type(fake, httpx.Client)
    with pools as same:
        assert_type(same, WorkerPools)


def own_adapter(adapter: Adapter[Cache]) -> None:
    assert_type(pools.add(adapter), Resource[Cache])


def messages(task: ShopTask) -> None:
    assert_type(pools.on_commit(task.session.close), None)
    task.delay_on_commit(1, sku="cup").get()
    task.apply_async_on_commit((1,), {"sku": "cup"}, countdown=1.0).forget()
