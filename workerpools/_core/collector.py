"""Where the numbers of a registry's resources come together: in this process, and from its children."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any

from workerpools._core import fork
from workerpools._core.counters import lasting
from workerpools._core.events import Event, EventKind
from workerpools._core.meter import finished
from workerpools._core.slots import Board, Slot, SlotState
from workerpools._core.stats import ProcessStats, ResourceStats, WorkerStats, merged

if TYPE_CHECKING:
    from workerpools._core.registry import Registry
    from workerpools._core.resource import Resource

__all__ = ["Collector", "assemble"]

#: Which events count, and as what.
_COUNTED = {
    EventKind.ATTEMPT_REPLAYED: "replays",
    EventKind.REQUEST_REPLAYED: "replays",
    EventKind.TASK_RETRIED: "retries",
    EventKind.REPLAY_REFUSED: "refused_replays",
    EventKind.COMMIT_RESOLVED: "resolved_commits",
}


class Collector:
    """The statistics of one registry. Counting costs no set-up: without shared memory it is this process's alone.

    Args:
        registry: Whose resources are counted.
    """

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._started = time.time()
        self._slot: Slot | None = None
        self._board: Board | None = None
        registry.listeners.add(self._count)
        fork.guard(self)

    def pin(self) -> object:
        """Keep nothing more from a forked child's finalizers (see :mod:`workerpools._core.fork`)."""
        return ()

    def discard(self) -> tuple[object, Sequence[int]]:
        """Forget the parent's slot: it has one writer."""
        slot, self._slot = self._slot, None
        self._started = time.time()
        return slot, ()

    def share(self, board: Board | None) -> None:
        """Have children that are started from now on publish into ``board``; what was published is forgotten."""
        before, self._board = self._board, board
        if before is not None:
            before.remove()

    def join(self, index: int) -> bool:
        """Publish what this process counts, as the parent's child ``index``; return whether there is a slot for it."""
        slot = None if self._board is None else self._board.claim(index)
        if slot is None:
            return False
        self._slot = slot
        budget = self._registry.budget
        slot.tell_tokens(budget.tokens, budget.capacity)
        budget.tell(slot.tell_tokens)
        for resource in self._registry.resources:
            self.attach(resource)
        return True

    def attach(self, resource: Resource[Any]) -> None:
        """Publish what ``resource`` counts from now on, where this process publishes at all."""
        slot = self._slot
        if slot is not None and not resource.meter.is_shown:
            place = slot.place(resource.name, resource.kind)
            if place is not None:
                resource.meter.show(slot, place)

    def _count(self, event: Event) -> None:
        counter = _COUNTED.get(event.kind)
        resource = None if counter is None else self._registry.find(event.resource)
        if resource is not None and counter is not None:
            resource.meter.count(counter)
            # Most are told after the attempt has ended, and so was published.
            resource.meter.publish()

    def own(self) -> ProcessStats:
        """Return what this process counts."""
        budget = self._registry.budget
        return ProcessStats(
            pid=os.getpid(),
            started=self._started,
            published=time.time(),
            tokens=budget.tokens,
            capacity=budget.capacity,
            resources=tuple(
                ResourceStats(each.name, each.kind, each.meter.snapshot()) for each in self._registry.resources
            ),
        )

    def snapshot(self, children: Collection[int] | None = None) -> WorkerStats:
        """Return what this process counts, and what its children publish.

        Args:
            children: The process ids of the worker's living children; whoever lives, where that is not known.
        """
        alive = _lives if children is None else children.__contains__
        return assemble(
            [] if self._board is None else self._board.read(alive),
            self.own(),
            execution_pool=self._registry.execution_pool.kind,
            alive=alive,
            children=children or (),
            now=time.time(),
            monotonic=time.monotonic(),
        )


def assemble(
    states: Sequence[SlotState],
    own: ProcessStats,
    *,
    execution_pool: str,
    alive: Callable[[int], bool],
    children: Collection[int],
    now: float,
    monotonic: float,
) -> WorkerStats:
    """Return the snapshot of a worker.

    Args:
        states: What its children have published.
        own: What its main process counts. Shown where it has no children, or has used a resource itself.
        execution_pool: What runs its tasks.
        alive: Tells whether the process of that id lives.
        children: Its living children, as far as they are known.
        now: In seconds since the epoch.
        monotonic: On the clock of :func:`time.monotonic`.
    """
    living, past = [], []
    for state in states:
        past += _resources(state, state.past, None)
        if alive(state.pid):
            living.append(_process(state, monotonic))
        else:
            # Momentary numbers ended with their process.
            past += _resources(state, state.rows, None)
    used = any(any(each.row) for each in own.resources)
    if used or not (states or children):
        living.append(own)
    seen = {process.pid for process in living}
    return WorkerStats(
        taken=now,
        pid=own.pid,
        execution_pool=execution_pool,
        processes=tuple(living),
        past=merged(past),
        unseen=len(set(children) - seen),
    )


def _process(state: SlotState, monotonic: float) -> ProcessStats:
    return ProcessStats(
        pid=state.pid,
        index=state.index,
        started=state.started,
        published=state.published,
        tokens=state.tokens,
        capacity=state.capacity,
        overflow=state.overflow,
        interrupted=state.interrupted,
        resources=tuple(sorted(_resources(state, state.rows, monotonic), key=lambda each: each.name)),
    )


def _resources(state: SlotState, rows: Sequence[Sequence[float]], monotonic: float | None) -> list[ResourceStats]:
    return [
        ResourceStats(name, kind, finished(row, monotonic) if monotonic is not None else tuple(lasting(row)))
        for (name, kind), row in zip(state.titles, rows, strict=True)
    ]


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
