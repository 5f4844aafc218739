"""Best practice without a library: clients in module globals, opened in worker_process_init.

The time-outs and sizes are those that a careful author would set; `BENCH_PRE_PING=1` adds SQLAlchemy's own check.
"""

from __future__ import annotations

import os
import time
from typing import Any

import httpx
from celery import signals
from sqlalchemy import Engine, create_engine
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

from benchmarks.apps import common
from benchmarks.apps.common import READ, WRITE

app = common.make("by_hand")

#: `BENCH_AUTORETRY=1`: what people add against lost connections.
OPTIONS: dict[str, Any] = (
    {"autoretry_for": (OperationalError,), "retry_backoff": True, "max_retries": 5}
    if os.environ.get("BENCH_AUTORETRY") == "1"
    else {}
)

ENGINE: Engine
CLIENT: httpx.Client


@signals.worker_process_init.connect(weak=False)
def open_clients(**_: Any) -> None:
    """Open this process's clients; SQLAlchemy and httpx connect with the first task."""
    global ENGINE, CLIENT
    ENGINE = create_engine(
        common.DATABASE,
        pool_size=1,
        max_overflow=1,
        pool_use_lifo=True,
        pool_pre_ping=os.environ.get("BENCH_PRE_PING") == "1",
        connect_args={"connect_timeout": 5},
    )
    CLIENT = httpx.Client(base_url=common.HTTP, timeout=httpx.Timeout(10.0, connect=3.0, pool=2.0))


@signals.worker_process_shutdown.connect(weak=False)
def close_clients(**_: Any) -> None:
    """Close them."""
    ENGINE.dispose()
    CLIENT.close()


@app.task(name="noop")
def noop(number: float) -> None:
    """Do nothing."""


@app.task(name="read", **OPTIONS)
def read(number: float) -> None:
    """Read one row."""
    with Session(ENGINE) as session, session.begin():
        session.execute(READ, {"number": int(number) % 100}).one()


@app.task(name="write", **OPTIONS)
def write(number: float) -> None:
    """Write one row."""
    with Session(ENGINE) as session, session.begin():
        session.execute(WRITE, {"number": int(number) % 100})


@app.task(name="get")
def get(number: float) -> None:
    """Get one small answer."""
    CLIENT.get(f"/echo/{int(number)}").raise_for_status()


@app.task(name="hold")
def hold(number: float, seconds: float) -> None:
    """Use both, then stay busy."""
    read.run(number)
    get.run(number)
    time.sleep(seconds)
