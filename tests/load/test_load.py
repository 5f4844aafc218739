"""Under load, while connections and servers break at random, no task is lost or done twice.

The full run, with ten seeds from 7 on:

    LOAD_TASKS=5000 LOAD_SEED=7 LOAD_RUNS=10 pytest -n0 -o faulthandler_timeout=0 tests/load/test_load.py
"""

from __future__ import annotations

import collections
import json
import os
import random
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import redis
from celery import Celery

from demo_tasks.servers import PostgresServer
from tests.load.chaos import Chaos, Outages
from tests.load.outcomes import DRIVERS, KINDS, SENDS, WRITES, Effects, Outcome, events, problems, reasons
from tests.load.upstream import Upstream
from tests.support.databases import Database
from tests.support.inspect import tcp_connections_to
from tests.support.proxy import TcpProxy
from tests.support.recorder import PATH, entries
from tests.support.stand import wait_until
from tests.support.worker import WorkerProcess

TASKS = int(os.environ.get("LOAD_TASKS", "600"))
SEED = int(os.environ.get("LOAD_SEED", "1"))
RUNS = int(os.environ.get("LOAD_RUNS", "1"))

#: Seconds without any task that ends. The longest that one may take by itself is a COMMIT that is asked about for
#: 30 s, several times.
STANDSTILL = 90.0

TABLES = (
    "create table products (number int primary key, value int)",
    "insert into products select n, n * 7 from generate_series(0, 9) as n",
    # No unique number: what is done twice is to be seen, not to be prevented.
    "create table entries (id serial primary key, number int not null)",
    "create table stock (number int primary key)",
)

pytestmark = [
    pytest.mark.worker,
    pytest.mark.slow,
    pytest.mark.timeout(240 + TASKS / 10),
]


class Load:
    """Tasks that were sent, and how far they are."""

    def __init__(self, broker_url: str, seed: int) -> None:
        chance = random.Random(seed)
        self.tasks: dict[str, tuple[int, str]] = {}
        self.results: dict[str, dict[str, Any]] = {}
        self._broker = redis.Redis.from_url(broker_url)
        # Without a result backend, which would subscribe to each task: results are read from the store.
        with closing(Celery("client", broker=broker_url, backend="disabled://", set_as_current=False)) as client:
            for number in range(TASKS):
                kind, driver = chance.choice(KINDS), chance.choice(DRIVERS)
                sent = client.send_task(f"load.{driver}.{kind}", (number,))
                self.tasks[sent.id] = number, kind

    def close(self) -> None:
        self._broker.close()

    def progress(self) -> float:
        """Look for results; return which part of all tasks has ended."""
        pending = [task_id for task_id in self.tasks if task_id not in self.results]
        stored = self._broker.mget([f"celery-task-meta-{task_id}" for task_id in pending]) if pending else []
        for task_id, text in zip(pending, stored, strict=True):
            result = json.loads(text) if text else {"status": "PENDING"}
            if result["status"] not in ("PENDING", "RETRY", "STARTED"):
                self.results[task_id] = result
        return len(self.results) / len(self.tasks)

    def outcomes(self, record: Path) -> list[Outcome]:
        """Return how every task has ended."""
        notes = dict(entry.detail for entry in entries(record, "failed"))
        return [
            Outcome(
                *(number, kind, task_id, result["status"], result["result"], result["traceback"] or ""),
                notes=notes.get(task_id, ()),
            )
            for task_id, (number, kind) in self.tasks.items()
            for result in [self.results[task_id]]
        ]


def run_to_the_end(load: Load, outages: Outages, worker: WorkerProcess) -> None:
    """Let the outages happen when they are due, until every task has ended."""
    last, at = 0.0, time.monotonic()
    while (done := load.progress()) < 1.0:
        if done > last:
            last, at = done, time.monotonic()
            outages.proceed(done)
        waited = time.monotonic() - at
        assert waited < STANDSTILL, f"{len(load.results)} of {TASKS} tasks ended, none for {waited:.0f} s"
        assert worker.returncode is None, f"the worker ended with {worker.returncode}"
        time.sleep(0.1)


def children(record: Path) -> collections.Counter[int]:
    """Return how often the child of each task has run."""
    return collections.Counter(int(entry.detail) for entry in entries(record, "child"))


def seen_by_the_servers(database: Database, upstream: Upstream, record: Path) -> Effects:
    """Return what the tasks have done."""
    counts = database.execute("select number, count(*) from entries group by number")
    stock = database.execute("select number from stock")
    return Effects(
        {int(number): int(count) for number, count in counts},  # type: ignore[call-overload]
        frozenset(int(row[0]) for row in stock),  # type: ignore[call-overload]
        upstream.payments(),
        children(record),
    )


@pytest.mark.parametrize("seed", range(SEED, SEED + RUNS))
def test_nothing_is_lost_or_doubled(
    seed: int,
    server: PostgresServer,
    own_database: Database,
    broker_url: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Each task ends as a success or as a refusal that names its reason; the rows and the POSTs are those of the
    successes; after the warm stop no connection is left."""
    started = time.monotonic()
    database = own_database
    for statement in TABLES:
        database.execute(statement)
    record = tmp_path / "record.jsonl"
    with (
        Upstream(tmp_path) as upstream,
        TcpProxy(server.host, server.port) as db,
        TcpProxy(upstream.host, upstream.port) as api,
        closing(Load(broker_url, seed)) as load,
    ):
        env = {
            "LOAD_BROKER": broker_url,
            "LOAD_API": f"http://{api.host}:{api.port}",
            "LOAD_PSYCOPG2": database.through(db).url("psycopg2"),
            "LOAD_PSYCOPG": database.through(db).url("psycopg"),
            PATH: str(record),
        }
        chaos, outages = Chaos(seed, database, db, api), Outages(seed, server, upstream, api)
        worker = WorkerProcess("tests.load.app:app", concurrency=4, env=env)
        try:
            with worker:
                chaos.start()
                try:
                    run_to_the_end(load, outages, worker)
                finally:
                    chaos.stop()
                # None of them is left at the broker, to be missed or found by chance.
                sent = {each.number for each in load.outcomes(record) if each.succeeded and each.kind in SENDS}
                wait_until(lambda: sent <= children(record).keys(), "the children", 60.0)
                stopping = time.monotonic()
                # Celery may take half a minute to stop warmly after a load.
                assert worker.stop(90) == 0
                stopped = time.monotonic() - stopping
            like = "workerpools %"
            sessions = "select application_name from pg_stat_activity where application_name like %s"
            wait_until(lambda: not database.execute(sessions, like), "no database session", 10.0)
            wait_until(lambda: not tcp_connections_to(upstream.port), "no HTTP connection", 10.0)
        finally:
            (tmp_path / "worker.log").write_text(worker.log())
        outcomes, effects = load.outcomes(record), seen_by_the_servers(database, upstream, record)

    done = [outcome for outcome in outcomes if outcome.succeeded]
    written = [outcome for outcome in done if outcome.kind in WRITES]
    explained = [outcome.number for outcome in outcomes if outcome.unknown or outcome.committed_before]
    rows = sum(count for number, count in effects.entries.items() if number not in explained)
    happened = events(worker.log())
    with capsys.disabled():
        print(
            f"\nload seed={seed}: {len(done)} of {TASKS} succeeded, {TASKS - len(done)} refused; "
            f"{rows} rows for {len(written)} successful writes (and {len(explained)} failures that may have one); "
            f"{len(effects.payments)} POSTs; {sum(effects.children.values())} children; "
            f"{time.monotonic() - started:.0f} s, warm stop {stopped:.1f} s"
        )
        print(f"  refused: {json.dumps(reasons(outcomes), indent=4, ensure_ascii=False)}")
        print(f"  events: {dict(happened)}\n  broken: {dict(sorted(chaos.done.items()))}, {', '.join(outages.done)}")

    wrong = problems(outcomes, effects, traceback_has_notes=sys.version_info >= (3, 11))
    assert not wrong, f"seed {seed}, {len(wrong)} problems, log in {tmp_path}:\n" + "\n".join(wrong[:30])
    assert rows == len(written)
    # A test in which nothing happened would show nothing.
    assert len(outages.done) == 4
    assert len(done) > 0.5 * TASKS
    assert happened["attempt_replayed"] > 0
    assert happened["commit_resolved"] > 0
    assert happened["task_retried"] > 0
