"""What the figures are made of: pure functions over counts."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from demo_tasks import workload
from demo_tasks.settings import from_environment
from demo_tasks.summary import Summary, counted_since, per_task
from demo_tasks.tally import Child


def child(**runs: int) -> Child:
    return Child(runs=Counter(runs))


@pytest.mark.parametrize(
    ("tasks", "expected"),
    [
        (0, {"orders": 0, "payments": 0, "shipments": 0}),
        (1, {"orders": 0, "payments": 0, "shipments": 0}),
        (3, {"orders": 1, "payments": 1, "shipments": 0}),
        (2000, {"orders": 500, "payments": 500, "shipments": 500}),
    ],
)
def test_rows(tasks: int, expected: dict[str, int]) -> None:
    """Each order has four tasks, and three of them write a row."""
    assert workload.rows(tasks) == expected


def test_client_per_task() -> None:
    """With a client a task, each run opens a connection for each resource that the task uses."""
    ran = child(fetch_price=3, place_order=2, take_payment=5)
    assert per_task(ran, "api") == 8
    assert per_task(ran, "db") == 7


def test_counts_of_earlier_runs_are_left_out() -> None:
    """What a child did before the run does not count, and a child that did nothing in it is not shown."""
    before = {"a/1": child(fetch_price=5), "a/2": child(fetch_price=1)}
    before["a/1"].opened["api"] = 1
    now = {"a/1": child(fetch_price=7), "a/2": child(fetch_price=1), "b/1": child(fetch_price=2)}
    now["a/1"].opened["api"] = 1
    counted = counted_since(before, now)
    assert {name: found.runs["fetch_price"] for name, found in counted.items()} == {"a/1": 2, "b/1": 2}
    assert counted["a/1"].opened["api"] == 0


GOOD = Summary(
    tasks=4,
    succeeded=4,
    failed=0,
    seconds=2.0,
    children={"a/1": child(fetch_price=1, place_order=1)},
    rows={"orders": 1},
    rows_expected={"orders": 1},
)


def test_summary_of_a_good_run() -> None:
    """The lines say how many tasks there were and how fast, and that nothing is missing."""
    assert GOOD.ok
    assert GOOD.lines()[0] == "4 tasks: 4 succeeded, 0 failed, in 2.0 s (2 a second)"
    assert GOOD.lines()[-1] == "in the database: 1 orders: nothing lost, nothing twice"


def test_connections_that_asked_are_told_apart() -> None:
    """Those that asked about a lost COMMIT stand beside what tasks opened, in lines and in the report."""
    name = "connections_that_asked"
    asking = Child(Counter(place_order=1), Counter(db=3), Counter({name: 4}))
    summary = replace(GOOD, children={"a/1": asking})
    line = "opened besides those that tasks used: 4 database connections to ask what became of a lost COMMIT"
    assert line in summary.lines()
    assert (summary.report()[name], summary.report()["connections_opened"]["db"]) == (4, 3)
    assert summary.report()["per_child"]["a/1"][name] == 4
    assert "opened besides" not in "\n".join(GOOD.lines())


@pytest.mark.parametrize("bad", [{"failed": 1, "succeeded": 3}, {"rows": {"orders": 0}}, {"succeeded": 3}])
def test_summary_of_a_bad_run(bad: dict[str, object]) -> None:
    """A task that failed or a row that is missing makes the run a bad one."""
    assert not replace(GOOD, **bad).ok


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("postgres://me@db/shop", "postgresql+psycopg2://me@db/shop"),
        ("postgresql://me@db/shop", "postgresql+psycopg2://me@db/shop"),
        ("postgresql+psycopg://me@db/shop", "postgresql+psycopg://me@db/shop"),
    ],
)
def test_database_url(given: str, expected: str) -> None:
    """A URL without a driver gets one that is installed; another driver is left as it is."""
    assert from_environment({"DATABASE_URL": given}).database_url == expected
