"""What a snapshot of a worker is made of, and who publishes."""

from __future__ import annotations

import os
import time

import pytest

from tests.stats.test_metrics import row
from tests.support.forking import run_in_fork
from workerpools import Resource, WorkerPools
from workerpools._run.events import EventKind
from workerpools._stats.collector import assemble
from workerpools._stats.memory import Board, SlotState
from workerpools._stats.snapshot import ProcessStats, ResourceStats, WorkerStats
from workerpools.testing import run_attempt

NOW, MONOTONIC = 1000.0, 500.0


def state(pid: int, index: int, own: dict[str, float], past: dict[str, float]) -> SlotState:
    titles = (("db", "database"),)
    return SlotState(index, pid, 1.0, 2.0, 495, 500, 1.5, titles=titles, past=(row(**past),), rows=(row(**own),))


PAIR = [state(11, 0, {"opened": 1, "open": 1}, {}), state(12, 1, {"opened": 2, "open": 2}, {})]


def worker(states: list[SlotState], children: list[int], **own: float) -> WorkerStats:
    mine = ProcessStats(1, resources=(ResourceStats("db", "database", tuple(row(**own))),))
    return assemble(
        states,
        mine,
        execution_pool="prefork",
        alive=children.__contains__,
        children=children,
        now=NOW,
        monotonic=MONOTONIC,
    )


@pytest.mark.parametrize(
    ("states", "children", "own", "shown", "opened", "open_now", "unseen"),
    [
        # Two living children.
        (PAIR, [11, 12], {}, [11, 12], 3, 3, 0),
        # One of them is dead: its counters stay, its connections are gone.
        (PAIR, [11], {}, [11], 3, 1, 0),
        # Its successor has no slot yet.
        ([state(11, 0, {"opened": 1, "open": 1}, {})], [12], {}, [], 1, 0, 1),
        # ... and then has taken it over.
        ([state(12, 0, {"opened": 4, "open": 1}, {"opened": 1})], [12], {}, [12], 5, 1, 0),
        # The main process has used a resource itself.
        ([state(11, 0, {"opened": 1}, {})], [11], {"opened": 7, "open": 1}, [11, 1], 8, 1, 0),
        # There are no children at all: tasks run in the main process.
        ([], [], {"opened": 7, "open": 1}, [1], 7, 1, 0),
        ([], [], {}, [1], 0, 0, 0),
        # Children that have not begun.
        ([], [11, 12], {}, [], 0, 0, 2),
    ],
)  # fmt: skip
def test_assemble(
    states: list[SlotState],
    children: list[int],
    own: dict[str, float],
    shown: list[int],
    opened: float,
    open_now: int,
    unseen: int,
) -> None:
    """Who is shown, and what the totals are."""
    stats = worker(states, children, **own)
    assert [process.pid for process in stats.processes] == shown
    totals = {each.name: each for each in stats.totals()}
    assert sum(each.value("opened") for each in totals.values()) == opened
    assert sum(each.open for each in totals.values()) == open_now
    assert stats.unseen == unseen


def test_what_follows_from_other_numbers() -> None:
    """Idle connections, and how long the oldest use has lasted by now."""
    stats = worker([state(11, 0, {"open": 3, "in_use": 1, "longest_use": MONOTONIC - 2}, {})], [11])
    (process,) = stats.processes
    (db,) = process.resources
    assert (db.idle, db.value("longest_use")) == (2, 2.0)
    assert (process.started, process.published, process.tokens, process.capacity) == (1.0, 2.0, 495, 500)
    assert process.last_task == ProcessStats.from_dict(process.to_dict()).last_task == 1.5


def declared(*names: str) -> tuple[WorkerPools, list[Resource[object]]]:
    pools = WorkerPools()
    return pools, [pools.add(lambda: object(), name=name) for name in names]


def test_a_child_publishes_and_its_parent_sees_it() -> None:
    """Resources that were declared before the fork, and one that was not; replays, and the budget that paid."""
    pools, (db,) = declared("db")
    pools.collector.share(Board.anonymous())

    def child() -> int:
        assert pools.collector.join(0)
        run_attempt(db.get)
        pools.add(lambda: object(), name="late").get()
        pools.shared.listeners.emit(EventKind.ATTEMPT_REPLAYED, "db")
        pools.shared.listeners.emit(EventKind.ATTEMPT_REPLAYED, "nobody's")
        pools.shared.budget.take(timed_out=False)
        return os.getpid()

    pid = run_in_fork(child)
    (process,) = pools.collector.snapshot([pid]).processes
    shown = {each.name: each for each in process.resources}
    assert {name: each.value("opened") for name, each in shown.items()} == {"db": 1, "late": 1}
    assert shown["db"].value("replays") == 1
    assert (process.tokens, process.capacity) == (495, 500)
    assert process.started <= process.last_task <= time.time()
    # In the parent, no task has run.
    assert pools.collector.snapshot([]).processes == ()
    assert [each.value("opened") for each in pools.collector.snapshot([]).past] == [1, 1]


def test_a_process_that_a_child_forks_does_not_write_into_its_slot() -> None:
    """It has one writer. What the grandchild counts is its own."""
    pools, (db,) = declared("db")
    pools.collector.share(Board.anonymous())

    def grandchild() -> float:
        db.get()
        (process,) = pools.collector.snapshot([]).processes
        return process.resources[0].value("opened")

    def child() -> tuple[int, float]:
        pools.collector.join(0)
        db.get()
        db.close()
        return os.getpid(), run_in_fork(grandchild)

    pid, opened = run_in_fork(child)
    assert opened == 1
    (process,) = pools.collector.snapshot([pid]).processes
    assert process.pid == pid
    assert (process.resources[0].value("opened"), process.resources[0].open) == (1, 0)


def test_what_the_parent_has_counted_is_not_counted_again_in_its_children() -> None:
    """They begin at 0; the parent goes on."""
    pools, (db,) = declared("db")
    pools.collector.share(Board.anonymous())
    db.get()

    def child() -> int:
        pools.collector.join(0)
        db.get()
        return os.getpid()

    pid = run_in_fork(child)
    stats = pools.collector.snapshot([pid])
    assert [(process.pid, process.resources[0].value("opened")) for process in stats.processes] == [
        (pid, 1),
        (os.getpid(), 1),
    ]
    assert stats.totals()[0].value("opened") == 2


def test_without_shared_memory_a_child_counts_for_itself() -> None:
    """Nothing else changes."""
    pools, (db,) = declared("db")

    def child() -> float:
        assert not pools.collector.join(0)
        db.get()
        return pools.collector.snapshot().processes[0].resources[0].value("opened")

    assert run_in_fork(child) == 1
