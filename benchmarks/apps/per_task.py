"""A client and an engine a task: what is safe without a second thought, and what every task pays for."""

from __future__ import annotations

import httpx
from sqlalchemy import create_engine
from sqlalchemy.orm import Session

from benchmarks.apps import common
from benchmarks.apps.common import READ

app = common.make("per_task")


@app.task(name="noop")
def noop(number: float) -> None:
    """Do nothing."""


@app.task(name="read")
def read(number: float) -> None:
    """Read one row."""
    engine = create_engine(common.DATABASE, connect_args={"connect_timeout": 5})
    try:
        with Session(engine) as session, session.begin():
            session.execute(READ, {"number": int(number) % 100}).one()
    finally:
        engine.dispose()


@app.task(name="get")
def get(number: float) -> None:
    """Get one small answer."""
    httpx.get(f"{common.HTTP}/echo/{int(number)}", timeout=10.0).raise_for_status()
