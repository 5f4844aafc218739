"""How the statistics are named in OpenTelemetry, and how its histograms are filled."""

from __future__ import annotations

import bisect
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.stats.test_metrics import row
from workerpools._stats.metrics import AGES, BOUNDS, DEFINITIONS, MetricType
from workerpools._stats.snapshot import OF_WORKERS, Histogram, ResourceStats
from workerpools.opentelemetry._conventions import (
    INSTRUMENTS,
    Form,
    Instrument,
    added,
    applies,
    attributes,
    measured,
    recordings,
)


def instrument(name: str) -> Instrument:
    (found,) = [each for each in INSTRUMENTS if each.name == name]
    return found


def shown(kind: str, name: str, **numbers: float) -> list[tuple[dict[str, object], float]]:
    """Return what an instrument shows of a resource of a kind."""
    stats = ResourceStats("thing", kind, tuple(row(**numbers)))
    return [
        ({**attributes(part, stats, ("shop.example", 8080)), **label}, value)
        for part in instrument(name).parts
        if applies(part, kind)
        for label, value in measured(part, stats)
    ]


def test_every_number_of_every_kind_is_shown_once() -> None:
    """Under a convention's name or under ours, and never under both; `open` is told by the states of a database."""
    for kind in ("http", "database", ""):
        names = [part.definition.name for each in INSTRUMENTS for part in each.parts if applies(part, kind)]
        assert len(set(names)) == len(names)
        missing = {each.name for each in DEFINITIONS} - set(names)
        assert missing == ({"open"} if kind == "database" else set())


def test_names_and_units_are_plain() -> None:
    """Unique, and in the singular between braces, as the general conventions want it."""
    assert len({each.name for each in INSTRUMENTS}) == len(INSTRUMENTS)
    assert {each.unit for each in INSTRUMENTS} >= {"s", "{connection}", "{retry}", "{process}", "{acquisition}"}
    assert all(each.unit == "s" or (each.unit[0], each.unit[-1]) == ("{", "}") for each in INSTRUMENTS)
    assert not any(each.unit.endswith("s}") and not each.unit.endswith("ss}") for each in INSTRUMENTS)
    assert len([each for each in INSTRUMENTS if not each.parts]) == len(OF_WORKERS)
    assert INSTRUMENTS[-len(OF_WORKERS) - 1].parts


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("workerpools.connections.opened", Form.COUNTER),
        ("workerpools.connections.in_use", Form.UP_DOWN_COUNTER),
        ("workerpools.longest_use", Form.GAUGE),
        ("workerpools.acquire_wait", Form.HISTOGRAM),
        ("workerpools.processes.running", Form.GAUGE),
    ],
)
def test_kinds_of_instruments(name: str, form: Form) -> None:
    """As the numbers behave."""
    assert instrument(name).form is form


@pytest.mark.parametrize(
    ("kind", "name", "numbers", "points"),
    [
        (
            "database",
            "db.client.connection.count",
            {"open": 3, "in_use": 2, "idle": 1},
            [
                ({"db.client.connection.pool.name": "thing", "db.client.connection.state": "used"}, 2),
                ({"db.client.connection.pool.name": "thing", "db.client.connection.state": "idle"}, 1),
            ],
        ),
        ("http", "db.client.connection.count", {"open": 3}, []),
        ("database", "db.client.connection.limit", {"limit": 4}, [({"db.client.connection.pool.name": "thing"}, 4)]),
        # No limit is not a limit of 0.
        ("database", "db.client.connection.limit", {}, []),
        (
            "http",
            "http.client.open_connections",
            # Five requests over two connections of HTTP/2.
            {"open": 3, "in_use": 5, "idle": 1},
            [
                (
                    {
                        "workerpools.resource": "thing",
                        "server.address": "shop.example",
                        "server.port": 8080,
                        "http.connection.state": state,
                    },
                    count,
                )
                for state, count in (("active", 2), ("idle", 1))
            ],
        ),
        ("database", "workerpools.connections.opened", {"opened": 9}, [({"workerpools.resource": "thing"}, 9)]),
        ("database", "workerpools.connections.in_use", {"in_use": 2}, []),
        ("", "workerpools.connections.in_use", {"in_use": 2}, [({"workerpools.resource": "thing"}, 2)]),
        ("http", "workerpools.longest_use", {"longest_use": 0.5}, [({"workerpools.resource": "thing"}, 0.5)]),
    ],
)
def test_points(kind: str, name: str, numbers: dict[str, float], points: list[object]) -> None:
    """The conventions' names and attributes where they have some, ours elsewhere."""
    assert shown(kind, name, **numbers) == points


def test_labels_are_attributes() -> None:
    """One point for each value, in a name space of ours."""
    points = shown("http", "workerpools.failures", failures=2)
    assert points[0] == ({"workerpools.resource": "thing", "workerpools.kind": "stale"}, 2)
    assert [value for _, value in points[1:]] == [0] * (len(points) - 1)


def test_without_a_server_of_its_own() -> None:
    """A client that goes everywhere has no address to tell."""
    (part, _) = instrument("http.client.open_connections").parts
    assert "server.address" not in attributes(part, ResourceStats("thing", "http"), None)


def histogram(seconds: list[float], bounds: tuple[float, ...] = BOUNDS) -> Histogram:
    """Return what a meter counts of these times."""
    buckets = [0] * (len(bounds) + 1)
    for each in seconds:
        buckets[bisect.bisect_left(bounds, each)] += 1
    return Histogram(tuple(buckets), sum(seconds), max(seconds, default=0.0), bounds)


times = st.lists(st.floats(0, 5000, allow_subnormal=False) | st.sampled_from([0.0, *BOUNDS, *AGES]), max_size=20)


@settings(max_examples=300)
@given(times, times, st.sampled_from([BOUNDS, AGES]))
def test_recordings_fill_the_very_buckets_and_have_the_very_sum(
    earlier: list[float], later: list[float], bounds: tuple[float, ...]
) -> None:
    """Whatever was recorded before, and at the bounds, too."""
    before, after = histogram(earlier, bounds), histogram([*earlier, *later], bounds)
    found = recordings(before, after)
    made = [value for _, value, count in found for _ in range(count)]
    assert histogram(made, bounds).buckets == histogram(later, bounds).buckets
    assert math.isclose(sum(made), sum(later), rel_tol=1e-6, abs_tol=1e-6)
    assert max(made, default=0.0) <= max([*earlier, *later, math.nextafter(bounds[-1], math.inf)])
    recorded = added(before, found)
    assert recorded.buckets == after.buckets
    assert math.isclose(recorded.sum, after.sum, rel_tol=1e-6, abs_tol=1e-6)


def test_numbers_that_fall_add_nothing() -> None:
    """What was recorded cannot be taken back; and what is read too low once is not recorded again."""
    full, low = histogram([0.002, 0.2, 2.0]), histogram([0.002])
    assert recordings(full, low) == []
    assert added(full, []) == full


def test_a_part_can_be_recorded_later() -> None:
    """Then the buckets and the sum are as if all had been recorded at once."""
    empty, full = histogram([]), histogram([0.002, 0.003, 0.2, 0.3, 2.0])
    first = added(empty, recordings(empty, full)[:1])
    assert first.count == 2
    rest = recordings(first, full)
    assert [count for _, _, count in rest] == [2, 1]
    assert added(first, rest).buckets == full.buckets
    assert math.isclose(added(first, rest).sum, full.sum)


def test_forms_follow_kinds() -> None:
    """All histograms have bounds, and nothing else has."""
    for each in INSTRUMENTS:
        assert bool(each.bounds) is (each.form is Form.HISTOGRAM)
        for part in each.parts:
            assert (part.definition.type is MetricType.HISTOGRAM) is (each.form is Form.HISTOGRAM)
