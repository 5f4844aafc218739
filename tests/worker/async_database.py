"""The application of the tests of an asynchronous engine in a worker."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import threading
from typing import Any

from celery import Celery
from sqlalchemy import text

from tests.support.recorder import record
from workerpools import PooledTask, RetryPolicy, WorkerPools
from workerpools.sqlalchemy import AsyncSQLAlchemyEngine, AsyncTaskSession

app = Celery("shop", broker=os.environ["SHOP_BROKER"], backend=os.environ["SHOP_RESULTS"])
app.conf.update(json.loads(os.environ.get("SHOP_CONF", "{}")))
pools = WorkerPools(app)


class ShopTask(PooledTask):
    """One asynchronous engine."""

    db = pools.add(AsyncSQLAlchemyEngine(os.environ["SHOP_DATABASE"], check_after=600.0))
    session = AsyncTaskSession(db)
    replay = RetryPolicy(max_retries=0)


def task(name: str, **options: Any) -> Any:
    return app.task(base=ShopTask, bind=True, name=f"shop.{name}", **options)


async def insert(session: Any, number: int, run: int = 0) -> None:
    await session.execute(
        text("insert into orders (number, run) values (:number, :run)"), {"number": number, "run": run}
    )


@task("order")
async def order(self: Any, number: int, fails: bool = False) -> dict[str, int]:
    """Write a row, and fail at will."""
    record("body", number)
    await insert(self.session, number)
    backend = await self.session.scalar(text("select pg_backend_pid()"))
    if fails:
        raise ValueError(number)
    return {"pid": os.getpid(), "backend": int(backend)}


@task("both")
async def both(self: Any, number: int) -> list[int]:
    """The session, and a connection of its own beside it."""

    async def beside() -> int:
        async with self.db.connect() as connection:
            return int(await connection.scalar(text("select count(*) from orders where number = :n"), {"n": number}))

    await insert(self.session, number)
    return list(await asyncio.gather(beside(), _count(self.session, number)))


async def _count(session: Any, number: int) -> int:
    return int(await session.scalar(text("select count(*) from orders where number = :n"), {"n": number}))


@task("sleeps", soft_time_limit=1.0)
async def sleeps(self: Any) -> None:
    """A statement that takes longer than the limit."""
    await self.session.execute(text("select pg_sleep(30)"))


@task("busy")
async def busy(self: Any, number: int, seconds: float) -> None:
    """Use the database until a time limit strikes, as Celery's does."""
    threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGUSR1)).start()
    while True:
        await insert(self.session, number)
        async with self.db.begin() as connection:
            await connection.execute(text("select pg_sleep(0.002)"))
        await self.session.rollback()


@task("gauges")
async def gauges(self: Any) -> dict[str, Any]:
    """Return what is left in this process: tasks on the loop, and what is counted of connections."""
    (counted,) = [(each.in_use, each.pending, each.open) for each in pools.stats().totals()]
    return {"tasks": len(asyncio.all_tasks()) - 1, "counted": counted, "pid": os.getpid()}


if os.environ.get("SHOP_PARENT"):
    # The parent has used the loop, and its engine's connection is open, when it forks.
    async def _warm() -> None:
        async with ShopTask.db.get().connect() as connection:
            await connection.execute(text("select 1"))

    if "worker" in __import__("sys").argv:
        pools.run(_warm())
