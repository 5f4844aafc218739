"""Snapshots: the statistics of a process or worker at one moment, as frozen data without secrets."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, NamedTuple

from workerpools._stats.memory import merge
from workerpools._stats.metrics import BOUNDS, DEFINITIONS, FIRST, WIDTH, Definition, MetricType, definition

__all__ = [
    "OF_WORKERS",
    "Alert",
    "Histogram",
    "OfWorker",
    "ProcessStats",
    "Raised",
    "ResourceStats",
    "WorkerStats",
    "merged",
    "raised",
    "resources",
]

#: The version of the JSON form; readers ignore unknown keys, and take missing ones for 0.
VERSION = 1


@dataclass(frozen=True)
class Histogram:
    """The distribution of a duration, in seconds.

    Attributes:
        buckets: The number of values up to each bound and above the previous one; finally, above the last bound.
        sum: The sum of all values.
        max: The highest value since the process started.
        bounds: The buckets' upper bounds.
    """

    buckets: tuple[int, ...] = (0,) * (len(BOUNDS) + 1)
    sum: float = 0.0
    max: float = 0.0
    bounds: tuple[float, ...] = BOUNDS

    @property
    def count(self) -> int:
        """The number of values."""
        return sum(self.buckets)

    @property
    def mean(self) -> float:
        """The mean; 0 without values."""
        return self.sum / self.count if self.count else 0.0

    def cumulative(self) -> list[tuple[float, int]]:
        """Return pairs of upper bound and cumulative count, as Prometheus expects; the last bound is infinite."""
        return list(zip((*self.bounds, float("inf")), accumulate(self.buckets), strict=True))

    def above(self, bound: float) -> int:
        """Return the number of values above ``bound``.

        Args:
            bound: One of the bounds, in seconds.

        Raises:
            ValueError: ``bound`` is not one of the bounds.
        """
        return sum(self.buckets[self.bounds.index(bound) + 1 :])


@dataclass(frozen=True)
class ResourceStats:
    """The statistics of one resource, in one process or over several.

    Attributes:
        name: The resource's name.
        kind: Its adapter's kind, such as ``database``; may be empty.
        row: The numbers, in the layout of :mod:`workerpools._stats.metrics`.
    """

    name: str
    kind: str = ""
    row: tuple[float, ...] = field(default=(0.0,) * WIDTH, repr=False)

    def value(self, name: str, label: str = "") -> float:
        """Return the number ``name``.

        Args:
            name: The name of a statistic.
            label: A value of its label; empty for the sum over all values.

        Raises:
            KeyError: There is no such number, or it is a histogram.
        """
        found, first = definition(name), FIRST[name]
        if found.type is MetricType.HISTOGRAM:
            raise KeyError(name)
        if label:
            return self.row[first + _place(found, label)]
        return sum(self.row[first : first + found.width])

    def labelled(self, name: str) -> dict[str, float]:
        """Return the numbers of ``name`` by the values of its label.

        Raises:
            KeyError: There is no such statistic.
        """
        first = FIRST[name]
        return {label: self.row[first + n] for n, label in enumerate(definition(name).values)}

    def histogram(self, name: str) -> Histogram:
        """Return the histogram ``name``.

        Raises:
            KeyError: There is no such statistic.
        """
        first, last = FIRST[name], FIRST[name] + len(BOUNDS) + 1
        buckets = tuple(int(count) for count in self.row[first:last])
        return Histogram(buckets, self.row[last], self.row[last + 1], definition(name).bounds)

    @property
    def open(self) -> int:
        """Connections that are open."""
        return int(self.value("open"))

    @property
    def in_use(self) -> int:
        """Connections in use."""
        return int(self.value("in_use"))

    @property
    def idle(self) -> int:
        """Connections that are open and not in use."""
        return int(self.value("idle"))

    @property
    def limit(self) -> int:
        """The most connections that may be open; 0 without a limit."""
        return int(self.value("limit"))

    @property
    def pending(self) -> int:
        """Callers waiting for a connection."""
        return int(self.value("pending"))

    @property
    def longest_wait_so_far(self) -> float:
        """The longest wait for a connection, finished or in progress, in seconds; 0 without any."""
        return max(self.histogram("acquire_wait").max, self.value("longest_wait"))

    @property
    def utilisation(self) -> float | None:
        """The fraction of the limit that is in use, from 0 to 1; None without a limit."""
        return self.in_use / self.limit if self.limit else None

    @property
    def reuse_ratio(self) -> float | None:
        """The fraction of acquisitions that reused a connection, from 0 to 1; None before the first acquisition."""
        reused, opened = self.value("reused"), self.value("opened")
        return reused / (reused + opened) if reused + opened else None

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-serializable form, without the numbers that are 0."""
        row = self.row
        answer: dict[str, Any] = {"name": self.name, "kind": self.kind}
        for name, first, end, kind, unit, values in _PLAN:
            if end - first == 1:
                if row[first]:
                    answer[name] = round(row[first], 6) if unit == "s" else int(row[first])
                continue
            part = row[first:end]
            if not any(part):
                continue
            if kind is MetricType.HISTOGRAM:
                buckets = list(map(int, part[:-2]))
                total, longest = round(part[-2], 6), round(part[-1], 6)
                answer[name] = {"count": sum(buckets), "sum": total, "max": longest, "buckets": buckets}
            else:
                answer[name] = {value: int(number) for value, number in zip(values, part, strict=True) if number}
        return answer

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ResourceStats:
        """Return the object for a result of :meth:`to_dict`, to the microsecond; unknown names are ignored."""
        row = [0.0] * WIDTH
        for name, first, end, kind, _, values in _PLAN:
            value = data.get(name)
            if value is None:
                continue
            if kind is MetricType.HISTOGRAM:
                part = [*value.get("buckets", ()), value.get("sum", 0.0), value.get("max", 0.0)]
                # Different bounds come from another version.
                if len(part) == end - first:
                    row[first:end] = map(float, part)
            elif values:
                for n, label in enumerate(values):
                    row[first + n] = float(value.get(label, 0.0))
            else:
                row[first] = float(value)
        return cls(str(data.get("name", "")), str(data.get("kind", "")), tuple(row))


_PLAN = tuple(
    (each.name, FIRST[each.name], FIRST[each.name] + each.width, each.type, each.unit, each.values)
    for each in DEFINITIONS
)


def _place(found: Definition, label: str) -> int:
    try:
        return found.values.index(label)
    except ValueError:
        raise KeyError(f"{found.name}: {label}") from None


def merged(stats: Iterable[ResourceStats]) -> tuple[ResourceStats, ...]:
    """Return one entry per name, sorted by name, with merged numbers."""
    by_name: dict[str, list[ResourceStats]] = {}
    for each in stats:
        by_name.setdefault(each.name, []).append(each)
    return tuple(
        ResourceStats(
            name, next((each.kind for each in found if each.kind), ""), tuple(merge([each.row for each in found]))
        )
        for name, found in sorted(by_name.items())
    )


@dataclass(frozen=True)
class ProcessStats:
    """One process that runs tasks.

    Attributes:
        pid: Its process id.
        index: Its position among the worker's children, from 0; None for the main process.
        started: The start of the process, in seconds since the epoch.
        published: The time of its last publication, in seconds since the epoch.
        tokens: The tokens left in its retry budget.
        capacity: The capacity of that budget; 0 if not known yet.
        overflow: The number of resources missing here, because shared memory had no room for them.
        interrupted: Whether it seems to have stopped while publishing; the numbers are the previous ones.
        resources: Its resources, by name.
        last_task: The end of its last task that used a resource, in seconds since the epoch; 0 before the first.
    """

    pid: int
    index: int | None = None
    started: float = 0.0
    published: float = 0.0
    tokens: int = 0
    capacity: int = 0
    overflow: int = 0
    interrupted: bool = False
    resources: tuple[ResourceStats, ...] = ()
    last_task: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-serializable form."""
        return {
            "pid": self.pid,
            "index": self.index,
            "started": round(self.started, 3),
            "published": round(self.published, 3),
            "last_task": round(self.last_task, 3),
            "tokens": self.tokens,
            "capacity": self.capacity,
            "overflow": self.overflow,
            "interrupted": self.interrupted,
            "resources": [each.to_dict() for each in self.resources],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ProcessStats:
        """Return the object for a result of :meth:`to_dict`."""
        index = data.get("index")
        return cls(
            pid=int(data.get("pid", 0)),
            index=None if index is None else int(index),
            started=float(data.get("started", 0.0)),
            published=float(data.get("published", 0.0)),
            last_task=float(data.get("last_task", 0.0)),
            tokens=int(data.get("tokens", 0)),
            capacity=int(data.get("capacity", 0)),
            overflow=int(data.get("overflow", 0)),
            interrupted=bool(data.get("interrupted", False)),
            resources=tuple(ResourceStats.from_dict(each) for each in data.get("resources", ())),
        )


@dataclass(frozen=True)
class Alert:
    """One current problem.

    Attributes:
        rule: The stable name of the rule.
        resource: The resource; empty if the alert concerns a whole process.
        pid: The process; None if the alert concerns the worker.
        since: The beginning of the problem, in seconds since the epoch.
        value: The measured value, in the rule's unit.
        threshold: The limit, in the same unit.
        message: One sentence for people, without secrets.
    """

    rule: str
    resource: str = ""
    pid: int | None = None
    since: float = 0.0
    value: float = 0.0
    threshold: float = 0.0
    message: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-serializable form."""
        return {
            "rule": self.rule,
            "resource": self.resource,
            "pid": self.pid,
            "since": round(self.since, 3),
            "value": round(self.value, 6),
            "threshold": round(self.threshold, 6),
            "message": self.message,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Alert:
        """Return the object for a result of :meth:`to_dict`."""
        pid = data.get("pid")
        return cls(
            rule=str(data.get("rule", "")),
            resource=str(data.get("resource", "")),
            pid=None if pid is None else int(pid),
            since=float(data.get("since", 0.0)),
            value=float(data.get("value", 0.0)),
            threshold=float(data.get("threshold", 0.0)),
            message=str(data.get("message", "")),
        )


@dataclass(frozen=True)
class WorkerStats:
    """The statistics of a worker: its living processes, and the counters of those that have ended.

    Attributes:
        taken: The time of the snapshot, in seconds since the epoch.
        pid: The main process's id.
        execution_pool: ``prefork``, ``threads``, …; empty outside a worker.
        concurrency: The most tasks that it runs at a time; 0 if unknown.
        ceilings: The most connections that one of its processes opens to a server, by resource; 0 without a limit.
        processes: The living processes: the children, or the main process if tasks run there.
        past: The counters of the children that have ended, by resource; without gauges.
        unseen: The number of living children without statistics: shared memory had no room, or they are just starting.
        alerts: The current alerts, maintained by the worker's main process.
    """

    taken: float
    pid: int
    execution_pool: str = ""
    concurrency: int = 0
    ceilings: tuple[tuple[str, int], ...] = ()
    processes: tuple[ProcessStats, ...] = ()
    past: tuple[ResourceStats, ...] = ()
    unseen: int = 0
    alerts: tuple[Alert, ...] = ()

    @property
    def most_processes(self) -> int:
        """The most processes that run its tasks."""
        return self.concurrency if self.execution_pool == "prefork" else 1

    def totals(self) -> tuple[ResourceStats, ...]:
        """Return the totals per resource over all processes of the worker, including those that have ended."""
        return merged([*self.past, *(each for process in self.processes for each in process.resources)])

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-serializable form."""
        return {
            "version": VERSION,
            "taken": round(self.taken, 3),
            "pid": self.pid,
            "execution_pool": self.execution_pool,
            "concurrency": self.concurrency,
            "ceilings": dict(self.ceilings),
            "unseen": self.unseen,
            "processes": [each.to_dict() for each in self.processes],
            "past": [each.to_dict() for each in self.past],
            "alerts": [each.to_dict() for each in self.alerts],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> WorkerStats:
        """Return the object for a result of :meth:`to_dict`."""
        return cls(
            taken=float(data.get("taken", 0.0)),
            pid=int(data.get("pid", 0)),
            execution_pool=str(data.get("execution_pool", "")),
            concurrency=int(data.get("concurrency", 0)),
            ceilings=tuple((str(name), int(most)) for name, most in data.get("ceilings", {}).items()),
            processes=tuple(ProcessStats.from_dict(each) for each in data.get("processes", ())),
            past=tuple(ResourceStats.from_dict(each) for each in data.get("past", ())),
            unseen=int(data.get("unseen", 0)),
            alerts=tuple(Alert.from_dict(each) for each in data.get("alerts", ())),
        )


# For exporters: a worker's resources over all its processes, its alerts, and its own numbers. The process id is not a
# label, because each recycled child would leave its series behind.


class OfWorker(NamedTuple):
    """One number of a worker as a whole.

    Attributes:
        definition: Its name and meaning.
        value: Returns the number for the snapshots of one worker; None to omit it.
    """

    definition: Definition
    value: Callable[[Sequence[WorkerStats]], float | None]


class Raised(NamedTuple):
    """An alert as exported: over all processes of a worker."""

    rule: str
    resource: str


def resources(snapshots: Iterable[WorkerStats]) -> tuple[ResourceStats, ...]:
    """Return the totals per resource over all processes and WorkerPools of a worker."""
    totals = [each for snapshot in snapshots for each in snapshot.totals()]
    # Most workers have one WorkerPools, whose totals are merged already.
    return tuple(totals) if len({each.name for each in totals}) == len(totals) else merged(totals)


def raised(snapshots: Iterable[WorkerStats]) -> set[Raised]:
    """Return the alerts of a worker."""
    return {Raised(alert.rule, alert.resource) for snapshot in snapshots for alert in snapshot.alerts}


def _processes(snapshots: Sequence[WorkerStats]) -> float:
    return float(len({process.pid for snapshot in snapshots for process in snapshot.processes}))


def _unseen(snapshots: Sequence[WorkerStats]) -> float:
    # The same children are missing in each WorkerPools.
    return float(max((snapshot.unseen for snapshot in snapshots), default=0))


def _interrupted(snapshots: Sequence[WorkerStats]) -> float:
    return float(len({process.pid for each in snapshots for process in each.processes if process.interrupted}))


def _overflow(snapshots: Sequence[WorkerStats]) -> float:
    return float(sum(process.overflow for snapshot in snapshots for process in snapshot.processes))


def _poorest(snapshots: Sequence[WorkerStats]) -> ProcessStats | None:
    budgets = [process for each in snapshots for process in each.processes if process.capacity]
    return min(budgets, key=lambda process: process.tokens / process.capacity, default=None)


def _tokens(snapshots: Sequence[WorkerStats]) -> float | None:
    poorest = _poorest(snapshots)
    return None if poorest is None else float(poorest.tokens)


def _capacity(snapshots: Sequence[WorkerStats]) -> float | None:
    poorest = _poorest(snapshots)
    return None if poorest is None else float(poorest.capacity)


def _taken(snapshots: Sequence[WorkerStats]) -> float | None:
    return min((snapshot.taken for snapshot in snapshots), default=None)


OF_WORKERS = (
    OfWorker(
        Definition("running", "processes", MetricType.GAUGE, "Processes that run tasks and have statistics."),
        _processes,
    ),
    OfWorker(
        Definition(
            "unseen",
            "processes",
            MetricType.GAUGE,
            "Children without statistics: shared memory had no room, or they are just starting.",
        ),
        _unseen,
    ),
    OfWorker(
        Definition(
            "interrupted",
            "processes",
            MetricType.GAUGE,
            "Processes that seem to have stopped while publishing.",
        ),
        _interrupted,
    ),
    OfWorker(
        Definition(
            "overflowing",
            "resources",
            MetricType.GAUGE,
            "Resources, counted per process, that are in no other series because shared memory had no room.",
        ),
        _overflow,
    ),
    OfWorker(
        Definition(
            "retry_budget_tokens",
            "tokens",
            MetricType.GAUGE,
            "Tokens left in the retry budget, in the process with the smallest fraction left; a replay takes 5, or 10 "
            "after a timeout.",
        ),
        _tokens,
    ),
    OfWorker(
        Definition("retry_budget_capacity_tokens", "tokens", MetricType.GAUGE, "Capacity of that budget."),
        _capacity,
    ),
    OfWorker(
        Definition(
            "snapshot_timestamp",
            "s",
            MetricType.GAUGE,
            "The time of the snapshot, in seconds since the epoch.",
        ),
        _taken,
    ),
)
