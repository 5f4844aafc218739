"""An application whose tasks execute what they are told, each over psycopg2 and over psycopg 3, in the same process."""

from __future__ import annotations

import gc
import os
import random
import signal
import time
from collections import Counter
from typing import Any

from celery import Celery
from celery.exceptions import SoftTimeLimitExceeded
from sqlalchemy import text
from sqlalchemy.pool import QueuePool

from tests.support.recorder import record
from workerpools import PooledTask, RetryPolicy, WorkerPools
from workerpools.sqlalchemy import SQLAlchemyEngine, TaskSession

DRIVERS = {"psycopg2": "SHOP_DATABASE", "psycopg": "SHOP_STOCK"}

app = Celery("shop", broker=os.environ["SHOP_BROKER"], backend=os.environ["SHOP_RESULTS"])
pools = WorkerPools(app)


def _inner(task: Any, *args: Any) -> Any:
    return task.apply(args).get(disable_sync_subtasks=False)


def _declare(driver: str, url: str) -> Any:
    # What finds a connection dead is the task.
    engine = pools.add(SQLAlchemyEngine(url, check_after=600.0, resolve_timeout=2.0), name=driver)
    members = {"db": engine, "session": TaskSession(engine), "replay": RetryPolicy(max_retries=0), "abstract": True}
    base = type("ShopTask", (PooledTask,), members)

    def task(body: Any) -> Any:
        return app.task(base=base, bind=True, name=f"shop.{driver}.{body.__name__}")(body)

    @task
    def execute(self: Any, number: int, statements: list[str], fails: bool = False) -> list[Any]:
        """Return the first value of each statement."""
        record("body", number)
        results = [self.session.execute(text(statement)) for statement in statements]
        found = [result.scalar() if result.returns_rows else None for result in results]
        if fails:
            raise ValueError(number)
        return found

    @task
    def third(self: Any) -> None:
        record("body", "third")
        self.session.execute(text("select 3"))

    @task
    def second(self: Any) -> None:
        record("body", "second")
        self.session.execute(text("select 2"))
        _inner(third)

    @task
    def first(self: Any) -> None:
        record("body", "first")
        self.session.execute(text("select 1"))
        _inner(second)

    @task
    def around(self: Any, number: int, inner: int, statement: str) -> None:
        """Have another task execute the same statement, with a session of its own."""
        record("body", number)
        self.session.execute(text(statement))
        _inner(execute, inner, [statement])

    @task
    def gauges(self: Any) -> dict[str, Any]:
        """Return what this process counts of its connections, without using one."""
        # A connection that was interrupted while it was opened is in a cycle of psycopg's.
        gc.collect()
        # What it has published comes first, then what it counts now.
        process = [each for each in pools.stats().processes if each.pid == os.getpid()][-1]
        (found,) = [each for each in process.resources if each.name == driver]
        pool = engine.get().pool
        assert isinstance(pool, QueuePool)
        counted = {"in use": found.in_use, "pending": found.pending, "checked out": pool.checkedout()}
        return {"pid": os.getpid(), "open": found.open, **counted}

    return execute


_execute = {driver: _declare(driver, os.environ[variable]) for driver, variable in DRIVERS.items()}


@app.task(name="shop.interrupt")
def interrupt(driver: str, first: int, count: int, seed: int) -> dict[str, Any]:
    """Run tasks one after another, and strike each with the signal of a soft time limit at a random moment.

    The handler is that of Celery's execution pool. A signal that found no task would end the process, so each is sent
    from here.
    """

    def run(number: int) -> None:
        _execute[driver](number, [f"insert into orders values ({number}, 0)"])

    chance = random.Random(seed)
    started = time.perf_counter()
    for number in range(20):
        run(first - 1 - number)
    pace = (time.perf_counter() - started) / 20
    before = signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGUSR1))
    done: list[int] = []
    errors: Counter[str] = Counter()
    try:
        for number in range(first, first + count):
            try:
                signal.setitimer(signal.ITIMER_REAL, pace * chance.uniform(0.02, 1.3))
                try:
                    run(number)
                finally:
                    signal.setitimer(signal.ITIMER_REAL, 0)
                done.append(number)
            except (SoftTimeLimitExceeded, Exception) as error:
                errors[type(error).__name__] += 1
    finally:
        signal.signal(signal.SIGALRM, before)
    return {"done": done, "errors": dict(errors)}
