"""What a run came to: the figures, as a report and as lines to read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from demo_tasks.tally import ASKED, COUNTED, Child
from demo_tasks.workload import USES

__all__ = ["RESOURCES", "Summary", "counted_since", "per_task"]

#: The resources whose connections are counted, in the order in which they are shown, and what each is made with.
RESOURCES: Mapping[str, str] = {
    "api": "httpx",
    "db": "SQLAlchemy",
    "carrier": "requests",
    "cache": "redis",
    "suppliers": "async httpx",
}

#: What is counted besides, by its name in the report.
COUNTS = (*COUNTED.values(), "retried", ASKED)


def counted_since(before: Mapping[str, Child], now: Mapping[str, Child]) -> dict[str, Child]:
    """Return what each child did after ``before`` was read; only those that did something.

    Args:
        before: The tally at the start.
        now: The tally at the end.
    """
    children = {name: child.since(before.get(name, Child())) for name, child in sorted(now.items())}
    return {name: child for name, child in children.items() if child.runs or child.opened}


def per_task(child: Child, resource: str) -> int:
    """Return how many connections ``child`` would have opened, had each run of a task made a client of its own.

    Args:
        child: What it ran.
        resource: The resource to count for.
    """
    return sum(runs * USES.get(task, ()).count(resource) for task, runs in child.runs.items())


@dataclass
class Summary:
    """The figures of one run.

    Attributes:
        tasks: How many were submitted.
        succeeded: How many succeeded.
        failed: How many failed.
        seconds: How long they took together.
        children: What each process of the worker did.
        rows: How many rows each table has; reservations count as rows.
        rows_expected: How many it must have.
        failures: The first errors, one line each.
        backends_killed: How many database connections were cut; None if that was not part of the run.
        cache_killed: How many Redis connections were.
        upstream_reloaded: Whether the HTTP server closed its connections.
        commits_lost: How many answers to COMMIT were lost; their connections are among the cut ones.
        connections_at_stop: How many database and Redis connections of the worker were left after it stopped; None
            while it runs.
    """

    tasks: int
    succeeded: int
    failed: int
    seconds: float
    children: Mapping[str, Child]
    rows: Mapping[str, int]
    rows_expected: Mapping[str, int]
    failures: list[str] = field(default_factory=lambda: list[str]())
    backends_killed: int | None = None
    cache_killed: int = 0
    upstream_reloaded: bool = False
    commits_lost: int = 0
    connections_at_stop: int | None = None

    @property
    def ok(self) -> bool:
        """Whether every task succeeded, and every row is there once."""
        return self.failed == 0 and self.succeeded == self.tasks and dict(self.rows) == dict(self.rows_expected)

    def counted(self, name: str) -> int:
        """Return how often something happened: ``retried``, or a name that :mod:`demo_tasks.tally` has for it."""
        return sum(child.counts[name] for child in self.children.values())

    def opened(self, resource: str) -> int:
        """Return how many connections the worker opened for ``resource``."""
        return sum(child.opened[resource] for child in self.children.values())

    def opened_per_task(self, resource: str) -> int:
        """Return how many a client per task would have opened."""
        return sum(per_task(child, resource) for child in self.children.values())

    def lines(self) -> list[str]:
        """Return the summary as plain lines, but for the table of the children."""
        rate = self.tasks / self.seconds if self.seconds else 0.0
        lines = [
            f"{self.tasks:,} tasks: {self.succeeded:,} succeeded, {self.failed:,} failed, "
            f"in {self.seconds:.1f} s ({rate:,.0f} a second)"
        ]
        lines += [f"  {failure}" for failure in self.failures]
        if self.backends_killed is not None:
            reloaded = "; HTTP server reloaded" if self.upstream_reloaded else ""
            lost = f" ({self.commits_lost} at a COMMIT's answer)" if self.commits_lost else ""
            redis = f", {self.cache_killed} to Redis" if self.cache_killed else ""
            lines.append(f"cut half-way: {_plural(self.backends_killed, 'database connection')}{lost}{redis}{reloaded}")
        lines.append(
            f"replayed at once in the process: {_plural(self.counted('replayed'), 'task')} and "
            f"{_plural(self.counted('requests_replayed'), 'request')}; lost COMMITs resolved: "
            f"{self.counted('commits_resolved')}"
        )
        lines.append(
            f"retried through the broker: {self.counted('retried')}; replays refused: {self.counted('replays_refused')}"
        )
        if asked := self.counted(ASKED):
            lines.append(
                f"opened to ask what became of a lost COMMIT: {_plural(asked, 'database connection')}, not in the table"
            )
        written = ", ".join(f"{count:,} {table}" for table, count in self.rows.items())
        if dict(self.rows) == dict(self.rows_expected):
            lines.append(f"{written}: none lost, none twice")
        else:
            expected = ", ".join(f"{count:,} {table}" for table, count in self.rows_expected.items())
            lines.append(f"{written}; EXPECTED: {expected}")
        return lines

    def closing(self) -> list[str]:
        """Return what the run has shown, as lines to end with."""
        if not self.ok:
            return ["Not what was promised: a task failed, or a row is missing or there twice. See above."]
        opened, per_task = (sum(map(of, RESOURCES)) for of in (self.opened, self.opened_per_task))
        cut = ", though every connection was cut" if self.backends_killed else ""
        return [
            f"Shown: no task failed, and no row is missing or there twice{cut}.",
            f"{_plural(opened, 'connection')} did the work; a client per task would have opened {per_task:,}.",
        ]

    def child_lines(self) -> list[str]:
        """Return what each child opened, as plain lines."""
        return [
            f"{name}: "
            + f"{_plural(sum(child.runs.values()), 'task')}; "
            + ", ".join(
                f"{_plural(child.opened[resource], 'connection')} of {resource} "
                f"(a client per task: {per_task(child, resource):,})"
                for resource in RESOURCES
            )
            for name, child in self.children.items()
        ]

    def report(self) -> dict[str, Any]:
        """Return the figures as JSON takes them."""
        return {
            "tasks": self.tasks,
            "succeeded": self.succeeded,
            "failed": self.failed,
            "failures": self.failures,
            **{name: self.counted(name) for name in COUNTS},
            "backends_killed": self.backends_killed,
            "cache_killed": self.cache_killed,
            "commits_lost": self.commits_lost,
            "upstream_reloaded": self.upstream_reloaded,
            "seconds": round(self.seconds, 3),
            "children": len(self.children),
            "connections_opened": {resource: self.opened(resource) for resource in RESOURCES},
            "connections_with_a_client_per_task": {resource: self.opened_per_task(resource) for resource in RESOURCES},
            "connections_at_stop": self.connections_at_stop,
            "rows": dict(self.rows),
            "rows_expected": dict(self.rows_expected),
            "per_child": {
                name: {
                    "tasks": sum(child.runs.values()),
                    "connections_opened": {resource: child.opened[resource] for resource in RESOURCES},
                    "connections_with_a_client_per_task": {
                        resource: per_task(child, resource) for resource in RESOURCES
                    },
                    **{name: child.counts[name] for name in COUNTS},
                }
                for name, child in self.children.items()
            },
        }


def _plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"
