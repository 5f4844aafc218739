"""One child runs task after task while the server ends its connections: its descriptors and its memory stay few.

The full run, which takes some minutes:

    pytest -n0 -s -o timeout=1800 -o faulthandler_timeout=0 tests/load/test_soak.py --tasks 20000
"""

from __future__ import annotations

import json
import random
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import psutil  # type: ignore[import-untyped]
import psycopg2
import pytest
import redis
from celery import Celery

from tests.load.test_load import TABLES
from tests.support.databases import Database
from tests.support.inspect import open_fds
from tests.support.recorder import PATH
from tests.support.stand import wait_until
from tests.support.worker import WorkerProcess

pytestmark = [pytest.mark.worker, pytest.mark.soak]

#: The most tasks that are sent at a time.
BATCH = 500
#: Seconds between two ends of a random connection.
PAUSE = (0.02, 0.1)
#: Of a pool of one connection and one to spare for each driver, any may be closed at a moment.
CONNECTIONS = 4
#: How much the resident memory may grow from half of the tasks to the end, in MiB: with 20,000, less than 420 bytes may
#: be kept of each. Caches fill in the first thousands of tasks, so that memory is judged from this many tasks on.
GROWTH, WARM = 4.0, 10_000


class Mark(NamedTuple):
    """What the child has at one moment."""

    tasks: int
    descriptors: int
    resident: float


@contextmanager
def connections_ending(database: Database, ended: Counter[str]) -> Iterator[None]:
    """Inside, the server ends one connection after another."""
    over = threading.Event()
    chance = random.Random(7)
    query = """
        select pg_terminate_backend(pid) from (select pid from pg_stat_activity
        where datname = current_database() and application_name like 'workerpools %' order by random() limit 1) as one
    """

    def end() -> None:
        with closing(psycopg2.connect(database.dsn)) as connection, connection.cursor() as cursor:
            connection.autocommit = True
            while not over.wait(chance.uniform(*PAUSE)):
                cursor.execute(query)
                ended["connections"] += len(cursor.fetchall())

    thread = threading.Thread(target=end)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(30)


def measure(pid: int, tasks: int) -> Mark:
    """Return what a process has after so many tasks."""
    return Mark(tasks, len(open_fds(pid)), psutil.Process(pid).memory_info().rss / 2**20)


def test_one_child_stays_as_it_is(
    own_database: Database, broker_url: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Reads and writes over both drivers; each write that succeeds has one row."""
    database, batch = own_database, min(BATCH, int(request.config.getoption("--tasks")) // 4)
    tasks = int(request.config.getoption("--tasks")) // (4 * batch) * 4 * batch
    for statement in TABLES:
        database.execute(statement)
    env = {
        "LOAD_BROKER": broker_url,
        # No task here sends a request.
        "LOAD_API": "http://127.0.0.1:1",
        "LOAD_PSYCOPG2": database.url("psycopg2"),
        "LOAD_PSYCOPG": database.url("psycopg"),
        PATH: str(tmp_path / "record.jsonl"),
    }
    kinds = [f"load.{driver}.{kind}" for driver in ("psycopg2", "psycopg") for kind in ("read", "write")]
    ended: Counter[str] = Counter()
    states: Counter[str] = Counter()
    written: set[int] = set()
    marks: list[Mark] = []
    started = time.monotonic()
    with (
        closing(redis.Redis.from_url(broker_url)) as broker,
        closing(Celery("client", broker=broker_url, backend="disabled://", set_as_current=False)) as client,
        WorkerProcess("tests.load.app:app", concurrency=1, env=env) as worker,
    ):
        (pid,) = worker.children()

        def run(first: int, count: int) -> None:
            sent = {client.send_task(kinds[n % len(kinds)], (n,)).id: n for n in range(first, first + count)}
            keys = [f"celery-task-meta-{task_id}" for task_id in sent]
            results: list[dict[str, Any]] = []

            def all_ended() -> bool:
                texts: Any = broker.mget(keys)
                results[:] = [json.loads(text) for text in texts if text]
                return [each["status"] in ("SUCCESS", "FAILURE") for each in results].count(True) == count

            wait_until(all_ended, f"{count} results", 240.0)
            broker.delete(*keys)
            for each in results:
                states[each["status"]] += 1
                number = sent[each["task_id"]]
                if each["status"] == "SUCCESS" and kinds[number % len(kinds)].endswith("write"):
                    written.add(number)

        run(0, 100)
        with connections_ending(database, ended):
            for first in range(0, tasks, batch):
                run(100 + first, batch)
                if (first + batch) % (tasks // 4) == 0:
                    marks.append(measure(pid, first + batch))
        assert worker.children() == [pid]
        log = worker.log()
        assert worker.stop(90) == 0
    print(f"\n{ended['connections']} connections ended, {log.count('attempt_replayed')} replays, {dict(states)},")
    print(f"{time.monotonic() - started:.0f} s, {marks}")
    rows = dict(database.execute("select number, count(*) from entries group by number"))
    assert set(rows.values()) == {1}
    assert written <= set(rows)
    assert len(marks) == 4
    assert log.count("attempt_replayed") > tasks / 100
    assert ended["connections"] > tasks / 100
    first, half, _, last = marks
    assert max(mark.descriptors for mark in marks) <= first.descriptors + CONNECTIONS
    if tasks >= WARM:
        assert last.resident <= half.resident + GROWTH
