"""A real Django project in a real worker, with each driver, with psycopg's pool, in processes and in threads."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import celery
import django
import pytest
from celery import Celery
from celery.exceptions import SoftTimeLimitExceeded, TimeLimitExceeded
from celery.result import AsyncResult

from tests.support.databases import Database
from tests.support.faults import terminate_backends
from tests.support.paths import ROOT, environment
from tests.support.recorder import PATH, entries
from tests.support.stand import PATIENCE, ended, wait_until
from tests.support.worker import WorkerProcess
from workerpools._stats.report import full
from workerpools._stats.snapshot import WorkerStats
from workerpools.testing import TcpProxy

pytestmark = [pytest.mark.worker, pytest.mark.timeout(170)]

#: Each case's rows have a number of their own.
numbers = count(1)

_POOL = {"OPTIONS": {"pool": {"min_size": 2, "max_size": 4, "timeout": 10}}}
KINDS: dict[str, tuple[str, dict[str, Any], str]] = {
    "psycopg": ("psycopg", {"CONN_MAX_AGE": None}, "prefork"),
    "psycopg2": ("psycopg2", {"CONN_MAX_AGE": None}, "prefork"),
    "pool": ("psycopg", _POOL, "prefork"),
    "threads": ("psycopg", _POOL, "threads"),
}


@dataclass
class Project:
    """The project's worker, and what is around it."""

    kind: str
    client: Celery
    worker: WorkerProcess
    proxy: TcpProxy
    database: Database
    path: Path
    env: dict[str, str]

    def send(self, name: str, *args: Any, **options: Any) -> AsyncResult:
        return self.client.send_task(f"shop.{name}", args, **options)

    def call(self, name: str, *args: Any, **options: Any) -> Any:
        return self.send(name, *args, **options).get(timeout=PATIENCE)

    def outcome(self, name: str, *args: Any) -> tuple[str, Any]:
        result = ended(self.send(name, *args))
        return result.state, result.result

    def rows(self, number: int) -> list[str]:
        found = self.database.execute("SELECT note FROM shop_order WHERE number = %s ORDER BY id", number)
        return [str(note) for (note,) in found]

    def recorded(self, event: str, number: int) -> int:
        return sum(entry.detail == number for entry in entries(self.path, event))

    def notes(self, number: int) -> list[tuple[str, int]]:
        """Return what the tasks found that were sent; they have run by then."""
        self.call("idle")
        return [tuple(entry.detail[1:]) for entry in entries(self.path, "note") if entry.detail[0] == number]

    def sessions(self, like: str = "%") -> int:
        query = "SELECT count(*) FROM pg_stat_activity WHERE datname = %s AND application_name LIKE %s"
        return int(self.database.execute(query, self.database.name, f"project {like}")[0][0])  # type: ignore[call-overload]

    def asleep(self) -> bool:
        query = "SELECT count(*) FROM pg_stat_activity WHERE state = 'active' AND query = 'SELECT pg_sleep(30)'"
        return self.database.execute(query) != [(0,)]

    def statistics(self) -> dict[str, Any]:
        """Return the numbers of the worker's resource."""
        (reply,) = self.client.control.broadcast("pools", reply=True, timeout=PATIENCE, limit=1)
        ((found,),) = reply.values()
        (total,) = WorkerStats.from_dict(found).totals()
        assert total.name == "django"
        return full(total)


@pytest.fixture(params=sorted(KINDS))
def project(request: pytest.FixtureRequest, database: Database, broker_url: str, tmp_path: Path) -> Iterator[Project]:
    """A worker with one process, or one thread; its app has used the database before it forks."""
    driver, options, pool = KINDS[request.param]
    if options is _POOL and django.VERSION < (5, 1):
        pytest.skip("Django has psycopg's pool since 5.1")
    path = tmp_path / "record.jsonl"
    with (
        TcpProxy(database.host, database.port) as proxy,
        closing(Celery("client", broker=broker_url, backend=broker_url, set_as_current=False)) as client,
    ):
        own = {
            "HOST": proxy.host,
            "PORT": proxy.port,
            "NAME": database.name,
            "USER": database.user,
            "PASSWORD": database.password,
            **options,
            "OPTIONS": {**options.get("OPTIONS", {}), "application_name": "project default"},
        }
        env = {
            "DJANGO_SETTINGS_MODULE": "tests.django.project.settings",
            "PROJECT_BROKER": broker_url,
            "PROJECT_DATABASE": json.dumps(own),
            "PROJECT_DRIVER": driver,
            PATH: str(path),
        }
        subprocess.run([sys.executable, "-m", "django", "migrate", "-v0"], cwd=ROOT, env=environment(env), check=True)
        env["PROJECT_PRELOADED"] = "yes"
        with WorkerProcess("tests.django.project.celery:app", pool=pool, concurrency=1, env=env) as worker:
            yield Project(request.param, client, worker, proxy, database, path, env)
        client.backend.result_consumer.stop()


def test_project(project: Project) -> None:
    """All that is promised, in one worker."""
    life(project)
    each_end(project)
    stale(project)
    replayed(project)
    effects(project)
    two_databases(project)
    by_itself(project)
    lost_commit(project)
    aborted(project)
    if "prefork" in project.worker.command:
        fork(project)
    counted(project)
    deadline(project)
    stop(project)


def life(project: Project) -> None:
    """One connection serves all tasks of a process, whatever Celery closes after each of them."""
    number = next(numbers)
    first = project.call("place", number)
    assert first["in_block"]
    assert project.call("plain") == first["pid"]
    project.call("idle")
    again = project.call("place", number)
    if KINDS[project.kind][1] is _POOL:
        # They take turns. Celery before 5.6 leaves the pool open that the main process had before the fork.
        pools = 2 if celery.VERSION < (5, 6) and "prefork" in project.worker.command else 1
        assert project.sessions("default") <= 3 * pools
    else:
        assert again["session"] == first["session"]
    assert project.rows(number) == ["", ""]


def each_end(project: Project) -> None:
    """A run is one transaction: committed when the body returns, else rolled back, with all that waits for it."""
    cases = [
        ("return", "SUCCESS", 1, 1),
        ("raise", "FAILURE", 0, 0),
        ("ignore", "IGNORED", 0, 0),
        ("set_rollback", "SUCCESS", 0, 0),
        ("caught", "FAILURE", 0, 0),
        ("savepoint", "SUCCESS", 1, 1),
        ("close", "FAILURE", 0, 0),
    ]
    for how, state, rows, hooks in cases:
        number = next(numbers)
        if state == "IGNORED":
            project.send("ends", number, how)
            project.call("idle")
        else:
            assert project.outcome("ends", number, how)[0] == state, how
        assert len(project.rows(number)) == rows, how
        assert project.recorded("hook", number) == hooks, how
        assert project.recorded("body", number) == 1, how
        assert project.recorded("hook of the savepoint", number) == 0, how
        assert project.notes(number) == [], how


def stale(project: Project) -> None:
    """A connection that was ended while it was idle costs a replay: the rows are there once."""
    number = next(numbers)
    project.call("place", number)
    assert terminate_backends(project.database, "project %") > 0
    project.call("place", number, "terminated")
    project.proxy.cut()
    project.call("place", number, "cut")
    assert project.rows(number) == ["", "terminated", "cut"]
    assert project.recorded("body", number) == 5


def replayed(project: Project) -> None:
    """A body that loses its connection runs again: rows, hooks and messages are there once."""
    for before in ("", "cursor"):
        number = next(numbers)
        assert project.call("lost", number, before) == []
        assert project.recorded("body", number) == 2
        assert project.rows(number) == [""]
        assert project.recorded("hook", number) == 1
        assert project.notes(number) == [("once", 1)]


def effects(project: Project) -> None:
    """What was done, or may have been, is not done again; nothing that waits for the commit leaves."""
    cases: list[tuple[str, str, list[str], list[str]]] = [
        ("raw commit", "a statement on 'default' that may commit", [""], []),
        ("past Django", "the end of the transaction on 'default' within the body", [""], []),
        ("two statements", "a statement on 'default' that may commit", [""], []),
        ("other alias", "a statement on 'other' outside of the run's transaction", ["other"], []),
        ("message", "message 'shop.note'", [], ["at once"]),
    ]
    for before, said, rows, notes in cases:
        number = next(numbers)
        state, error = project.outcome("lost", number, before)
        assert state == "FAILURE", before
        assert f"{said} had left already" in project.worker.log().rpartition(f"lost, {before}, {number}")[2], error
        assert project.recorded("body", number) == 1, before
        assert project.rows(number) == rows, before
        assert project.recorded("hook", number) == 0, before
        assert [word for word, _ in project.notes(number)] == notes, before
    state, error = project.outcome("lost", next(numbers), "durable")
    assert (state, "durable atomic block cannot be nested" in str(error)) == ("FAILURE", True)


def two_databases(project: Project) -> None:
    """Each chosen database is committed, rolled back and replayed with the run."""
    for how, rows in [("", ["", "other"]), ("raise", []), ("lost", ["", "other"])]:
        number = next(numbers)
        assert project.outcome("both", number, how)[0] == ("FAILURE" if how == "raise" else "SUCCESS")
        assert project.rows(number) == rows


def by_itself(project: Project) -> None:
    """A body without a transaction of the run's commits as Django does; each statement of it is an effect."""
    number = next(numbers)
    project.call("by_itself", number)
    assert project.notes(number) == [("by itself", 1)]
    assert project.outcome("by_itself", number, True)[0] == "FAILURE"
    assert project.recorded("body", number) == 2
    assert project.rows(number) == ["", ""]


def lost_commit(project: Project) -> None:
    """A COMMIT whose answer is lost may have been done: it is not done again, and nobody is told that it was."""
    number = next(numbers)
    project.call("idle")
    project.proxy.lose_answer(b"COMMIT")
    assert project.outcome("ends", number, "return")[0] == "FAILURE"
    assert project.rows(number) == [""]
    assert (project.recorded("body", number), project.recorded("hook", number)) == (1, 0)


def aborted(project: Project) -> None:
    """What the server has rolled back runs again."""
    number = next(numbers)
    project.call("place", number)
    assert project.call("locked", number) == 2


def fork(project: Project) -> None:
    """A child of the body has a session of its own, and the parent's transaction goes on."""
    number = next(numbers)
    mine, theirs, still, rows = project.call("forks", number)
    assert mine == still != theirs
    assert rows == 1
    assert project.rows(number) == [""]


def deadline(project: Project) -> None:
    """The server ends a statement when the task's time is up, and so does the network's silence."""
    limits = (SoftTimeLimitExceeded, TimeLimitExceeded)
    found = ended(project.send("sleeps"))
    assert isinstance(found.result, limits), found.result
    assert not project.asleep()
    project.call("sleeps", "own")
    assert any("timeout" in str(entry.detail) for entry in entries(project.path, "own"))
    result = project.send("sleeps")
    wait_until(project.asleep, "the statement")
    project.proxy.silence()
    try:
        found = ended(result)
    finally:
        project.proxy.resume()
        project.proxy.cut()
    assert isinstance(found.result, limits), found.result
    project.call("idle")


def counted(project: Project) -> None:
    """Connections and failures are counted as those of any resource."""
    found = project.statistics()
    assert found["kind"] == "database"
    assert found["in_use"] == found["pending"] == found["leaks"] == 0
    assert found["open"] == found["opened"] - sum(found["closed"].values()) > 0
    assert found["reused"] > found["attempts"] / 2
    assert found["closed"]["stale"] > 0
    failures = found["failures"]
    # The lost COMMIT; the locked row; the durable block and the rest are no failures of a connection.
    assert (failures["indeterminate"], failures["aborted"], failures["unavailable"]) == (1, 1, 0)
    assert failures["stale"] >= found["replays"] - 1 > 3
    assert found["refused_replays"] > 3


def stop(project: Project) -> None:
    """Nothing is left on the server."""
    project.call("both", next(numbers))
    assert project.sessions() > 0
    assert project.worker.stop() == 0
    wait_until(lambda: project.sessions() == 0, "no session")
    assert "Traceback" not in project.worker.log().rpartition("Warm shutdown")[2]
