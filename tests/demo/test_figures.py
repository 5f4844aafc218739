"""What the figures are made of: pure functions over counts."""

from __future__ import annotations

import io
from collections import Counter
from dataclasses import replace

import pytest

from demo_tasks import workload
from demo_tasks.runner.faults import Faults
from demo_tasks.runner.screen import Screen
from demo_tasks.settings import from_environment
from demo_tasks.summary import RESOURCES, Summary, counted_since, per_task
from demo_tasks.tally import Child


def child(**runs: int) -> Child:
    return Child(runs=Counter(runs))


@pytest.mark.parametrize(
    ("tasks", "expected"),
    [
        (0, {"orders": 0, "payments": 0, "shipments": 0, "reservations": 0}),
        (1, {"orders": 0, "payments": 0, "shipments": 0, "reservations": 0}),
        (3, {"orders": 1, "payments": 1, "shipments": 0, "reservations": 0}),
        (2000, {"orders": 250, "payments": 250, "shipments": 250, "reservations": 250}),
    ],
)
def test_rows(tasks: int, expected: dict[str, int]) -> None:
    """Each order has eight tasks, and four of them write a row."""
    assert workload.rows(tasks) == expected


def test_client_per_task() -> None:
    """With a client a task, each run opens a connection for each resource that the task uses."""
    ran = child(fetch_price=3, place_order=2, take_payment=5, compare_suppliers=4)
    assert per_task(ran, "api") == 8
    assert per_task(ran, "db") == 7
    # It asks two at the same time.
    assert per_task(ran, "suppliers") == 8


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
    assert GOOD.lines()[-1] == "1 orders: none lost, none twice"


def test_connections_that_asked_are_told_apart() -> None:
    """Those that asked about a lost COMMIT stand beside what tasks opened, in lines and in the report."""
    name = "connections_that_asked"
    asking = Child(Counter(place_order=1), Counter(db=3), Counter({name: 4}))
    summary = replace(GOOD, children={"a/1": asking})
    line = "opened to ask what became of a lost COMMIT: 4 database connections, not in the table"
    assert line in summary.lines()
    assert (summary.report()[name], summary.report()["connections_opened"]["db"]) == (4, 3)
    assert summary.report()["per_child"]["a/1"][name] == 4
    assert "opened to ask" not in "\n".join(GOOD.lines())


def test_closing_says_what_was_shown() -> None:
    """The connections, beside those of a client per task, and that connections were cut if they were."""
    opened = Child(Counter(take_payment=10), Counter(api=1, db=2))
    shown, compared = replace(GOOD, children={"a/1": opened}, backends_killed=1).closing()
    assert shown == "Shown: no task failed, and no row is missing or there twice, though every connection was cut."
    assert compared == "3 connections did the work; a client per task would have opened 20."
    assert GOOD.closing()[0] == "Shown: no task failed, and no row is missing or there twice."
    (bad,) = replace(GOOD, failed=1).closing()
    assert bad.startswith("Not what was promised")


def test_the_largest_figures_fit_in_100_columns() -> None:
    """The screen is read without wrapping, whatever the numbers are."""
    counts = dict.fromkeys(("replayed", "requests_replayed", "commits_resolved", "retried", "replays_refused"), 12_345)
    large = Child(
        Counter(take_payment=999_999, compare_suppliers=999_999), Counter(api=1_234, db=1_234), Counter(counts)
    )
    large.counts["connections_that_asked"] = 1_234
    large.opened.update(dict.fromkeys(("carrier", "cache", "suppliers"), 1_234))
    written = dict.fromkeys(("orders", "payments", "shipments", "reservations"), 125_000)
    summary = Summary(
        tasks=1_000_000,
        succeeded=1_000_000,
        failed=0,
        seconds=9_999.9,
        children={f"host/{4_194_304 + number}": large for number in range(4)},
        rows=written,
        rows_expected=written,
        backends_killed=128,
        cache_killed=64,
        upstream_reloaded=True,
        commits_lost=64,
    )
    stream = io.StringIO()
    screen = Screen(stream)
    screen.opening(1_000_000, 64)
    screen.summary(summary)
    faults = Faults(None, None, cache=None, children=64, tasks=1, relay=Lossy())  # type: ignore[arg-type]
    faults._terminated, faults.cache_killed, faults.upstream_reloaded = 64, 64, True
    screen.say(f"at 400,000 tasks: {faults}")
    lines = stream.getvalue().splitlines()
    assert [line for line in lines if len(line) > 100] == []
    headings = next(line for line in lines if line.startswith("| process"))
    above = lines[lines.index(headings) - 1]
    columns = list(zip(above.strip("|").split("|"), headings.strip("|").split("|"), strict=True))
    assert len({" ".join(" ".join(column).split()) for column in columns}) == len(columns) == 2 + len(RESOURCES)
    firsts = [line.split("|")[1].strip() for line in lines if line.startswith("|")]
    assert firsts[-2:] == ["together", "with a client per task"]


class Lossy:
    lost = 0


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
