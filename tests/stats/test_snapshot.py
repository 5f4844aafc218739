"""Snapshots: what they answer, and their JSON form."""

from __future__ import annotations

import json
import time

import pytest

from tests.stats.test_metrics import row
from workerpools._stats.metrics import BOUNDS, DEFINITIONS, FIRST, WIDTH, MetricType, definition
from workerpools._stats.snapshot import Alert, Histogram, ProcessStats, ResourceStats, WorkerStats, merged


def stats(name: str = "db", **numbers: float) -> ResourceStats:
    return ResourceStats(name, "database", tuple(row(**numbers)))


FULL = ResourceStats("db", "database", tuple(float(number + 1) for number in range(WIDTH)))


@pytest.mark.parametrize("definition", DEFINITIONS, ids=lambda each: each.name)
def test_every_number_can_be_asked_for_by_its_name(definition: object) -> None:
    """By name, by name and label, or as a histogram, as the table says."""
    name, kind, values = definition.name, definition.type, definition.values  # type: ignore[attr-defined]
    first = FIRST[name]
    if kind is MetricType.HISTOGRAM:
        histogram = FULL.histogram(name)
        assert histogram.buckets[0] == first + 1
        assert histogram.max == histogram.sum + 1
        with pytest.raises(KeyError):
            FULL.value(name)
    elif values:
        assert FULL.labelled(name) == {value: first + n + 1 for n, value in enumerate(values)}
        assert FULL.value(name, values[-1]) == first + len(values)
        assert FULL.value(name) == sum(FULL.labelled(name).values())
        with pytest.raises(KeyError):
            FULL.value(name, "no such label")
    else:
        assert FULL.value(name) == first + 1


@pytest.mark.parametrize(
    ("numbers", "utilisation", "reuse"),
    [
        ({}, None, None),
        ({"limit": 4, "in_use": 1}, 0.25, None),
        ({"in_use": 1}, None, None),
        ({"opened": 1, "reused": 3}, None, 0.75),
        ({"limit": 2, "in_use": 2, "opened": 2}, 1.0, 0.0),
    ],
)
def test_ratios(numbers: dict[str, float], utilisation: float | None, reuse: float | None) -> None:
    """None where there is nothing to divide by."""
    assert stats(**numbers).utilisation == utilisation
    assert stats(**numbers).reuse_ratio == reuse


@pytest.mark.parametrize(("ended", "present", "longest"), [(0.0, 0.0, 0.0), (0.009, 4.6, 4.6), (7.25, 4.6, 7.25)])
def test_the_longest_wait_may_be_one_that_lasts(ended: float, present: float, longest: float) -> None:
    """The longest of those that ended, unless somebody has waited for longer by now."""
    numbered = row(longest_wait=present)
    numbered[FIRST["acquire_wait"] + definition("acquire_wait").width - 1] = ended
    assert ResourceStats("db", "database", tuple(numbered)).longest_wait_so_far == longest


def test_a_histogram() -> None:
    """Its count, mean, and both ways to ask how many were how long."""
    buckets = tuple(range(1, len(BOUNDS) + 2))
    histogram = Histogram(buckets, 33.0, 70.0)
    assert histogram.count == 66
    assert histogram.mean == 0.5
    assert histogram.cumulative()[0] == (0.001, 1)
    assert histogram.cumulative()[-1] == (float("inf"), 66)
    assert histogram.above(60.0) == 11
    assert histogram.above(5.0) == 9 + 10 + 11
    assert Histogram().mean == 0.0


@pytest.mark.parametrize("each", [FULL, ResourceStats("api", "http"), stats(opened=3, longest_use=0.5)])
def test_a_resource_survives_json(each: ResourceStats) -> None:
    """What JSON carries is what there was."""
    assert ResourceStats.from_dict(json.loads(json.dumps(each.to_dict()))) == each


def test_numbers_that_are_0_are_left_out() -> None:
    """A reply with many processes stays small."""
    assert stats(opened=3).to_dict() == {"name": "db", "kind": "database", "opened": 3}


def worker(processes: int = 2) -> WorkerStats:
    return WorkerStats(
        taken=1000.0,
        pid=1,
        execution_pool="prefork",
        concurrency=4,
        ceilings=(("db", 2), ("cache", 0)),
        processes=tuple(
            ProcessStats(10 + n, n, 900.0, 999.5, 495, 500, 1, n == 1, (stats("api", opened=1), FULL))
            for n in range(processes)
        ),
        past=(stats("api", opened=5),),
        unseen=1,
        alerts=(Alert("utilisation", "db", 11, 940.0, 1.0, 0.8, "in use"), Alert("publish_stopped")),
    )


def test_a_worker_survives_json() -> None:
    """Processes and past included."""
    assert WorkerStats.from_dict(json.loads(json.dumps(worker().to_dict()))) == worker()


def test_what_another_version_tells_is_read() -> None:
    """Names that are not known are skipped, and what is missing is 0."""
    data = {"future": 1, "processes": [{"pid": 3, "new": 2, "resources": [{"name": "db", "open": 1, "new": {}}]}]}
    read = WorkerStats.from_dict(data)
    assert read.processes == (ProcessStats(3, resources=(ResourceStats("db", "", tuple(row(open=1))),)),)
    other_buckets = {"name": "db", "acquire_wait": {"buckets": [1, 2], "sum": 3.0, "max": 2.0}}
    assert ResourceStats.from_dict(other_buckets) == ResourceStats("db")


def test_totals_are_those_of_the_living_and_of_the_past() -> None:
    """By name, each once."""
    api, db = worker().totals()
    assert (api.name, api.value("opened")) == ("api", 7)
    assert (db.name, db.value("opened")) == ("db", 2 * FULL.value("opened"))


def test_merged_knows_the_kind_if_anybody_does() -> None:
    """A process that has not opened the resource may not know."""
    (together,) = merged([ResourceStats("api"), ResourceStats("api", "http", tuple(row(opened=1)))])
    assert together == ResourceStats("api", "http", tuple(row(opened=1)))


def test_a_reply_for_64_children_takes_little_time() -> None:
    """The pure part, with JSON: under 10 ms on a machine that does nothing else; held to ten times that here."""
    big = worker(64)
    took = []
    for _ in range(5):
        start = time.perf_counter()
        json.dumps(big.to_dict())
        took.append(time.perf_counter() - start)
    assert min(took) < 0.1
