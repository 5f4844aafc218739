"""The application of the tests of alerts: one connection of each kind, and tasks that misuse it."""

from __future__ import annotations

import json
import os
import time
from typing import Any

from celery import Celery
from sqlalchemy import text

from tests.support.recorder import record
from workerpools import PooledTask, RetryPolicy, WorkerPools
from workerpools.events import Alert
from workerpools.httpx import HttpxClient
from workerpools.sqlalchemy import SQLAlchemyEngine, TaskSession

app = Celery("alarms", broker=os.environ["SHOP_BROKER"], backend=os.environ["SHOP_RESULTS"])
app.conf.update(json.loads(os.environ.get("SHOP_CONF", "{}")))
pools = WorkerPools(app)

KEPT: list[Any] = []


@pools.on_alert
def fails(alert: Alert, raised: bool) -> None:
    raise RuntimeError("the first listener")


@pools.on_alert
def tells(alert: Alert, raised: bool) -> None:
    record("raised" if raised else "cleared", alert.to_dict())


class Base(PooledTask):
    """A client and an engine that have one connection each."""

    api = pools.add(HttpxClient(base_url=os.environ["SHOP_API"], max_connections=1))
    db = pools.add(SQLAlchemyEngine(os.environ["SHOP_DATABASE"], pool_size=1, max_overflow=0, check_after=600.0))
    session = TaskSession(db)
    replay = RetryPolicy(max_retries=0)


BACKEND = text("select pg_backend_pid()")


@app.task(base=Base, bind=True, name="shop.touch")
def touch(self: Base) -> int:
    """Use the connection."""
    return int(self.session.scalar(BACKEND))


@app.task(base=Base, bind=True, name="shop.hold")
def hold(self: Base, seconds: float) -> int:
    """Have the connection for a while."""
    self.session.scalar(BACKEND)
    record("hold")
    time.sleep(seconds)
    return os.getpid()


@app.task(base=Base, bind=True, name="shop.lose")
def lose(self: Base) -> None:
    """Lose the connection in every run."""
    self.session.execute(text("select pg_terminate_backend(pg_backend_pid())"))


@app.task(base=Base, bind=True, name="shop.leak")
def leak(self: Base, seconds: float = 0.0) -> None:
    """Leave a connection and a response open."""
    connection = self.db.connect()
    connection.execute(BACKEND)
    KEPT.append((connection, self.api.send(self.api.build_request("GET", "/echo/1"), stream=True)))
    time.sleep(seconds)
