"""What does a task notice when every backend of its worker is terminated, again and again, under load?

Two workers, ours and a hand-written one with `autoretry_for=(OperationalError,)`, write a row a task at a steady rate,
in turn undisturbed and with all their backends terminated four times a second. A task takes from its publication to its
end, retries included.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

from benchmarks.measure import Figure, at_most, paired, quartiles
from benchmarks.result import Result
from benchmarks.servers import Servers
from benchmarks.workers import Worker

__all__ = ["NEEDS_SERVERS", "run"]

NEEDS_SERVERS = True

#: Tasks a second, and seconds between two terminations.
RATE = 60.0
INTERVAL = 0.25


@dataclass
class _Side:
    worker: Worker
    database: str
    latencies: dict[str, list[tuple[float, float]]] = field(default_factory=lambda: {"calm": [], "disturbed": []})
    tasks: int = 0
    failed: int = 0
    terminated: int = 0


def run(servers: Servers, *, quick: bool) -> Result:
    """Measure failed tasks, and what terminations add to the median and to the 99th percentile."""
    seconds, rounds = (2.0, 1) if quick else (6.0, 5)
    with ExitStack() as stack:
        sides = {
            name: _Side(
                stack.enter_context(
                    Worker(servers, app, environment={"BENCH_DATABASE": servers.database(name), **environment})
                ),
                name,
            )
            for name, app, environment in (
                ("ours", "ours", {}),
                ("autoretry", "by_hand", {"BENCH_AUTORETRY": "1"}),
                ("by_hand", "by_hand", {}),
            )
        }
        for side in sides.values():
            side.worker.ready().burst("write", 20)
        for number in range(rounds):
            for side in list(sides.values()) if number % 2 == 0 else reversed(sides.values()):
                for mode in ("calm", "disturbed") if number % 2 == 0 else ("disturbed", "calm"):
                    side.latencies[mode].append(_load(servers, side, seconds, disturbed=mode == "disturbed"))
        details = {
            name: {
                "tasks": side.tasks,
                "failed": side.failed,
                "backends_terminated": side.terminated,
                "rows_written": servers.execute(name, "SELECT count(*) FROM entries")[0][0] - 20,
            }
            for name, side in sides.items()
        }
    ratios: dict[str, Figure] = {}
    for name, label in (("by_hand", "hand-written"), ("autoretry", "autoretry_for"), ("ours", "ours")):
        side = sides[name]
        ours = name == "ours"
        ratios[f"{label}: failed tasks"] = quartiles([side.failed], "tasks", at_most(0) if ours else None)
        for index, percentile in enumerate(("median", "99th percentile")):
            ratios[f"{label}: added to the {percentile}"] = paired(
                [pair[index] for pair in side.latencies["disturbed"]],
                [pair[index] for pair in side.latencies["calm"]],
                at_most(50.0) if ours and index else None,
                difference="ms",
            )
    return Result(
        "recovery",
        "What does a task notice when every backend of its worker is terminated under load?",
        ratios,
        quick=quick,
        details=details,
    )


def _load(servers: Servers, side: _Side, seconds: float, *, disturbed: bool) -> tuple[float, float]:
    """Return the median and the 99th percentile of the tasks' latencies, in milliseconds."""
    terminate = (
        f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{side.database}'"
        " AND backend_type = 'client backend'"
    )
    count = int(seconds * RATE)
    start = time.monotonic()
    due = start + INTERVAL / 2
    for number in range(count):
        if (early := start + number / RATE - time.monotonic()) > 0:
            time.sleep(early)
        side.worker.send("write", time.monotonic())
        if disturbed and time.monotonic() >= due:
            side.terminated += len(servers.execute("postgres", terminate))
            due += INTERVAL
    ended = side.worker.wait(count)
    side.tasks += count
    side.failed += sum(not row.success for row in ended)
    latencies = sorted((row.ended - row.number) * 1e3 for row in ended)
    return _percentile(latencies, 0.5), _percentile(latencies, 0.99)


def _percentile(ordered: Sequence[float], part: float) -> float:
    return ordered[min(len(ordered) - 1, int(len(ordered) * part))]
