"""workerpools, as its documentation shows it."""

from __future__ import annotations

import os
import time

from benchmarks.apps import common
from benchmarks.apps.common import READ, WRITE
from workerpools import PooledTask, WorkerPools
from workerpools.httpx import HttpxClient
from workerpools.sqlalchemy import SQLAlchemyEngine, TaskSession

app = common.make("ours")
pools = WorkerPools(app)

_check_after = os.environ.get("BENCH_CHECK_AFTER")


class ShopTask(PooledTask):
    """With an HTTP client, an engine and a session."""

    abstract = True
    http = pools.add(HttpxClient(base_url=common.HTTP))
    db = pools.add(
        SQLAlchemyEngine(
            common.DATABASE,
            check_after=float(_check_after) if _check_after else 1.0,
        )
    )
    session = TaskSession(db)


@app.task(base=ShopTask, bind=True, name="noop")
def noop(self: ShopTask, number: float) -> None:
    """Do nothing."""


@app.task(base=ShopTask, bind=True, name="read")
def read(self: ShopTask, number: float) -> None:
    """Read one row."""
    self.session.execute(READ, {"number": int(number) % 100}).one()


@app.task(base=ShopTask, bind=True, name="write")
def write(self: ShopTask, number: float) -> None:
    """Write one row."""
    self.session.execute(WRITE, {"number": int(number) % 100})


@app.task(base=ShopTask, bind=True, name="get")
def get(self: ShopTask, number: float) -> None:
    """Get one small answer."""
    self.http.get(f"/echo/{int(number)}").raise_for_status()


@app.task(base=ShopTask, bind=True, name="hold")
def hold(self: ShopTask, number: float, seconds: float) -> None:
    """Use both, then stay busy, so that each process gets one such task."""
    self.session.execute(READ, {"number": int(number) % 100}).one()
    self.http.get(f"/echo/{int(number)}").raise_for_status()
    time.sleep(seconds)
