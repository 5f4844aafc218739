"""The document that the Pools page is made from: what workers said of their connection pools, and how old that is."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from workerpools._stats.snapshot import WorkerStats

__all__ = ["UNHEARD_AFTER", "VERSION", "Reply", "Status", "document", "status"]

#: The version of the document. A reader skips what it does not know.
VERSION = 1

#: The key in the reply of ``celery inspect stats``; see :mod:`workerpools._celery.worker`.
_KEY = "workerpools"

#: A worker without events is taken for offline when it has not answered for so long, in seconds.
UNHEARD_AFTER = 60.0


class Status(str, Enum):
    """What is known of a worker at this moment."""

    #: It answered when it was asked last.
    ONLINE = "online"
    #: It seems to live, and did not answer: a worker that runs tasks in its main process cannot while it does.
    SILENT = "silent"
    #: It has said goodbye, or was not heard of for too long.
    OFFLINE = "offline"


@dataclass(frozen=True)
class Reply:
    """What a worker answered to ``celery inspect stats``.

    Attributes:
        received: When, in seconds since the epoch.
        has_pools: Whether it said anything of connection pools.
        snapshots: What it said; None if that cannot be read.
        shown: The same for the page, each snapshot with its totals.
    """

    received: float
    has_pools: bool = False
    snapshots: tuple[WorkerStats, ...] | None = ()
    shown: tuple[dict[str, Any], ...] = ()

    @classmethod
    def of(cls, received: float, stats: Any) -> Reply:
        """Return the reply that ``stats`` is; takes about 20 µs for each resource of each process."""
        pools = stats.get(_KEY) if isinstance(stats, dict) else None
        if pools is None:
            return cls(received)
        snapshots = _snapshots(pools)
        return cls(received, True, snapshots, tuple(map(_with_totals, snapshots or ())))


def status(*, answered: bool, alive: bool | None, age: float | None, reachable: bool) -> Status:
    """Return what is known of a worker.

    Args:
        answered: Whether it answered when it was asked last.
        alive: Whether its events say that it lives; None if there were none.
        age: How old its last answer is, in seconds; None without one.
        reachable: Whether workers can be asked, and be heard, at all.
    """
    if answered:
        return Status.ONLINE
    if not reachable or alive:
        return Status.SILENT
    # Without events, one question that was not answered says little.
    recent = age is not None and age < UNHEARD_AFTER
    return Status.SILENT if alive is None and recent else Status.OFFLINE


def document(
    replies: Mapping[str, Reply],
    *,
    answered: Collection[str],
    alive: Mapping[str, bool],
    asked: float | None,
    now: float,
    problem: str = "",
) -> dict[str, Any]:
    """Return what the page shows.

    Args:
        replies: The last reply of each worker that ever replied, by its name.
        answered: The names of those that answered when they were asked last.
        alive: Of which workers there were events, and whether these say that they live.
        asked: When the workers were asked last, in seconds since the epoch; None if they never were.
        now: In seconds since the epoch.
        problem: Why the workers cannot be asked; empty if they can.
    """
    workers, without = [], []
    # Who lives and has never answered is worth a line; who went before it ever answered is not.
    for name in sorted(replies.keys() | {name for name, lives in alive.items() if lives}):
        reply = replies.get(name)
        age = None if reply is None else max(0.0, now - reply.received)
        state = status(answered=name in answered, alive=alive.get(name), age=age, reachable=not problem)
        if reply is not None and not reply.has_pools:
            if state is not Status.OFFLINE:
                without.append(name)
            continue
        workers.append(
            {
                "name": name,
                "status": state.value,
                "age": None if age is None else round(age, 3),
                "readable": reply is None or reply.snapshots is not None,
                "snapshots": () if reply is None else reply.shown,
            }
        )
    return {
        "version": VERSION,
        "now": round(now, 3),
        "asked": None if asked is None else round(asked, 3),
        "problem": problem,
        "workers": workers,
        "without": without,
    }


def _snapshots(pools: Any) -> tuple[WorkerStats, ...] | None:
    # It came over the network, from a worker of whatever version.
    try:
        told = pools["snapshots"]
        if not isinstance(told, Sequence) or isinstance(told, str):
            return None
        return tuple(WorkerStats.from_dict(each) for each in told)
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError):
        return None


def _with_totals(stats: WorkerStats) -> dict[str, Any]:
    return {**stats.to_dict(), "totals": [each.to_dict() for each in stats.totals()]}
