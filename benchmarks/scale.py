"""What does a child cost in a worker of 2 to 64 of them?

Each child gets one task that uses the database and the HTTP client, then waits, so that all hold both at a time.
Opening takes from the first task's beginning until the last child has its answers; closing from SIGTERM to the worker's
end.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass, field

from benchmarks.measure import at_most, paired
from benchmarks.result import Result
from benchmarks.servers import Servers
from benchmarks.workers import Worker

__all__ = ["BUDGET", "NEEDS_SERVERS", "SIZES", "run"]

NEEDS_SERVERS = True

SIZES = (2, 4, 8, 16, 32, 64)

#: After so many seconds no further round is begun.
BUDGET = 130.0


@dataclass
class _Costs:
    memory: list[float] = field(default_factory=list)  # MiB a child
    opened: list[float] = field(default_factory=list)  # ms a child
    closed: list[float] = field(default_factory=list)  # ms, the whole worker


def run(servers: Servers, *, quick: bool) -> Result:
    """Measure memory, opening and closing for each size, ours beside hand-written."""
    sizes, rounds = ((2, 4), 1) if quick else (SIZES, 2)
    costs = {(name, size): _Costs() for name in ("ours", "by_hand") for size in sizes}
    started = time.monotonic()
    for number in range(rounds):
        if number and time.monotonic() - started > BUDGET:
            rounds = number
            break
        for size in sizes if number % 2 == 0 else reversed(sizes):
            for name in ("ours", "by_hand") if number % 2 == 0 else ("by_hand", "ours"):
                _measure(servers, name, size, costs[name, size])
    most, reference = sizes[-1], sizes[min(2, len(sizes) - 1) if not quick else 0]

    ratios = {}
    series = {}
    for label, unit, attribute in (
        ("memory a child", "MiB", "memory"),
        ("opening a child", "ms", "opened"),
        ("closing the worker", "ms", "closed"),
    ):
        found: dict[tuple[str, int], list[float]] = {side: getattr(cost, attribute) for side, cost in costs.items()}
        ratios[f"{label} at {most}, ours over hand-written"] = paired(found["ours", most], found["by_hand", most])
        for name, shown in (("by_hand", "hand-written"), ("ours", "ours")):
            series[f"{label}, {unit}, {shown}"] = [
                (float(size), round(statistics.median(found[name, size]), 2)) for size in sizes
            ]
            if attribute != "closed":
                goal = at_most(1.1) if name == "ours" else None
                flat = paired(found[name, most], found[name, reference], goal)
                ratios[f"{label} at {most} over at {reference}, {shown}"] = flat
    return Result(
        "scale",
        "What does a child cost in a worker of 2 to 64 of them?",
        ratios,
        series=series,
        axes=("children", "cost"),
        quick=quick,
        details={"rounds": rounds},
    )


def _measure(servers: Servers, name: str, size: int, costs: _Costs) -> None:
    with Worker(servers, name, concurrency=size) as worker:
        worker.ready()
        hold = 1.0 + size * 0.05
        ended = worker.burst("hold", size, hold)
        costs.opened.append((max(row.ended for row in ended) - hold - min(row.began for row in ended)) / size * 1e3)
        costs.memory.append(statistics.mean(worker.memory()))
        start = time.monotonic()
        worker.process.stop(60.0)
        costs.closed.append((time.monotonic() - start) * 1e3)
