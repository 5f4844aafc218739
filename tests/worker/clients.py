"""An application with every client: tasks of one shape for each."""

from __future__ import annotations

import http.client
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

import httpx
from celery import Celery
from sqlalchemy import text

from tests.support.recorder import record
from workerpools import FailureKind, PooledTask, RetryPolicy, WorkerPools
from workerpools.adapter import Factory
from workerpools.httpx import AsyncHttpxClient, HttpxClient
from workerpools.redis import AsyncRedisClient, RedisClient
from workerpools.requests import RequestsSession
from workerpools.sqlalchemy import AsyncSQLAlchemyEngine, AsyncTaskSession, SQLAlchemyEngine, TaskSession

app = Celery("shop", broker=os.environ["SHOP_BROKER"], backend=os.environ["SHOP_RESULTS"])
app.conf.update(json.loads(os.environ.get("SHOP_CONF", "{}")))
pools = WorkerPools(app)

if library := os.environ.get("SHOP_COOPERATES"):
    __import__(f"psycogreen.{library}")
    sys.modules[f"psycogreen.{library}"].patch_psycopg()

# A statement's own parameter, which leaves with it: asyncpg sends the text beforehand.
INSERT = text("insert into orders (number, run) select :number, 0 where cast(:mark as text) <> ''")
SELECT = text("select cast(:mark as text)")

#: Each client's address, which is that of a proxy of its own.
URLS: dict[str, str] = json.loads(os.environ["SHOP_URLS"])


def _dial() -> http.client.HTTPConnection:
    address = urlsplit(URLS["factory"])
    connection = http.client.HTTPConnection(str(address.hostname), address.port, timeout=10.0)
    connection.connect()
    return connection


def _is_lost(error: BaseException) -> FailureKind | None:
    return FailureKind.STALE if isinstance(error, ConnectionError) else None


def _engine(url: str) -> SQLAlchemyEngine:
    return SQLAlchemyEngine(url, check_after=600.0)


def _async_engine(url: str) -> AsyncSQLAlchemyEngine:
    return AsyncSQLAlchemyEngine(url, check_after=600.0)


def _httpx2(url: str) -> Any:
    import httpx2

    from workerpools.httpx2 import HttpxClient as Httpx2Client

    return Httpx2Client(base_url=url, limits=httpx2.Limits(keepalive_expiry=600.0))


# However slow the machine is, connections are kept, and what finds one dead is the task.
ADAPTERS: dict[str, Callable[[str], Any]] = {
    "httpx": lambda url: HttpxClient(base_url=url, limits=httpx.Limits(keepalive_expiry=600.0)),
    "httpx2": _httpx2,
    "async_httpx": lambda url: AsyncHttpxClient(base_url=url, limits=httpx.Limits(keepalive_expiry=600.0)),
    "requests": lambda url: RequestsSession(url, max_idle=None),
    "redis": RedisClient,
    "valkey": RedisClient,
    "async_redis": AsyncRedisClient,
    "async_valkey": AsyncRedisClient,
    "psycopg2": _engine,
    "psycopg": _engine,
    "async_psycopg": _async_engine,
    "asyncpg": _async_engine,
    # What an order does is declared by the body.
    "factory": lambda url: Factory(
        _dial, classify=_is_lost, connections=lambda value: [value.sock] if value.sock else [], effects=False
    ),
}
RESOURCES = {name: pools.add(ADAPTERS[name](url), name=name) for name, url in URLS.items()}
SYNC, ASYNC = ("psycopg2", "psycopg"), ("async_psycopg", "asyncpg")
SESSIONS: dict[str, Any] = {
    **{name: TaskSession(RESOURCES[name]) for name in SYNC if name in URLS},
    **{name: AsyncTaskSession(RESOURCES[name]) for name in ASYNC if name in URLS},
}


class ShopTask(PooledTask):
    """What it does may not be done twice."""

    abstract = True
    replay = RetryPolicy(max_retries=0)


class AnyTimesTask(ShopTask):
    """What it does may be done more than once."""

    abstract = True
    idempotent = True


def use(self: Any, client: str, number: int, method: str) -> None:
    """Have the server answer a question ("GET"), change something ("POST"), or change it at the commit ("session")."""
    mark = f"echo/{number}."
    answer: Any = mark
    if method == "session":
        SESSIONS[client].get().execute(INSERT, {"number": number, "mark": mark})
    elif client in SYNC:
        with RESOURCES[client].get().connect() as connection:
            if method == "POST":
                connection.execution_options(isolation_level="AUTOCOMMIT")
                connection.execute(INSERT, {"number": number, "mark": mark})
            else:
                answer = connection.scalar(SELECT, {"mark": mark})
    elif client in ("redis", "valkey"):
        value = RESOURCES[client].get()
        answer = value.echo(mark).decode() if method == "GET" else value.incr(mark) and mark
    elif client == "factory":
        if method == "POST":
            self.effect(f"an order, {number}")
        connection = RESOURCES[client].get()
        connection.request(method, f"/{mark}")
        answer = f"echo/{connection.getresponse().read().decode()}"
    else:
        response = RESOURCES[client].get().request(method, f"/{mark}")
        response.raise_for_status()
        answer = f"echo/{response.text}"
    assert answer == mark, answer


async def use_async(self: Any, client: str, number: int, method: str) -> None:
    """The same with the asynchronous clients."""
    mark = f"echo/{number}."
    answer: Any = mark
    if method == "session":
        await SESSIONS[client].get().execute(INSERT, {"number": number, "mark": mark})
    elif client in ASYNC:
        async with RESOURCES[client].get().connect() as connection:
            if method == "POST":
                await connection.execution_options(isolation_level="AUTOCOMMIT")
                await connection.execute(INSERT, {"number": number, "mark": mark})
            else:
                answer = await connection.scalar(SELECT, {"mark": mark})
    elif client == "async_httpx":
        response = await RESOURCES[client].get().request(method, f"/{mark}")
        answer = f"echo/{response.raise_for_status().text}"
    else:
        value = RESOURCES[client].get()
        answer = (await value.echo(mark)).decode() if method == "GET" else await value.incr(mark) and mark
    assert answer == mark, answer


def _begun(number: int) -> None:
    record("body", number)
    pools.on_commit(lambda: record("committed", number))


def _ended(task: Any, fails: bool) -> dict[str, Any]:
    if fails:
        raise ValueError("the body fails")
    return {"pid": os.getpid(), "effects": [str(effect) for effect in task.effects]}


def _body(client: str) -> Callable[..., Any]:
    def body(self: Any, number: int, method: str, fails: bool = False) -> dict[str, Any]:
        _begun(number)
        use(self, client, number, method)
        return _ended(self, fails)

    async def async_body(self: Any, number: int, method: str, fails: bool = False) -> dict[str, Any]:
        _begun(number)
        await use_async(self, client, number, method)
        return _ended(self, fails)

    return async_body if client.startswith("async") else body


for _name in URLS:
    app.task(base=ShopTask, bind=True, name=f"shop.{_name}")(_body(_name))
    app.task(base=AnyTimesTask, bind=True, name=f"shop.{_name}.any_times")(_body(_name))


@app.task(base=ShopTask, bind=True, name="shop.slow")
def slow(self: Any, number: int, clients: list[str]) -> list[int]:
    """Be under way when the worker is told to stop, and use every client after that."""
    record("slow", number)
    time.sleep(1.0)
    for client in clients:
        if client.startswith("async"):
            pools.run(use_async(self, client, number, "GET"))
        else:
            use(self, client, number, "GET")
    return [number]


@app.task(name="shop.gauges")
def gauges() -> dict[str, Any]:
    """Return what this process counts as in use or waited for."""
    return {each.name: (each.in_use, each.pending) for each in pools.stats().totals()}


if os.environ.get("SHOP_PARENT") and "worker" in sys.argv:
    # The parent has used each client when it forks.
    for _name in URLS:
        if _name.startswith("async"):
            pools.run(use_async(None, _name, 0, "GET"))
        else:
            use(None, _name, 0, "GET")
