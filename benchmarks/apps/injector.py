"""dependency-injector: providers in a container, injected into the task's function by wiring."""

from __future__ import annotations

from typing import Any

import httpx
from celery import signals
from dependency_injector import containers, providers
from dependency_injector.wiring import Provide, inject
from sqlalchemy import create_engine
from sqlalchemy.orm import Session

from benchmarks.apps import common
from benchmarks.apps.common import READ

app = common.make("injector")


class Container(containers.DeclarativeContainer):
    """One client and one engine a process, a session a call."""

    engine = providers.Singleton(create_engine, common.DATABASE, pool_size=1, max_overflow=1)
    client = providers.Singleton(httpx.Client, base_url=common.HTTP)
    session = providers.Factory(Session, engine)


@signals.worker_process_init.connect(weak=False)
def open_clients(**_: Any) -> None:
    """Wire this process's container."""
    Container().wire(modules=[__name__])


@app.task(name="noop")
def noop(number: float) -> None:
    """Do nothing."""


@app.task(name="read")
@inject
def read(number: float, session: Session = Provide[Container.session]) -> None:
    """Read one row."""
    with session, session.begin():
        session.execute(READ, {"number": int(number) % 100}).one()


@app.task(name="get")
@inject
def get(number: float, client: httpx.Client = Provide[Container.client]) -> None:
    """Get one small answer."""
    client.get(f"/echo/{int(number)}").raise_for_status()
