"""The Celery application of the worker's own tests."""

from __future__ import annotations

import os
import time

from celery import Celery

app = Celery("support")
app.conf.update(
    broker_url=os.environ.get("SUPPORT_BROKER", "memory://"),
    result_backend=os.environ.get("SUPPORT_BROKER", "cache+memory://"),
    broker_connection_retry_on_startup=True,
)


@app.task  # type: ignore[untyped-decorator]
def pid() -> int:
    """Return the id of the process that runs the task."""
    return os.getpid()


@app.task  # type: ignore[untyped-decorator]
def nap(seconds: float) -> str:
    """Sleep, then say so."""
    time.sleep(seconds)
    return "rested"
