"""``celery pools recycle`` while a worker works: nobody fails, and afterwards every process has new connections."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
from celery.result import AsyncResult

from tests.support.paths import environment
from tests.support.program import run
from tests.support.stand import PATIENCE, SHOP, Stand, wait_until
from tests.support.worker import WorkerProcess
from tests.worker.test_seen import look, total

pytestmark = pytest.mark.worker

TASKS = 1000


def pools(stand: Stand, *args: str, app: str = SHOP, env: Mapping[str, str] | None = None) -> Any:
    """Run ``celery pools`` with these arguments."""
    env = environment({**stand.environment(), "COLUMNS": "80", **(env or {})})
    return run(["celery", "-A", app, "pools", *args], env=env, timeout=PATIENCE)


def recycle(stand: Stand, worker: WorkerProcess, *args: str) -> dict[str, Any]:
    """Recycle, and return what the worker has answered."""
    done = pools(stand, "recycle", *args, "--json", "--timeout", "20", "-d", worker.node)
    assert done.returncode == 0, done.stderr
    (reply,) = json.loads(done.stdout)["workers"].values()
    assert isinstance(reply, dict)
    return reply


def backends(stand: Stand) -> set[int]:
    return {backend.pid for backend in stand.backends("workerpools db pid=%")}


@contextmanager
def under_load(stand: Stand) -> Iterator[list[AsyncResult]]:
    """Send tasks as fast as they are done, until the block has ended and a thousand were sent."""
    sent: list[AsyncResult] = []
    over = threading.Event()

    def feed() -> None:
        done = 0
        while len(sent) < TASKS or not over.is_set():
            while done < len(sent) and sent[done].ready():
                done += 1
            if len(sent) - done < 30:
                sent.append(stand.send("visit", f"token-{len(sent)}"))
            else:
                time.sleep(0.002)

    feeding = threading.Thread(target=feed)
    feeding.start()
    try:
        yield sent
    finally:
        over.set()
        feeding.join(4 * PATIENCE)
    assert not feeding.is_alive()


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("pool", "start", "concurrency"),
    [("prefork", "fork", 3), ("prefork", "spawn", 3), ("threads", "", 4)],
    ids=["fork", "spawn", "threads"],
)
def test_a_thousand_tasks_do_not_notice(stand: Stand, pool: str, start: str, concurrency: int) -> None:
    """Three times while they run, of everything, one resource and everything again: none fails, none is replayed."""
    conf = {"worker_pool_start_method": start} if start else {}
    with stand.worker(pool=pool, concurrency=concurrency, conf=conf) as worker:
        pids = stand.pool_processes(concurrency) if pool == "prefork" else [worker.pid]
        stand.reach_all(pids)
        old, accepted = backends(stand), stand.echo.accepted
        assert len(old) >= len(pids)
        with under_load(stand) as sent:
            asked = []
            for args in ((), ("db",), ()):
                enough = len(sent) + 100
                wait_until(lambda: len(sent) > enough, "tasks")  # noqa: B023
                asked.append(recycle(stand, worker, *args)["resources"])
        answers = [result.get(timeout=PATIENCE) for result in sent]
        assert len(answers) >= TASKS
        assert all(answer["right"] for answer in answers)
        assert {"api", "db"} <= set(asked[0]) == set(asked[2])
        assert asked[1] == ["db"]
        # Nobody's engine or client was replaced: each process kept the one it had.
        assert len({(answer["pid"], answer["engine"]) for answer in answers}) == len(pids)
        # Each process has used four sets of connections to the database, and three to the API.
        stand.reach_all(pids)
        wait_until(lambda: not backends(stand) & old, "the end of the old connections")
        stats = look(stand)
        api, db = total(stats, "api"), total(stats, "db")
        assert db.value("closed", "recycled") == db.value("opened") - db.open >= 3 * len(pids)
        assert api.value("closed", "recycled") >= 2 * len(pids)
        assert api.value("opened") == stand.echo.accepted > accepted
        for each in (api, db):
            assert each.value("closed") == each.value("closed", "recycled") + each.value("closed", "idle")
            assert each.value("failures") == each.value("replays") == each.value("retries") == 0
        assert worker.log().count("value_recycled resource=db") >= 2 * len(pids)
        assert worker.stop() == 0
    stand.wait_for_no_connection()


def test_work_under_way_is_undisturbed(stand: Stand) -> None:
    """A transaction is open and a response is awaited: both end on the connections that they began on."""
    with stand.worker(concurrency=2) as worker:
        slow = [stand.send("slow_request", 8.0) for _ in range(2)]
        stand.wait_for_entry("slow_request", count=2)
        busy = backends(stand)
        assert len(busy) == 2
        assert recycle(stand, worker)["ok"]
        assert backends(stand) == busy
        assert sorted(result.get(timeout=PATIENCE) for result in slow) == sorted(worker.children())
        assert [request.connection for request in stand.echo.requests()] == [1, 2]
        stand.reach_all(worker.children())
        wait_until(lambda: not backends(stand) & busy, "the end of the old connections")
        assert {request.connection for request in stand.echo.requests()} >= {3, 4}
        assert total(look(stand), "db").value("failures") == 0
        assert worker.stop() == 0


def test_children_that_are_started_later_do_not_care(stand: Stand) -> None:
    """What they open is newer than what was asked for; and they are told of the next time."""
    with stand.worker(concurrency=1) as worker:
        stand.reach_all(worker.children())
        recycle(stand, worker)
        stand.client.control.pool_grow(1)
        wait_until(lambda: len(worker.children()) == 2, "two children")
        stand.pool_processes(2)
        stand.reach_all(worker.children())
        stats = look(stand)
        by_child = {process.index: {each.name: each for each in process.resources} for process in stats.processes}
        assert by_child[0]["db"].value("closed", "recycled") == 1
        assert by_child[1]["db"].value("opened") == 1
        assert by_child[1]["db"].value("closed") == 0
        before = backends(stand)
        recycle(stand, worker, "db")
        stand.reach_all(worker.children())
        wait_until(lambda: not backends(stand) & before, "the end of the old connections")
        assert worker.stop() == 0


def test_what_settings_declare_is_recycled(shared: Stand) -> None:
    """Resources that nobody declared, that a spawned child has made itself, and that its parent does not know."""
    with shared.worker(concurrency=1, conf={"worker_pool_start_method": "spawn"}) as worker:
        first = shared.call("configured", "a")
        assert recycle(shared, worker, "engine")["resources"] == ["engine"]
        second = shared.call("configured", "b")
        assert second["backend"] != first["backend"]
        assert (second["pid"], second["engine"]) == (first["pid"], first["engine"])
        assert worker.stop() == 0


def test_a_name_that_nobody_has(shared: Stand) -> None:
    """Said in one sentence, with the names that there are; nothing is recycled."""
    with shared.worker(concurrency=1) as worker:
        shared.reach_all(worker.children())
        before = backends(shared)
        done = pools(shared, "recycle", "nothing", "--timeout", "20", "-d", worker.node)
        assert done.returncode == 1
        assert done.stdout == ""
        assert "no resource is named 'nothing'; the resources: api, db, engine, http, stock" in done.stderr
        shared.reach_all(worker.children())
        assert backends(shared) == before
        done = pools(shared, "recycle", "api", "--timeout", "20", "-d", worker.node)
        said = f"{worker.node}: connections of api will be replaced on next use\n"
        assert (done.returncode, done.stdout, done.stderr) == (0, said, "")
        assert worker.stop() == 0
