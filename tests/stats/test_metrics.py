"""The table of what is counted, and how the numbers of several processes are put together."""

from __future__ import annotations

import pytest

from workerpools._stats.memory import fold, lasting, merge
from workerpools._stats.metrics import BOUNDS, DEFINITIONS, FIRST, WIDTH, MetricType


def row(**numbers: float) -> list[float]:
    """Return a row with these numbers, the first of each name's."""
    made = [0.0] * WIDTH
    for name, number in numbers.items():
        made[FIRST[name]] = number
    return made


#: The cell of the highest value of a histogram.
HIGHEST = FIRST["acquire_wait"] + len(BOUNDS) + 2


def test_the_table_has_each_name_once_and_says_what_it_means() -> None:
    """The names are stable, unique and fit for exporters; units and meanings are there for people."""
    assert len({each.name for each in DEFINITIONS}) == len(DEFINITIONS)
    for each in DEFINITIONS:
        assert each.name.isidentifier()
        assert each.name == each.name.lower()
        assert each.unit
        assert each.meaning.endswith(".")
        assert bool(each.label) is bool(each.values)
    assert sum(each.width for each in DEFINITIONS) == WIDTH
    assert list(BOUNDS) == sorted(BOUNDS)
    assert 5.0 in BOUNDS


@pytest.mark.parametrize(
    ("name", "values", "together"),
    [
        ("opened", [3, 4], 7),
        ("closed", [1, 0, 2], 3),
        ("open", [1, 1], 2),
        ("limit", [2, 2, 2], 6),
        ("acquire_wait", [5, 6], 11),
        ("longest_use", [0.5, 2.5, 1.0], 2.5),
        ("opened", [9], 9),
        ("opened", [], 0),
    ],
)
def test_merge(name: str, values: list[float], together: float) -> None:
    """Counters, gauges and buckets add up; of ages the highest counts."""
    assert merge([row(**{name: value}) for value in values]) == row(**{name: together})


def test_merge_takes_the_highest_of_the_highest_waits() -> None:
    """The highest value of a histogram is no sum."""
    first, second = row(acquire_wait=1), row(acquire_wait=1)
    first[HIGHEST], second[HIGHEST] = 0.25, 0.75
    assert merge([first, second])[HIGHEST] == 0.75


@pytest.mark.parametrize("definition", DEFINITIONS, ids=lambda each: each.name)
def test_fold_keeps_counters_and_drops_what_was_momentary(definition: object) -> None:
    """What a process that has ended leaves behind: its counters, and none of its gauges."""
    name, kind = definition.name, definition.type  # type: ignore[attr-defined]
    momentary = kind in (MetricType.GAUGE, MetricType.MAX)
    assert fold(row(**{name: 2}), row(**{name: 3})) == row(**{name: 0 if momentary else 5})
    assert lasting(row(**{name: 3})) == row(**{name: 0 if momentary else 3})


def test_fold_changes_nothing_that_it_was_given() -> None:
    """Pure: the rows stay as they were."""
    past, last = row(open=1, opened=1), row(open=1, opened=2)
    fold(past, last)
    assert (past, last) == (row(open=1, opened=1), row(open=1, opened=2))
