"""Two applications whose workers run in this one process; prints what each of them saw."""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from celery import Celery
from celery.contrib.testing.worker import TestWorkController, setup_app_for_worker
from sqlalchemy import text

from workerpools import PooledTask, WorkerPools
from workerpools.httpx import HttpxClient
from workerpools.sqlalchemy import SQLAlchemyEngine, TaskSession

# Two of kombu's event loops for Redis do not go together in one process: a broker without one.
broker, results = "memory://", os.environ["SHOP_RESULTS"]


def make(name: str) -> tuple[Celery, WorkerPools, Any, Any]:
    app = Celery(name, broker=broker, backend=results, set_as_current=False)
    app.conf.task_default_queue = name
    pools = WorkerPools(app)

    class Base(PooledTask):
        api = pools.add(HttpxClient(base_url=os.environ["SHOP_API"]))
        db = pools.add(SQLAlchemyEngine(os.environ["SHOP_DATABASE"]), name=name)
        session = TaskSession(db)

    @app.task(base=Base, bind=True, name=f"{name}.look")
    def look(self: Base) -> dict[str, Any]:
        return {
            "backend": self.session.scalar(text("select pg_backend_pid()")),
            "right": self.api.get(f"/echo/{name}").text == name,
            "size": self.db.pool.size(),
            "engine": id(self.db),
            "client": id(self.api),
        }

    @app.task(base=Base, bind=True, name=f"{name}.wait")
    def wait(self: Base) -> bool:
        before = self.session.scalar(text("select pg_backend_pid()"))
        engine = self.db
        in_the_middle.set()
        go_on.wait(60)
        same = self.session.scalar(text("select pg_backend_pid()")) == before and self.db is engine
        return same and self.api.get(f"/echo/{name}").text == name

    return app, pools, look, wait


in_the_middle, go_on = threading.Event(), threading.Event()
first, first_pools, first_look, first_wait = make("first")
second, second_pools, second_look, _ = make("second")
seen: dict[str, Any] = {}


@contextmanager
def worker_of(app: Celery, pool: str, concurrency: int) -> Iterator[None]:
    """Run a worker in a thread. Celery's own `start_worker` ends every worker of the process at once, and coldly."""
    setup_app_for_worker(app, "info", None)
    worker = TestWorkController(
        app=app,
        concurrency=concurrency,
        pool=pool,
        hostname=f"{app.main}@{os.getpid()}",
        without_heartbeat=True,
        without_mingle=True,
        without_gossip=True,
    )
    thread = threading.Thread(target=worker.start, daemon=True)
    thread.start()
    worker.ensure_started()
    try:
        yield
    finally:
        worker.stop()
        thread.join(60)


def call(task: Any) -> Any:
    return task.delay().get(timeout=30, disable_sync_subtasks=False)


with worker_of(first, "threads", 3):
    with worker_of(second, "solo", 1):
        seen["second"] = call(second_look)
        # Opened when the other worker has started already: the size is still that of its own worker.
        seen["first"] = call(first_look)
        waiting = first_wait.delay()
        in_the_middle.wait(30)
    seen["open"] = [[r.name for r in pools.resources if r.is_open] for pools in (first_pools, second_pools)]
    go_on.set()
    seen["in the middle"] = waiting.get(timeout=30, disable_sync_subtasks=False)
    seen["first again"] = call(first_look)
seen["open at the end"] = [r.name for pools in (first_pools, second_pools) for r in pools.resources if r.is_open]
print("SEEN", json.dumps(seen))
sys.stdout.flush()
