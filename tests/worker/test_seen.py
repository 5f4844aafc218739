"""What the processes of a worker count is seen from outside, and agrees with what happened."""

from __future__ import annotations

import functools
import json
import os
import signal
from typing import Any

import pytest

from tests.support import program
from tests.support.paths import environment
from tests.support.stand import PATIENCE, SHOP, Stand, wait_until
from tests.support.worker import WorkerProcess
from tests.worker.seeing import TASKS, ask, by_pid, grown, look, of, run, total
from workerpools._stats.snapshot import WorkerStats

pytestmark = pytest.mark.worker


def agrees(stand: Stand, stats: WorkerStats, tasks: int) -> None:
    """Check the totals against what the servers and the tasks have seen."""
    api, db = total(stats, "api"), total(stats, "db")
    assert api.value("opened") == stand.echo.accepted
    for each in (api, db):
        assert each.value("attempts") == tasks
        assert each.value("opened") + each.value("reused") == tasks
        assert each.histogram("acquire_wait").count == each.histogram("use_time").count == tasks
        assert (each.in_use, each.pending) == (0, 0)
        assert each.open == each.value("opened") - each.value("closed")
    assert db.open == len(stand.backends("workerpools db pid=%"))


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_counts_agree_with_what_happened(stand: Stand, start: str) -> None:
    """Each child's own numbers, the parent without any, and totals that the servers confirm; with spawn, too."""
    conf = {} if start == "fork" else {"worker_pool_start_method": start}
    with stand.worker(concurrency=2, conf=conf) as worker:
        pids = stand.pool_processes(2)
        before = look(stand)
        assert set(by_pid(before)) == set(pids)
        assert (before.pid, before.execution_pool, before.unseen) == (worker.pid, "prefork", 0)
        assert total(before, "db").value("opened") == 0
        answers = stand.reach_all(pids)
        stats = look(stand)
        agrees(stand, stats, len(answers))
        for pid, process in by_pid(stats).items():
            own = [answer for answer in answers if answer["pid"] == pid]
            db = of(process.resources, "db")
            assert (db.value("attempts"), db.value("opened"), db.open) == (len(own), 1, 1)
            assert (db.kind, of(process.resources, "api").kind) == ("database", "http")
            # One for the task that runs, and one to spare.
            assert db.limit == 2
            assert (process.tokens, process.capacity, process.overflow) == (500, 500, 0)
            assert not process.interrupted
        # Spawned children declare what settings make when they first need it.
        names = {"api", "db", "stock"} if start == "spawn" else {"api", "db", "stock", "engine", "http"}
        assert {each.name for each in stats.totals()} >= names
        assert worker.stop() == 0


def test_the_stats_reply_tells_it_in_words(shared: Stand) -> None:
    """For Flower's page of a worker; with the same snapshots beside it."""
    with shared.worker() as worker:
        shared.reach_all(worker.children())
        told = ask(shared, "stats")["workerpools"]
        assert "open 2/4, in use 0, pending 0; opened 2, reused" in told["resources"]["db"]
        assert set(told["processes"]) == {str(pid) for pid in worker.children()}
        (stats,) = [WorkerStats.from_dict(each) for each in told["snapshots"]]
        assert {process.pid for process in stats.processes} == set(worker.children())
        text = json.dumps(told)
        assert "password" not in text
        assert "://" not in text


def test_the_command_line_knows_it(shared: Stand) -> None:
    """``celery -A app inspect pools``: a command that the program must know before it asks."""
    with shared.worker():
        run(shared, 4)
        command = ["celery", "-A", SHOP, "inspect", "pools", "--json", "--timeout", "20"]
        done = program.run(command, env=environment(shared.environment()), timeout=PATIENCE)
        assert done.returncode == 0, done.stderr
        (answer,) = json.loads(done.stdout.strip().splitlines()[-1]).values()
        assert total(WorkerStats.from_dict(answer[0]), "db").value("attempts") == 4


def test_what_a_task_uses_is_seen_while_it_runs(shared: Stand) -> None:
    """A request and a transaction are under way: both connections are in use, for longer and longer."""
    with shared.worker(concurrency=1):
        run(shared, 1)
        result = shared.send("slow_request", 6.0)
        busy = wait_until(
            lambda: next((s for s in [look(shared)] if total(s, "api").in_use and total(s, "db").in_use), None),
            "a connection of each in use",
        )
        assert total(busy, "db").value("longest_use") > 0
        assert total(busy, "db").idle == 0
        result.get(timeout=PATIENCE)
        calm = look(shared)
        assert (total(calm, "api").in_use, total(calm, "db").in_use) == (0, 0)
        assert total(calm, "db").value("longest_use") == 0


def test_totals_survive_children_that_are_killed(stand: Stand) -> None:
    """SIGKILL, one child after the other, and looked at all the time: no counter falls, the dead are not shown, and
    their successors are; in the end every task and every connection is accounted for."""
    with stand.worker(concurrency=2) as worker:
        tasks = len(stand.reach_all(worker.children()))
        seen = look(stand)
        for _ in range(4):
            victim = worker.children()[0]
            os.kill(victim, signal.SIGKILL)
            replaced = wait_until(
                functools.partial(check_growth, stand, seen, victim), "a successor in the dead child's place"
            )
            assert grown(seen, replaced)
            tasks += len(stand.reach_all(worker.children()))
            seen = look(stand)
            assert grown(replaced, seen)
        api, db = total(seen, "api"), total(seen, "db")
        assert api.value("attempts") == db.value("attempts") == tasks
        assert api.value("opened") == stand.echo.accepted >= 6
        assert api.value("opened") + api.value("reused") == tasks
        # Who was killed closed nothing that it could have told of.
        assert (db.open, db.value("opened"), db.value("closed")) == (2, 6, 0)
        assert worker.stop() == 0


def check_growth(stand: Stand, before: WorkerStats, victim: int) -> WorkerStats | None:
    """Look once: no counter may have fallen; return the snapshot if the victim has a successor."""
    stats = look(stand)
    assert grown(before, stats)
    return stats if victim not in by_pid(stats) and len(stats.processes) == 2 and not stats.unseen else None


def test_children_that_are_recycled_leave_their_counts(stand: Stand) -> None:
    """A child a task: every one opens and closes its connections in order, and all of that is in the totals."""
    with stand.worker(concurrency=2, args=["--max-tasks-per-child", "1"]) as worker:
        assert len({answer["pid"] for answer in run(stand, 20)}) == 20
        stand.wait_for_no_connection()
        wait_until(lambda: len(worker.children()) == 2, "two children")
        stats = wait_until(
            lambda: next((s for s in [look(stand)] if total(s, "db").value("closed") == 20), None), "20 closed"
        )
        api, db = total(stats, "api"), total(stats, "db")
        assert api.value("opened") == api.value("closed", "shutdown") == stand.echo.accepted == 20
        assert db.value("opened") == db.value("closed", "shutdown") == db.value("attempts") == 20
        assert (api.open, db.open) == (0, 0)
        assert worker.stop() == 0


def test_a_pool_that_grows_and_shrinks(stand: Stand) -> None:
    """New children are seen, those that went are not, and their counts stay."""
    with stand.worker(concurrency=1) as worker:
        tasks = len(run(stand, 5))
        stand.client.control.pool_grow(2)
        wait_until(lambda: len(worker.children()) == 3, "three children")
        stand.pool_processes(3)
        wait_until(lambda: len(look(stand).processes) == 3, "three children seen")
        tasks += len(stand.reach_all(worker.children()))
        full = look(stand)
        agrees(stand, full, tasks)
        assert sorted(process.index or 0 for process in full.processes) == [0, 1, 2]
        stand.client.control.pool_shrink(2)
        wait_until(lambda: len(worker.children()) == 1, "one child")
        shrunk = wait_until(lambda: next((s for s in [look(stand)] if len(s.processes) == 1), None), "one child seen")
        assert grown(full, shrunk)
        assert total(shrunk, "db").value("attempts") == tasks
        stand.client.control.pool_grow(1)
        wait_until(lambda: len(worker.children()) == 2, "two children")
        wait_until(lambda: len(look(stand).processes) == 2, "two children seen")
        tasks += len(stand.reach_all(worker.children()))
        again = look(stand)
        assert grown(shrunk, again)
        assert total(again, "api").value("attempts") == tasks
        assert total(again, "api").value("opened") == stand.echo.accepted


@pytest.mark.parametrize(("pool", "concurrency"), [("threads", 4), ("solo", 1)])
def test_tasks_that_run_in_the_main_process(stand: Stand, pool: str, concurrency: int) -> None:
    """There is one process, and it counts for all its threads."""
    with stand.worker(pool=pool, concurrency=concurrency) as worker:
        run(stand)
        stats = look(stand)
        (process,) = stats.processes
        assert (process.pid, process.index, stats.execution_pool) == (worker.pid, None, pool)
        api, db = of(process.resources, "api"), of(process.resources, "db")
        assert api.value("attempts") == db.value("attempts") == TASKS
        assert api.value("opened") == stand.echo.accepted
        assert db.open == len(stand.backends("workerpools db pid=%")) <= concurrency + 1
        assert db.limit == concurrency + 1
        assert db.histogram("use_time").count == api.histogram("use_time").count == TASKS
        assert (api.in_use, db.in_use, db.pending) == (0, 0, 0)


def test_failures_and_replays_are_seen(shared: Stand) -> None:
    """Every backend is ended while it is idle: each child meets a dead connection once."""
    with shared.worker(concurrency=2) as worker:
        shared.reach_all(worker.children())
        assert shared.terminate_backends() == 2
        answers = shared.reach_all(worker.children())
        db = total(look(shared), "db")
        replays = worker.log().count("attempt_replayed ")
        assert db.value("replays") == replays
        # One that was not used for a second was checked instead, and replaced before its task saw it.
        assert replays + db.value("failed_checks") == db.value("closed", "stale") == 2
        assert db.value("failures", "stale") == replays
        assert len(answers) >= 2
        assert (db.open, db.value("opened")) == (2, 4)
        assert worker.stop() == 0


def test_the_worker_is_not_slowed_down_by_who_looks(worker_of_two: WorkerProcess, shared: Stand) -> None:
    """Looked at as fast as can be while tasks run: each answer is whole."""
    sent = [shared.send("visit", f"token-{number}") for number in range(TASKS)]
    for _ in range(10):
        stats = look(shared)
        assert not any(process.interrupted for process in stats.processes)
    assert all(result.get(timeout=PATIENCE)["right"] for result in sent)


@pytest.fixture
def worker_of_two(shared: Stand) -> Any:
    with shared.worker(concurrency=2) as started:
        yield started
