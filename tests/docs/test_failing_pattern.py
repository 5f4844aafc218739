"""What docs/why.md says about Celery's own pattern, in a real worker: an engine a task, shared across the fork."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.docs.markdown import blocks
from tests.support.paths import ROOT
from tests.support.worker import WorkerProcess

# What a project's parent does: a look at the database in a handler that runs before the fork.
TOUCH = """
import time

from celery import signals
from naive import app, count_orders

@signals.worker_init.connect(weak=False)
def look(**_):
    count_orders.connected_to()

@app.task(name="hold")
def hold():
    time.sleep(0.5)
"""

# The same tasks with workerpools, opened in the parent all the same.
PROTECTED = """
import os
import time

from celery import Celery, signals
from sqlalchemy import text
from workerpools import PooledTask, WorkerPools
from workerpools.sqlalchemy import SQLAlchemyEngine

app = Celery("protected", broker=os.environ["BROKER_URL"], backend=os.environ["BROKER_URL"])
pools = WorkerPools(app)

class DatabaseTask(PooledTask):
    db = pools.add(SQLAlchemyEngine(os.environ["DATABASE_URL"]))

    def connected_to(self):
        with self.db.connect() as connection:
            return connection.scalar(text("SELECT pg_backend_pid()"))

@app.task(base=DatabaseTask, bind=True, name="naive.count_orders")
def count_orders(self):
    return os.getpid(), self.connected_to()

@app.task(base=DatabaseTask, bind=True, name="naive.count_payments")
def count_payments(self):
    return os.getpid(), self.connected_to()

@app.task(base=DatabaseTask, bind=True, name="naive.count_shipments")
def count_shipments(self):
    return os.getpid(), self.connected_to()

@signals.worker_init.connect(weak=False)
def look(**_):
    count_orders.connected_to()

@app.task(name="hold")
def hold():
    time.sleep(0.5)
"""

TASKS = ("naive.count_orders", "naive.count_payments", "naive.count_shipments")


@pytest.fixture
def modules(tmp_path: Path) -> Path:
    """A directory with the page's module, one that touches it in the parent, and the counterpart."""
    naive = next(block for block in blocks(ROOT / "docs" / "why.md") if block.file_name == "naive.py")
    (tmp_path / "naive.py").write_text(naive.text)
    (tmp_path / "touched.py").write_text(TOUCH)
    (tmp_path / "protected.py").write_text(PROTECTED)
    return tmp_path


def _run(module: str, tasks: list[str], env: dict[str, str], concurrency: int) -> list[tuple[int, int]]:
    """Run the tasks in all children of a worker, one at a time; return each one's process and database session."""
    from celery import Celery

    with (
        Celery("client", broker=env["BROKER_URL"], backend=env["BROKER_URL"], set_as_current=False) as app,
        WorkerProcess(f"{module}:app", concurrency=concurrency, env=env) as worker,
    ):
        worker.wait_ready()
        answers: list[Any] = []
        for _ in range(10):
            for task in tasks:
                # One child is kept busy, so that not all tasks that come one by one are its own.
                held = app.send_task("hold") if concurrency > 1 else None
                answers.append(app.send_task(task).get(timeout=20))
                if held is not None:
                    held.get(timeout=20)
                    answers.append(app.send_task(task).get(timeout=20))
            if len({pid for pid, _ in answers}) == concurrency:
                break
        worker.stop()
    return [(pid, session) for pid, session in answers]


@pytest.mark.worker
def test_an_engine_a_task(modules: Path, page_environment: dict[str, str]) -> None:
    """In one process three tasks use three engines, each with a session of its own."""
    answers = _run("naive", [*TASKS, *TASKS], page_environment, concurrency=1)
    assert len({pid for pid, _ in answers}) == 1
    assert len({session for _, session in answers}) == 3


@pytest.mark.worker
def test_shared_across_the_fork(modules: Path, page_environment: dict[str, str]) -> None:
    """Once the parent has used the engine, its children talk over the parent's connection."""
    answers = _run("touched", [TASKS[0]], page_environment, concurrency=2)
    assert len({pid for pid, _ in answers}) == 2
    assert len({session for _, session in answers}) == 1


@pytest.mark.worker
def test_counterpart_shares_nothing(modules: Path, page_environment: dict[str, str]) -> None:
    """With workerpools three tasks have one engine a process, though the parent has used its own."""
    answers = _run("protected", list(TASKS), page_environment, concurrency=2)
    assert len({pid for pid, _ in answers}) == 2
    assert len(set(answers)) == 2
    assert len({session for _, session in answers}) == 2
