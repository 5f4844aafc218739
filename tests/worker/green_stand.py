"""Workers whose tasks are greenlets."""

from __future__ import annotations

from itertools import count
from typing import Any

from tests.support.stand import Stand
from tests.support.worker import WorkerProcess

APP = "tests.worker.greens:app"
GREENLETS = 4
LIBRARIES = ("gevent", "eventlet")

numbers = count(1)


def green(stand: Stand, library: str, *, cooperates: bool = True, **options: Any) -> WorkerProcess:
    """Return a worker of that library, whose psycopg2 lets other greenlets run while it waits.

    Args:
        stand: The servers.
        library: `gevent` or `eventlet`.
        cooperates: Whether the application tells psycopg2 how to wait; eventlet does that by itself.
        options: Those of `Stand.worker`.
    """
    env = {**options.pop("env", {}), **({"SHOP_COOPERATES": library} if cooperates else {})}
    if library == "eventlet":
        # psycopg looks for gevent alone.
        env["PSYCOPG_WAIT_FUNC"] = "wait_select"
    return stand.worker(app=APP, pool=library, concurrency=GREENLETS, env=env, **options)


def bodies(stand: Stand, number: int) -> int:
    """Return how often the body of an order ran."""
    return [entry.detail for entry in stand.entries("body")].count(number)
