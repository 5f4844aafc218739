"""celery-svcs: a registry of factories, and a container a task."""

from __future__ import annotations

from typing import Any

import celery_svcs
import httpx
from celery import signals
from sqlalchemy import Engine, create_engine
from sqlalchemy.orm import Session

from benchmarks.apps import common
from benchmarks.apps.common import READ

app = common.make("svcs")
celery_svcs.init(app)


@signals.worker_process_init.connect(weak=False)
def open_clients(**_: Any) -> None:
    """Open this process's clients and register them."""
    registry = celery_svcs.get_registry(app)
    engine = create_engine(common.DATABASE, pool_size=1, max_overflow=1)
    client = httpx.Client(base_url=common.HTTP)
    registry.register_value(Engine, engine, ping=None)
    registry.register_value(httpx.Client, client)
    registry.register_factory(Session, lambda: Session(engine))


@app.task(bind=True, name="noop")
def noop(self: Any, number: float) -> None:
    """Do nothing."""


@app.task(bind=True, name="read")
def read(self: Any, number: float) -> None:
    """Read one row."""
    session = celery_svcs.svcs_from(self).get(Session)
    with session.begin():
        session.execute(READ, {"number": int(number) % 100}).one()


@app.task(bind=True, name="get")
def get(self: Any, number: float) -> None:
    """Get one small answer."""
    celery_svcs.svcs_from(self).get(httpx.Client).get(f"/echo/{int(number)}").raise_for_status()
