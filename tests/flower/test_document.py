"""The document is made of replies alone: a table of what is known, and what follows from it."""

from __future__ import annotations

from typing import Any

import pytest

from tests.flower.fake import process, resource, told, worker_stats
from workerpools._stats.snapshot import ResourceStats, WorkerStats
from workerpools.flower._page import UNHEARD_AFTER, Reply, Status, document, status


@pytest.mark.parametrize(
    ("answered", "alive", "age", "reachable", "expected"),
    [
        (True, True, 0.0, True, Status.ONLINE),
        # Its events were lost, or it sends none.
        (True, False, 0.0, True, Status.ONLINE),
        (True, None, 0.0, True, Status.ONLINE),
        (False, True, 99.0, True, Status.SILENT),
        (False, True, None, True, Status.SILENT),
        (False, False, 1.0, True, Status.OFFLINE),
        (False, None, UNHEARD_AFTER - 1, True, Status.SILENT),
        (False, None, UNHEARD_AFTER, True, Status.OFFLINE),
        (False, None, None, True, Status.OFFLINE),
        # Nothing is heard of anybody: that says nothing of the worker.
        (False, False, 99.0, False, Status.SILENT),
        (False, None, None, False, Status.SILENT),
    ],
)
def test_status(answered: bool, alive: bool | None, age: float | None, reachable: bool, expected: Status) -> None:
    """What is known of a worker follows from its answer, its events and whether anything can be heard."""
    assert status(answered=answered, alive=alive, age=age, reachable=reachable) is expected


def replied(received: float, pools: Any) -> Reply:
    return Reply.of(received, {"pid": 1, "workerpools": pools})


def made(replies: dict[str, Reply], **given: Any) -> dict[str, Any]:
    defaults: dict[str, Any] = {"answered": set(replies), "alive": {}, "asked": 99.0, "now": 100.0}
    return document(replies, **{**defaults, **given})


def test_snapshots_come_whole_with_their_totals() -> None:
    """What a worker said can be read back, and the totals are those of its own."""
    stats = worker_stats(
        process(1, 0, resource("db", open=1, in_use=1, opened=3)),
        process(2, 1, resource("db", open=1, opened=2), resource("api", "http", reused=7)),
        past=(resource("db", opened=5),),
    )
    found = made({"celery@a": replied(97.5, told(stats))})
    assert (found["version"], found["now"], found["asked"], found["problem"]) == (1, 100.0, 99.0, "")
    (worker,) = found["workers"]
    assert (worker["name"], worker["status"], worker["age"], worker["readable"]) == ("celery@a", "online", 2.5, True)
    (snapshot,) = worker["snapshots"]
    again = WorkerStats.from_dict(snapshot)
    assert again.processes[0].resources == stats.processes[0].resources
    totals = {each["name"]: ResourceStats.from_dict(each) for each in snapshot["totals"]}
    assert totals["db"].value("opened") == 10
    assert totals["api"].value("reused") == 7


@pytest.mark.parametrize(
    "pools",
    [
        {},
        [],
        "text",
        7,
        {"snapshots": None},
        {"snapshots": "text"},
        {"snapshots": {"a": 1}},
        {"snapshots": [None]},
        {"snapshots": [{"processes": 7}]},
        {"snapshots": [{"processes": [{"resources": [{"name": "db", "open": "many"}]}]}]},
        {"snapshots": [{"processes": [{"resources": [{"name": "db", "closed": 3}]}]}]},
        {"snapshots": [{"taken": "yesterday"}]},
    ],
    ids=repr,
)
def test_reply_that_cannot_be_read(pools: Any) -> None:
    """A worker of another version, or a broken one, is shown as such, and hides nobody else."""
    found = made({"celery@a": replied(99.0, pools), "celery@b": replied(99.0, told(worker_stats()))})
    assert [(each["name"], each["readable"]) for each in found["workers"]] == [("celery@a", False), ("celery@b", True)]
    assert list(found["workers"][0]["snapshots"]) == []


def test_who_is_shown() -> None:
    """Workers in their names' order: those that answered, and those that live and did not; others by name alone."""
    found = made(
        {
            "celery@c": replied(99.0, told(worker_stats())),
            "celery@gone": replied(50.0, told(worker_stats())),
            "celery@without": Reply.of(99.0, {"pid": 1}),
            "celery@without-gone": Reply.of(50.0, "strange"),
        },
        answered={"celery@c", "celery@without"},
        alive={"celery@b": True, "celery@never": False, "celery@gone": False, "celery@without-gone": False},
    )
    assert [(each["name"], each["status"], each["age"]) for each in found["workers"]] == [
        ("celery@b", "silent", None),
        ("celery@c", "online", 1.0),
        ("celery@gone", "offline", 50.0),
    ]
    assert found["without"] == ["celery@without"]


def test_clock_that_runs_ahead() -> None:
    """An age is never negative."""
    (worker,) = made({"celery@a": replied(101.0, told(worker_stats()))})["workers"]
    assert worker["age"] == 0.0
