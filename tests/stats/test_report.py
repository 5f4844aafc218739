"""What is said of snapshots: as a document, as lines, and drawn for terminals of different widths."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console

from tests.stats.test_metrics import row
from workerpools._celery.cli.plain import text
from workerpools._celery.cli.rows import seconds
from workerpools._celery.cli.table import Screen
from workerpools._celery.worker import readable
from workerpools._stats.metrics import DEFINITIONS, FIRST, definition
from workerpools._stats.report import document, lines
from workerpools._stats.snapshot import Alert, ProcessStats, ResourceStats, WorkerStats

NOW = 1_700_000_000.0


def resource(name: str, kind: str = "database", wait: float = 0.0, **numbers: float) -> ResourceStats:
    numbered = row(**numbers)
    numbered[FIRST["acquire_wait"] + definition("acquire_wait").width - 1] = wait
    return ResourceStats(name, kind, tuple(numbered))


def busy(pid: int = 4194304, index: int | None = 11, tokens: int = 500) -> ProcessStats:
    return ProcessStats(
        pid=pid,
        index=index,
        tokens=tokens,
        capacity=500,
        resources=(
            resource("api", "http", wait=7.25, open=10, in_use=10, limit=10, pending=3, opened=10, reused=90),
            resource("database of orders", wait=0.0004, open=1, limit=2, opened=1, reused=5000, failures=1234),
            resource("cache", ""),
        ),
    )


def worker(*processes: ProcessStats, **more: Any) -> WorkerStats:
    return WorkerStats(taken=NOW, pid=1, execution_pool="prefork", processes=processes, **more)


def drawn(workers: dict[str, Sequence[WorkerStats]], width: int, **options: Any) -> str:
    console = Console(file=io.StringIO(), width=width, highlight=False)
    Screen(console=console, **options).show(workers)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


# The document.


def test_the_document_has_every_number() -> None:
    """Those that are 0, too: whoever reads it need not know which are left out elsewhere."""
    told = document({"b@h": [worker(busy())], "a@h": []}, ["d@h", "c@h"], NOW + 0.1234)
    assert told == json.loads(json.dumps(told))
    assert (told["version"], told["taken"], told["missing"]) == (1, NOW + 0.123, ["c@h", "d@h"])
    assert list(told["workers"]) == ["a@h", "b@h"]
    (stats,) = told["workers"]["b@h"]
    facts = {"pid", "execution_pool", "concurrency", "ceilings", "unseen", "alerts", "taken"}
    assert {*facts, "processes", "totals"} == set(stats)
    api = stats["totals"]["api"]
    assert set(api) == {"kind", "utilisation", "reuse_ratio", *(each.name for each in DEFINITIONS)}
    assert (api["utilisation"], api["reuse_ratio"], api["pending"], api["leaks"]) == (1.0, 0.9, 3, 0)
    assert api["acquire_wait"]["max"] == 7.25
    assert set(api["closed"].values()) == {0}
    assert stats["processes"][0]["resources"]["cache"]["utilisation"] is None


def test_lines_are_for_grep() -> None:
    """One for each resource of a worker, and one for each alert."""
    alert = Alert("utilisation", "api", 7, NOW - 60, 1.0, 0.8, "10 of 10 connections are in use")
    told = list(lines({"w@h": [worker(busy(), alerts=(alert,))]}))
    assert told[0] == (
        "w@h api in_use=10 open=10 limit=10 pending=3 longest_wait=7.250 timed_out=0 reused=0.90 failures=0 replays=0"
    )
    assert told[1].startswith("w@h cache in_use=0 open=0 limit=- ")
    assert told[3] == "w@h api alert=utilisation 10 of 10 connections are in use"


def test_a_wait_that_lasts_is_told_everywhere() -> None:
    """In the lines, in the table, and in what celery inspect stats has for people: not only those that ended."""
    waiting = resource("db", wait=0.009, open=1, in_use=1, limit=1, pending=1, opened=1, longest_wait=4.6)
    stats = worker(ProcessStats(5, 0, resources=(waiting,)))
    assert "longest_wait=4.600 " in next(lines({"w@h": [stats]}))
    assert "4.6 s" in drawn({"w@h": [stats]}, 140)
    assert "longest wait 4.600 s," in readable([stats])["resources"]["db"]


# The screen.


@pytest.mark.parametrize("width", [80, 119, 120, 140])
def test_no_number_is_cut(width: int) -> None:
    """However large: what gives way is the resource's name."""
    shown = drawn({"w@h": [worker(busy(), busy(4194303, 10, 0))]}, width)
    assert "…" not in shown.replace("ord…", "")
    assert max(map(len, shown.splitlines())) <= width
    for number in ("7.2 s", "0.4 ms", "1234", "90%", "99%", "11 4194304", "10 4194303", "500"):
        assert number in shown, shown
    assert ("0/500" in shown) is (width >= 120)
    assert ("20/20/20" in shown) is (width < 120)


@pytest.mark.parametrize("totals", [False, True])
@pytest.mark.parametrize("width", [80, 119, 120, 140])
def test_the_plain_table_says_the_same(width: int, totals: bool) -> None:
    """Where rich is absent: every line is the same, and in the same columns."""
    alerts = (
        Alert("utilisation", "api", 4194304, 0.0, 1.0, 0.8, "10 of 10"),
        Alert("retry_budget_empty", "", None, 0.0, 0.0, 0.0, "nothing is replayed"),
    )
    idle = ProcessStats(6, 1, resources=(resource("api"),))
    short = replace(busy(), resources=tuple(replace(each, name=each.name[:8]) for each in busy().resources))
    workers = {"a@h": [], "b@h": [worker()], "w@h": [worker(short, idle, alerts=alerts)]}
    rich = [line.rstrip() for line in drawn(workers, width, totals=totals).splitlines()]
    assert len(rich) > 10
    assert text(workers, width=width, now=NOW, totals=totals).splitlines() == rich


@pytest.mark.parametrize("width", [80, 119, 120, 140])
def test_the_plain_table_cuts_a_name_and_no_number(width: int) -> None:
    """In one line for each resource, within the terminal's width."""
    shown = text({"w@h": [worker(busy(), busy(4194303, 10, 0))]}, width=width, now=NOW)
    assert max(map(len, shown.splitlines())) <= width
    assert shown.count("database ") == 3
    for number in ("7.2 s", "0.4 ms", "1234", "90%", "99%", "11 4194304", "10 4194303", "500"):
        assert number in shown, shown


def test_totals_stand_first_and_alone_where_wanted() -> None:
    """With the counts of processes that have ended."""
    stats = worker(busy(), past=(resource("api", opened=5),))
    assert drawn({"w@h": [stats]}, 140).splitlines()[2].split()[:3] == ["total", "api", "10"]
    assert "4194304" not in drawn({"w@h": [stats]}, 140, totals=True)


def test_workers_with_nothing_to_show() -> None:
    """Each says which nothing it is."""
    idle = ProcessStats(5, 0, resources=(resource("api"),))
    shown = drawn(
        {
            "a@h": [],
            "b@h": [worker()],
            "c@h": [worker(idle, unseen=2)],
            "d@h": [worker(busy(), ProcessStats(6, 1, resources=(resource("api"),)))],
        },
        80,
    )
    a, b, c, d = shown.split("\n\n")
    assert "its app has no WorkerPools" in a
    assert "no resource is declared" in b
    assert "1 process, 2 more without statistics" in c
    assert "not used yet: api" in c
    assert " 1 6" in d
    assert "none yet" in d
    assert d.rstrip().endswith("not used yet: cache")


def test_alerts_are_told_and_marked() -> None:
    """In the title, at the row that each is about, and in full below; a message is not taken for markup."""
    alerts = (
        Alert("utilisation", "api", 4194304, NOW - 75, 1.0, 0.8, "10 of 10 connections are in use [bold]"),
        Alert("retry_budget_empty", "", None, 0.0, 0.0, 0.0, "nothing is replayed"),
    )
    shown = drawn({"w@h": [worker(busy(), alerts=alerts)]}, 140)
    assert "2 alerts" in shown.splitlines()[0]
    assert "api !" in shown
    assert "! utilisation api in process 4194304 for " in shown
    assert "10 of 10 connections are in use [bold]" in shown
    assert "! retry_budget_empty: nothing is replayed" in shown


def test_a_process_is_shown_once_whatever_pools_its_resources_are_of() -> None:
    """An app may have several WorkerPools; the emptier budget is the one that matters."""
    other = ProcessStats(4194304, 11, tokens=3, capacity=500, resources=(resource("stock", open=1, opened=1),))
    shown = drawn({"w@h": [worker(busy()), worker(other)]}, 140)
    assert shown.count("4194304") == 1
    assert "3/500" in shown
    assert "1 process" in shown


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (0.0, "0 ms"),
        (0.00004, "0 ms"),
        (0.0004, "0.4 ms"),
        (0.00994, "9.9 ms"),
        (0.00996, "10 ms"),
        (0.9994, "999 ms"),
        (0.9996, "1.0 s"),
        (7.25, "7.2 s"),
        (3.0, "3 s"),
        (40.2, "40 s"),
        (99.6, "2 min"),
        (5000, "83 min"),
        (7200, "2 h"),
    ],
)
def test_times_are_short(value: float, told: str) -> None:
    """In the unit that needs the fewest digits."""
    assert seconds(value) == told


def test_watching_writes_lines_where_nothing_can_be_taken_back() -> None:
    """With the time, and with what is wrong."""
    console = Console(file=io.StringIO(), width=40)
    with Screen(console=console).watching() as update:
        update({"w@h": [worker(busy())]}, "")
        update({}, "no answer")
    assert isinstance(console.file, io.StringIO)
    told = console.file.getvalue().splitlines()
    assert len(told) == 4
    assert told[0][9:].startswith("w@h api in_use=10")
    assert told[3][9:] == "no answer"
