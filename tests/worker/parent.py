"""What the worker's main process has open when its children are forked, and what becomes of it.

Imported by the application, so that the remote-control commands are known: they run in the main process.
"""

from __future__ import annotations

import os
from typing import Any

from celery import signals
from celery.worker.control import control_command
from sqlalchemy import text

from tests.support.recorder import record

_INSERT = text("insert into orders (number, run) values (:number, 0)")
_ROWS = text("select count(*) from orders where number = :number")

_base: Any = None
_transactions: dict[str, Any] = {}
_streams: list[Any] = []


def open_now(base: Any) -> None:
    """Use the client and the engine at import, and begin a transaction that goes on."""
    global _base
    _base = base
    _begin("import", 1)


def _begin(when: str, number: int) -> None:
    if os.environ["SHOP_PARENT"] != when:
        return
    # An idle connection and one that is checked out, of each.
    base = _base
    base.api.get().get("/echo/idle").raise_for_status()
    stream = base.api.get().stream("GET", "/stream?n=500")
    chunks = stream.__enter__().iter_raw()
    _streams[:] = [stream, chunks, next(chunks)]
    with base.db.get().connect() as second:
        transaction = base.db.get().connect()
        transaction.execute(_INSERT, {"number": number})
        second.execute(text("select 1"))
    _transactions[when] = transaction
    record("parent opened", when)


@signals.worker_init.connect(weak=False)
def worker_starts(**_: object) -> None:
    _begin("worker_init", 1)


@control_command()
def parent_goes_on(state: Any) -> dict[str, Any]:
    """Use in the main process what it had open before it forked."""
    (transaction,) = _transactions.values()
    transaction.execute(_INSERT, {"number": 1})
    stream, chunks, first = _streams
    body = first + b"".join(chunks)
    stream.__exit__(None, None, None)
    bodies = [_base.api.get().get(f"/echo/parent-{number}").text for number in range(20)]
    with _base.db.get().connect() as idle:
        idle.execute(text("select 1"))
    return {
        "pid": os.getpid(),
        "rows": transaction.execute(_ROWS, {"number": 1}).scalar(),
        "chunks": body.count(b"chunk "),
        "right": bodies == [f"parent-{number}" for number in range(20)],
    }


@signals.worker_shutting_down.connect(weak=False)
def worker_stops(**_: object) -> None:
    """The last signal before WorkerPools closes what the parent has."""
    for transaction in _transactions.values():
        transaction.commit()
        transaction.close()
        record("parent committed")
    _transactions.clear()
