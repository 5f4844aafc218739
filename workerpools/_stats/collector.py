"""The statistics of one WorkerPools: shared with the parent by a child, collected by the parent."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any

from workerpools._process import fork
from workerpools._run.events import Event, EventKind
from workerpools._stats.meter import finished
from workerpools._stats.metrics import lasting
from workerpools._stats.shared import SlotState
from workerpools._stats.snapshot import Alert, ProcessStats, ResourceStats, WorkerStats, merged

if TYPE_CHECKING:
    from workerpools._pools.registry import Registry
    from workerpools._pools.resource import Resource
    from workerpools._stats.shared import Board, Slot
    from workerpools._stats.snapshot import Alert, WorkerStats

__all__ = ["Collector", "assemble", "own"]


def own(registry: Registry, started: float) -> ProcessStats:
    """Return what this process counts.

    Args:
        registry: Whose resources are counted.
        started: When this process began to count, in seconds since the epoch.
    """
    return ProcessStats(
        pid=os.getpid(),
        started=started,
        published=time.time(),
        tokens=registry.budget.tokens,
        capacity=registry.budget.capacity,
        resources=tuple(ResourceStats(each.name, each.kind, each.meter.snapshot()) for each in registry.resources),
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
    alerts: tuple[Alert, ...] = (),
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
        alerts: The alerts of now.
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
        alerts=alerts,
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


logger = logging.getLogger("workerpools")

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
        self._at_end: list[Callable[[], object]] = []
        #: The alerts of now; set by who looks for them.
        self.alerts: tuple[Alert, ...] = ()
        registry.listeners.add(self._count)
        fork.guard(self)

    def pin(self) -> object:
        """Keep nothing more from a forked child's finalizers (see :mod:`workerpools._process.fork`)."""
        return ()

    def discard(self) -> tuple[object, Sequence[int]]:
        """Forget the parent's slot: it has one writer."""
        slot, self._slot = self._slot, None
        self._started = time.time()
        self.alerts = ()
        return slot, ()

    def share(self, board: Board | None) -> None:
        """Have children that are started from now on publish into ``board``; what was published is forgotten."""
        before, self._board = self._board, board
        self._registry.recycles.follow(None if board is None else board.recycles)
        if before is not None:
            before.remove()

    def at_end(self, call: Callable[[], object]) -> None:
        """Have ``call`` called by :meth:`end`, while everything that was counted can still be seen."""
        self._at_end.append(call)

    def end(self) -> None:
        """Note that the worker has ended: whoever exports does so for the last time; then it is forgotten."""
        calls, self._at_end = self._at_end, []
        for call in calls:
            try:
                call()
            except Exception:
                logger.warning("the last statistics of this worker are lost", exc_info=True)
        self.share(None)

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

    @property
    def answers(self) -> bool:
        """Whether this process tells what it counts, and not a parent for it."""
        return self._slot is None and (self._board is None or self._board.owner == os.getpid())

    def attach(self, resource: Resource[Any]) -> None:
        """Publish what ``resource`` counts from now on, where this process publishes at all."""
        slot = self._slot
        if slot is not None and not resource.meter.is_shown:
            place = slot.place(resource.name, resource.kind)
            if place is not None:
                resource.meter.show(slot, place)

    def names(self) -> list[str]:
        """Return the names of the resources of this process, and of those that its children have made themselves."""
        own = {resource.name for resource in self._registry.resources}
        return sorted(own if self._board is None else own | self._board.names())

    def recycle(self, names: Sequence[str]) -> None:
        """Have connections replaced, here and by the children of this process.

        Args:
            names: The resources; none for every one.
        """
        board, now = self._board, time.monotonic()
        if board is not None and board.owner == os.getpid():
            board.recycles.tell(names, now)
        for resource in self._registry.resources:
            if not names or resource.name in names:
                resource.ask(now)

    def _count(self, event: Event) -> None:
        counter = _COUNTED.get(event.kind)
        resource = None if counter is None else self._registry.find(event.resource)
        if resource is not None and counter is not None:
            resource.meter.count(counter)
            # Most are told after the attempt has ended, and so was published.
            resource.meter.publish()

    def snapshot(self, children: Collection[int] | None = None) -> WorkerStats:
        """Return what this process counts, and what its children publish.

        Args:
            children: The process ids of the worker's living children; whoever lives, where that is not known.
        """
        # Loaded by who looks: a child that only counts, or a web process, has no use for it.
        from workerpools._stats.collector import assemble, own

        alive = _lives if children is None else children.__contains__
        return assemble(
            [] if self._board is None else self._board.read(alive),
            own(self._registry, self._started),
            execution_pool=self._registry.execution_pool.kind,
            alive=alive,
            children=children or (),
            now=time.time(),
            monotonic=time.monotonic(),
            alerts=self.alerts,
        )


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
