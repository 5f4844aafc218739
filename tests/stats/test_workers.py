"""What exporters make of snapshots."""

from __future__ import annotations

from typing import Any

import pytest

from tests.stats.test_snapshot import stats
from workerpools._stats.metrics import DEFINITIONS, Definition, MetricType
from workerpools._stats.snapshot import OF_WORKERS, Alert, ProcessStats, Raised, WorkerStats, raised, resources


def worker(*processes: ProcessStats, **changes: Any) -> WorkerStats:
    return WorkerStats(**{"taken": 100.0, "pid": 1, "processes": processes, **changes})


def process(pid: int, tokens: int = 500, capacity: int = 500, **changes: Any) -> ProcessStats:
    return ProcessStats(pid, tokens=tokens, capacity=capacity, **changes)


def of_worker(name: str, *snapshots: WorkerStats) -> float | None:
    (found,) = [each for each in OF_WORKERS if each.definition.name == name]
    return found.value(snapshots)


def test_resources_are_told_over_processes_and_those_that_ended() -> None:
    """Of all WorkerPools together: a name that two of them have is one series."""
    first = worker(process(2, resources=(stats("api", opened=1),)), past=(stats("api", opened=5),))
    second = worker(process(2, resources=(stats("api", opened=10), stats("db", opened=20))))
    assert [(each.name, each.value("opened")) for each in resources([first])] == [("api", 6)]
    assert [(each.name, each.value("opened")) for each in resources([first, second])] == [("api", 16), ("db", 20)]
    assert resources([]) == ()


@pytest.mark.parametrize(
    ("name", "snapshots", "value"),
    [
        ("running", [worker(process(2), process(3))], 2),
        ("running", [worker(process(2), process(3)), worker(process(2))], 2),
        ("running", [worker()], 0),
        ("unseen", [worker(unseen=2), worker(unseen=3)], 3),
        ("interrupted", [worker(process(2), process(3, interrupted=True))], 1),
        ("interrupted", [worker(process(3, interrupted=True)), worker(process(3, interrupted=True))], 1),
        ("overflowing", [worker(process(2, overflow=1), process(3, overflow=2))], 3),
        ("retry_budget_tokens", [worker(process(2, 400), process(3, 10), process(4, 500))], 10),
        # The part that is left counts, and not the number: another WorkerPools' budget may be a small one.
        ("retry_budget_tokens", [worker(process(2, 9, 10), process(3, 100, 500))], 100),
        ("retry_budget_capacity_tokens", [worker(process(2, 9, 10), process(3, 100, 500))], 500),
        ("retry_budget_tokens", [worker(process(2, 0, 0))], None),
        ("retry_budget_capacity_tokens", [worker()], None),
        ("snapshot_timestamp", [worker(taken=7.0), worker(taken=5.0)], 5),
        ("snapshot_timestamp", [], None),
    ],
)
def test_numbers_of_a_worker(name: str, snapshots: list[WorkerStats], value: float | None) -> None:
    """Of all its processes and WorkerPools together; None where there is nothing to say."""
    assert of_worker(name, *snapshots) == value


def test_alerts_of_several_processes_are_one() -> None:
    """A process id is no label."""
    first = worker(alerts=(Alert("utilisation", "db", 2), Alert("utilisation", "db", 3), Alert("budget", pid=2)))
    second = worker(alerts=(Alert("wait", "api"),))
    assert raised([first, second]) == {Raised("utilisation", "db"), Raised("budget", ""), Raised("wait", "api")}


@pytest.mark.parametrize(
    ("name", "unit", "kind", "prometheus", "opentelemetry"),
    [
        ("open", "connections", MetricType.GAUGE, "workerpools_connections_open", "workerpools.connections.open"),
        (
            "reused",
            "acquisitions",
            MetricType.COUNTER,
            "workerpools_acquisitions_reused_total",
            "workerpools.acquisitions.reused",
        ),
        ("longest_use", "s", MetricType.MAX, "workerpools_longest_use_seconds", "workerpools.longest_use"),
        ("failures", "failures", MetricType.COUNTER, "workerpools_failures_total", "workerpools.failures"),
        ("leaks", "connections", MetricType.COUNTER, "workerpools_leaks_total", "workerpools.leaks"),
    ],
)
def test_names(name: str, unit: str, kind: MetricType, prometheus: str, opentelemetry: str) -> None:
    """A name that is only a state or an event gets the unit in front."""
    made = Definition(name, unit, kind, "…")
    assert (made.prometheus, made.opentelemetry) == (prometheus, opentelemetry)


def test_names_are_unique() -> None:
    """Of resources and workers together."""
    every = (*DEFINITIONS, *(number.definition for number in OF_WORKERS))
    assert len({each.opentelemetry for each in every}) == len({each.prometheus for each in every}) == len(every)
