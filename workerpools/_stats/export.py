"""What exporters make of snapshots: each resource over a whole worker, and the numbers of the worker itself.

Process ids are no labels: each child that is recycled would leave series behind. What is so at one moment is added up
over the worker's processes, or is the extreme of them where only that says something.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from workerpools._stats.metrics import Definition, Kind
from workerpools._stats.snapshot import ProcessStats, ResourceStats, WorkerStats, merged

__all__ = ["OF_WORKERS", "OfWorker", "Raised", "raised", "resources", "words"]


def words(definition: Definition) -> list[str]:
    """Return what an exporter's name of a definition is made of, without the unit of a time.

    What names only a state or an event (``open``, ``opened``) says of what.
    """
    name = definition.name
    return [name] if definition.unit == "s" or name.endswith("s") else [definition.unit, name]


class OfWorker(NamedTuple):
    """One number of a worker as a whole.

    Attributes:
        definition: Its name and meaning.
        value: Returns it for the snapshots of one worker; None where there is nothing to say.
    """

    definition: Definition
    value: Callable[[Sequence[WorkerStats]], float | None]


class Raised(NamedTuple):
    """An alert, as exporters tell of it: over all processes of a worker."""

    rule: str
    resource: str


def resources(snapshots: Iterable[WorkerStats]) -> tuple[ResourceStats, ...]:
    """Return each resource of a worker: over all its processes, those that have ended, and its WorkerPools."""
    totals = [each for snapshot in snapshots for each in snapshot.totals()]
    # Most have one WorkerPools, whose totals are merged already.
    return tuple(totals) if len({each.name for each in totals}) == len(totals) else merged(totals)


def raised(snapshots: Iterable[WorkerStats]) -> set[Raised]:
    """Return the alerts of a worker."""
    return {Raised(alert.rule, alert.resource) for snapshot in snapshots for alert in snapshot.alerts}


def _processes(snapshots: Sequence[WorkerStats]) -> float:
    return float(len({process.pid for snapshot in snapshots for process in snapshot.processes}))


def _unseen(snapshots: Sequence[WorkerStats]) -> float:
    # Each WorkerPools misses the same children.
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
        Definition("running", "processes", Kind.GAUGE, "Processes that run tasks and whose numbers are known."),
        _processes,
    ),
    OfWorker(
        Definition(
            "unseen",
            "processes",
            Kind.GAUGE,
            "Children that publish nothing: they found no slot in shared memory, or are just starting.",
        ),
        _unseen,
    ),
    OfWorker(
        Definition(
            "interrupted", "processes", Kind.GAUGE, "Processes that seem to have stopped in the middle of publishing."
        ),
        _interrupted,
    ),
    OfWorker(
        Definition(
            "overflowing",
            "resources",
            Kind.GAUGE,
            "Resources, counted in each process, that found no place in shared memory and are in no other series.",
        ),
        _overflow,
    ),
    OfWorker(
        Definition(
            "retry_budget_tokens",
            "tokens",
            Kind.GAUGE,
            "Tokens that the retry budget has left, in the process that has the smallest part left; a replay takes 5, "
            "10 after a time-out.",
        ),
        _tokens,
    ),
    OfWorker(
        Definition("retry_budget_capacity_tokens", "tokens", Kind.GAUGE, "Tokens that this budget can hold."),
        _capacity,
    ),
    OfWorker(
        Definition(
            "snapshot_timestamp",
            "s",
            Kind.GAUGE,
            "When these numbers were taken, in seconds since the epoch.",
        ),
        _taken,
    ),
)
