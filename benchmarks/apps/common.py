"""What every application of the benchmarks shares: its settings, and the record of what ended when."""

from __future__ import annotations

import functools
import logging
import os
import struct
import time
from typing import Any

from celery import Celery, signals
from sqlalchemy import text

__all__ = ["CACHE", "DATABASE", "HTTP", "READ", "RECORD", "WRITE", "make"]

DATABASE = os.environ.get("BENCH_DATABASE", "")
HTTP = os.environ.get("BENCH_HTTP", "")
CACHE = os.environ.get("BENCH_CACHE", "")

READ = text("SELECT value FROM rows WHERE number = :number")
WRITE = text("INSERT INTO entries (number) VALUES (:number)")

#: One ended task: the number it was given, when its body began and when it ended (time.monotonic, which processes of
#: one machine share), and 1 for success.
RECORD = struct.Struct("=dddd")


# What a worker logs of each task at INFO costs every side the same, and hides what they differ in.
for _name in ("celery.worker.strategy", "celery.app.trace"):
    logging.getLogger(_name).setLevel(logging.WARNING)


def make(name: str) -> Celery:
    """Return an application that takes tasks from a queue of its name, and keeps no results."""
    broker = os.environ.get("BENCH_BROKER", "memory://")
    app = Celery(name, broker=broker, backend=None, set_as_current=False)
    # Celery gives a shared task to every app of the process: here each has its own of the same name.
    app.task = functools.partial(app.task, shared=False)
    app.conf.update(
        task_ignore_result=True,
        task_default_queue=os.environ.get("BENCH_QUEUE", name),
        worker_send_task_events=False,
        worker_enable_remote_control=False,
        broker_connection_retry_on_startup=False,
        worker_prefetch_multiplier=8,
    )
    if limit := os.environ.get("BENCH_LIMIT"):
        app.conf.task_soft_time_limit = float(limit)
    if most := os.environ.get("BENCH_MAX_TASKS"):
        app.conf.worker_max_tasks_per_child = int(most)
    return app


if path := os.environ.get("BENCH_RECORD"):
    # Appended in one write a task: children do not get into each other's way.
    _file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    _began: list[float] = [0.0]

    @signals.task_prerun.connect(weak=False)
    def _begins(**_: Any) -> None:
        _began[0] = time.monotonic()

    @signals.task_postrun.connect(weak=False)
    def _ended(args: Any, state: str, **_: Any) -> None:
        if state != "RETRY":
            os.write(_file, RECORD.pack(float(args[0]), _began[0], time.monotonic(), float(state == "SUCCESS")))
