"""The pattern of Celery's user guide: a connection in an attribute of the task object, made on first use."""

from __future__ import annotations

from typing import Any

import httpx
from celery import Task
from sqlalchemy import Engine, create_engine
from sqlalchemy.orm import Session

from benchmarks.apps import common
from benchmarks.apps.common import READ

app = common.make("on_task")


class ClientTask(Task):
    """Keeps an engine and a client, one of each a task and process."""

    abstract = True
    _db: Engine | None = None
    _http: httpx.Client | None = None

    @property
    def db(self) -> Engine:
        """The engine."""
        if self._db is None:
            self._db = create_engine(common.DATABASE)
        return self._db

    @property
    def http(self) -> httpx.Client:
        """The client, with a TLS context of its own."""
        if self._http is None:
            self._http = httpx.Client(base_url=common.HTTP)
        return self._http


@app.task(base=ClientTask, bind=True, name="noop")
def noop(self: Any, number: float) -> None:
    """Do nothing."""


@app.task(base=ClientTask, bind=True, name="read")
def read(self: Any, number: float) -> None:
    """Read one row."""
    with Session(self.db) as session, session.begin():
        session.execute(READ, {"number": int(number) % 100}).one()


@app.task(base=ClientTask, bind=True, name="get")
def get(self: Any, number: float) -> None:
    """Get one small answer."""
    self.http.get(f"/echo/{int(number)}").raise_for_status()
