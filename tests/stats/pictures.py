"""Snapshots to try the rules on."""

from __future__ import annotations

from typing import Any

from workerpools._stats.metrics import BOUNDS, FIRST, WIDTH
from workerpools._stats.snapshot import ProcessStats, ResourceStats, WorkerStats

#: Wall time at time 0 of the evaluations' clock.
EPOCH = 1_000_000.0


def resource(name: str = "db", *, waits_above: int = 0, longest: float = 0.0, **numbers: float) -> ResourceStats:
    """Return a resource; `waits_above` are waits above 5 s."""
    row = [0.0] * WIDTH
    for key, value in numbers.items():
        row[FIRST[key]] = value
    first = FIRST["acquire_wait"]
    row[first + BOUNDS.index(10.0)] = waits_above
    row[first + len(BOUNDS) + 2] = longest
    return ResourceStats(name, "database", tuple(row))


def process(pid: int = 1, *resources: ResourceStats, **options: Any) -> ProcessStats:
    return ProcessStats(pid, **{"index": pid, "tokens": 500, "capacity": 500, "resources": resources, **options})


def worker(now: float, *processes: ProcessStats, **options: Any) -> WorkerStats:
    return WorkerStats(taken=EPOCH + now, pid=99, execution_pool="prefork", processes=processes, **options)
