"""One run to the end: what it prints, what it reports, what it leaves."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from demo_tasks.summary import RESOURCES
from tests.demo.conftest import empty_place
from tests.demo.running import DemoRun, report

pytestmark = [pytest.mark.slow, pytest.mark.worker, pytest.mark.timeout(300)]

CHILDREN = 4


class Ended(NamedTuple):
    status: int
    output: str
    figures: dict[str, Any]


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> Ended:
    """A run that is over. FORCE_COLOR is what continuous integration sets; it is no terminal."""
    folder = tmp_path_factory.mktemp("once")
    file = folder / "report.json"
    with empty_place():
        arguments = ("--once", "--tasks", "400", "--report", str(file))
        with DemoRun(*arguments, cwd=folder, env={"FORCE_COLOR": "1"}) as run:
            status = run.wait()
    return Ended(status, run.raw, report(file))


def test_every_task_succeeds(ended: Ended) -> None:
    """All tasks succeed although every connection was cut, and each row is there once."""
    assert ended.status == 0, ended.output
    assert ended.figures["tasks"] == ended.figures["succeeded"] == 400
    assert ended.figures["failed"] == 0
    assert ended.figures["failures"] == []
    assert ended.figures["rows"] == dict.fromkeys(("orders", "payments", "shipments", "reservations"), 50)
    assert ended.figures["seconds"] > 0


def test_connections_were_cut_while_tasks_ran(ended: Ended) -> None:
    """Each child's database connection is cut, with tasks still to come; the library or Celery ran them again."""
    assert ended.figures["backends_killed"] >= CHILDREN
    assert ended.figures["cache_killed"] == CHILDREN
    assert ended.figures["upstream_reloaded"] is True
    cut = re.search(r"^at (\d+) tasks: \d+ database, 4 Redis connections cut", ended.output, re.MULTILINE)
    assert cut is not None, ended.output
    assert int(cut[1]) < 400
    # A child whose last task was over may not have needed a connection again; one at least has.
    assert ended.figures["replayed"] + ended.figures["retried"] >= 1


def test_lost_commits_are_resolved(ended: Ended) -> None:
    """The answers to some COMMITs were lost; the database was asked about each, and no task ran again for it."""
    assert ended.figures["commits_lost"] == CHILDREN
    # One that the server ended may have been at its COMMIT, too.
    assert ended.figures["commits_resolved"] >= CHILDREN
    assert ended.figures["replays_refused"] == 0
    assert f"lost COMMITs resolved: {ended.figures['commits_resolved']}" in ended.output
    # Not in the table of what tasks used, but opened all the same; an attempt that failed is asked for once more.
    asked = ended.figures["connections_that_asked"]
    assert asked >= ended.figures["commits_resolved"]
    assert f"opened to ask what became of a lost COMMIT: {asked} database connections" in ended.output


def test_connections_opened_are_few(ended: Ended) -> None:
    """A child opens one connection for each resource, and another one for each that was cut."""
    opened = ended.figures["connections_opened"]
    assert ended.figures["children"] == CHILDREN
    assert CHILDREN <= opened["db"] <= CHILDREN + ended.figures["backends_killed"]
    assert CHILDREN <= opened["cache"] <= CHILDREN + ended.figures["cache_killed"]
    # The reload has closed each once. A response that it cut off may cost another one.
    for resource, at_a_time in (("api", 1), ("carrier", 1), ("suppliers", 2)):
        assert CHILDREN <= opened[resource] <= 3 * at_a_time * CHILDREN
    per_task = ended.figures["connections_with_a_client_per_task"]
    assert {resource: count >= 50 for resource, count in per_task.items()} == dict.fromkeys(RESOURCES, True)
    assert per_task["api"] >= 200
    assert per_task["db"] >= 150


def test_figures_by_child_add_up(ended: Ended) -> None:
    """The children's figures add up to those of the run."""
    children = ended.figures["per_child"].values()
    assert len(children) == CHILDREN
    assert sum(child["tasks"] for child in children) == 400 + ended.figures["retried"]
    counts = ("replayed", "requests_replayed", "commits_resolved", "replays_refused", "retried")
    for key in (*counts, "connections_that_asked"):
        assert sum(child[key] for child in children) == ended.figures[key]
    for key in ("connections_opened", "connections_with_a_client_per_task"):
        for resource, total in ended.figures[key].items():
            assert sum(child[key][resource] for child in children) == total


def test_warm_stop_leaves_no_connection(ended: Ended) -> None:
    """After the worker's warm stop the servers have no connection of the worker's left."""
    assert ended.figures["connections_at_stop"] == 0


def test_plain_lines_without_a_terminal(ended: Ended) -> None:
    """Without a terminal there is no control character in the output, and nothing is drawn over."""
    assert re.findall(r"[\x00-\x09\x0b-\x1f]", ended.output) == []


def test_it_says_what_will_be_shown_and_what_was(ended: Ended) -> None:
    """First what to watch for, at the end what came of it; no line is wider than a terminal of 100 columns."""
    first, *others = ended.output.splitlines()
    assert first == "A shop's 400 tasks, in a Celery worker with 4 processes, on real servers."
    opened = sum(ended.figures["connections_opened"].values())
    shown = "Shown: no task failed, and no row is missing or there twice, though every connection was cut."
    assert shown in others
    assert others[others.index(shown) + 1].startswith(f"{opened} connections did the work; a client per task would")
    assert [line for line in (first, *others) if len(line) > 100] == []
    assert others[-1] == "Connections of the worker after its stop: 0"


def test_everything_is_stopped_in_order(ended: Ended) -> None:
    """Flower first, then the worker, then what the worker uses."""
    stopped = re.findall(r"^(.+) stopped$", ended.output, re.MULTILINE)
    assert stopped == ["Flower", "worker", "HTTP server", "Redis", "PostgreSQL"]


def test_two_at_once(place: Path, tmp_path: Path) -> None:
    """Two runs that start at the same moment do not disturb each other."""
    files = [tmp_path / "one.json", tmp_path / "two.json"]
    arguments = ("--once", "--tasks", "200", "--concurrency", "2", "--report")
    with (
        DemoRun(*arguments, str(files[0]), cwd=tmp_path) as one,
        DemoRun(*arguments, str(files[1]), cwd=tmp_path) as two,
    ):
        assert (one.wait(), two.wait()) == (0, 0), one.text + two.text
    for file in files:
        figures = report(file)
        assert figures["failed"] == 0
        assert figures["children"] == 2
        assert figures["connections_opened"]["db"] <= 2 + figures["backends_killed"]
