"""The statistics of one WorkerPools: published by children, collected by their parent."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any

from workerpools._process import fork
from workerpools._run.budget import Budget
from workerpools._run.events import Event, EventKind, Listeners
from workerpools._stats.memory import Board, Recycles, Slot, SlotState, lasting
from workerpools._stats.meter import finished

if TYPE_CHECKING:
    from workerpools._stats.snapshot import Alert, ProcessStats, ResourceStats, WorkerStats

__all__ = ["Collector", "assemble"]


def assemble(
    states: Sequence[SlotState],
    own: ProcessStats,
    *,
    execution_pool: str,
    concurrency: int = 0,
    ceilings: tuple[tuple[str, int], ...] = (),
    alive: Callable[[int], bool],
    children: Collection[int],
    now: float,
    monotonic: float,
    alerts: tuple[Alert, ...] = (),
) -> WorkerStats:
    """Return the snapshot of a worker.

    Args:
        states: The published statistics of its children.
        own: The statistics of its main process, included if it has no children or has used a resource itself.
        execution_pool: The kind of its execution pool.
        concurrency: The most tasks that it runs at a time.
        ceilings: The most connections of one of its processes, by resource.
        alive: Returns whether the process with a given id is alive.
        children: The ids of its living children, as far as known.
        now: In seconds since the epoch.
        monotonic: On the clock of :func:`time.monotonic`.
        alerts: The current alerts.
    """
    from workerpools._stats.snapshot import WorkerStats, merged

    living, past = [], []
    for state in states:
        past += _resources(state, state.past, None)
        if alive(state.pid):
            living.append(_process(state, monotonic))
        else:
            # Gauges end with their process.
            past += _resources(state, state.rows, None)
    used = any(any(each.row) for each in own.resources)
    if used or not (states or children):
        living.append(own)
    seen = {process.pid for process in living}
    return WorkerStats(
        taken=now,
        pid=own.pid,
        execution_pool=execution_pool,
        concurrency=concurrency,
        ceilings=ceilings,
        processes=tuple(living),
        past=merged(past),
        unseen=len(set(children) - seen),
        alerts=alerts,
    )


def _process(state: SlotState, monotonic: float) -> ProcessStats:
    from workerpools._stats.snapshot import ProcessStats

    return ProcessStats(
        pid=state.pid,
        index=state.index,
        started=state.started,
        published=state.published,
        last_task=state.last_task,
        tokens=state.tokens,
        capacity=state.capacity,
        overflow=state.overflow,
        interrupted=state.interrupted,
        resources=tuple(sorted(_resources(state, state.rows, monotonic), key=lambda each: each.name)),
    )


def _resources(state: SlotState, rows: Sequence[Sequence[float]], monotonic: float | None) -> list[ResourceStats]:
    from workerpools._stats.snapshot import ResourceStats

    return [
        ResourceStats(name, kind, finished(row, monotonic) if monotonic is not None else tuple(lasting(row)))
        for (name, kind), row in zip(state.titles, rows, strict=True)
    ]


logger = logging.getLogger("workerpools")

#: The counters of events, by kind.
_COUNTED = {
    EventKind.ATTEMPT_REPLAYED: "replays",
    EventKind.REQUEST_REPLAYED: "replays",
    EventKind.TASK_RETRIED: "retries",
    EventKind.REPLAY_REFUSED: "refused_replays",
    EventKind.COMMIT_RESOLVED: "resolved_commits",
}


class Collector:
    """The statistics of one WorkerPools. Without shared memory they are those of this process alone.

    Args:
        listeners: The source of the counted events.
        recycles: Follows the recycle requests in shared memory.
        resources: Returns the resources' holders: each with ``name``, ``kind``, ``meter``, and ``ask()`` to recycle it.
        budget: Returns this process's budget for replays.
        worker: Returns the kind of the worker's execution pool, its concurrency, and its processes' ceilings.
    """

    def __init__(
        self,
        listeners: Listeners,
        recycles: Recycles,
        *,
        resources: Callable[[], Sequence[Any]],
        budget: Callable[[], Budget],
        worker: Callable[[], tuple[str, int, tuple[tuple[str, int], ...]]],
    ) -> None:
        self._recycles = recycles
        self._resources = resources
        self._budget = budget
        self._worker = worker
        self._started = time.time()
        self._slot: Slot | None = None
        self._board: Board | None = None
        self._at_end: list[Callable[[], object]] = []
        #: The alerts in force; set by the worker's monitor.
        self.alerts: tuple[Alert, ...] = ()
        listeners.add(self._count, _COUNTED)
        fork.guard(self)

    def pin(self) -> object:
        """Return nothing: no object needs protection from finalizers (see :mod:`workerpools._process.fork`)."""
        return ()

    def discard(self) -> tuple[object, Sequence[int]]:
        """Forget the parent's slot: a slot has only one writer."""
        slot, self._slot = self._slot, None
        self._started = time.time()
        self.alerts = ()
        return slot, ()

    def share(self, board: Board | None) -> None:
        """Make later children publish into ``board``; earlier publications are dropped.

        Args:
            board: The shared memory; None to stop publishing.
        """
        before, self._board = self._board, board
        self._recycles.follow(None if board is None else board.recycles)
        if before is not None:
            before.remove()

    def at_end(self, call: Callable[[], object]) -> None:
        """Register a function that :meth:`end` calls while all statistics are still available."""
        self._at_end.append(call)

    def end(self) -> None:
        """End the worker's statistics: export them for the last time, then drop them."""
        calls, self._at_end = self._at_end, []
        for call in calls:
            try:
                call()
            except Exception:
                logger.warning("the final export of this worker's statistics failed", exc_info=True)
        self.share(None)

    def join(self, index: int) -> bool:
        """Publish this process's statistics, as the parent's child ``index``; return False without a free slot."""
        slot = None if self._board is None else self._board.claim(index)
        if slot is None:
            return False
        self._slot = slot
        budget = self._budget()
        slot.publish_tokens(budget.tokens, budget.capacity)
        budget.on_change(slot.publish_tokens)
        for resource in self._resources():
            self.attach(resource)
        return True

    @property
    def answers(self) -> bool:
        """Whether this process reports its own statistics, rather than publishing them for its parent."""
        return self._slot is None and (self._board is None or self._board.owner == os.getpid())

    def attach(self, resource: Any) -> None:
        """Publish the statistics of ``resource``, if this process publishes at all."""
        slot = self._slot
        if slot is not None and not resource.meter.is_shown:
            place = slot.place(resource.name, resource.kind)
            if place is not None:
                resource.meter.show(slot, place)

    def names(self) -> list[str]:
        """Return the names of the resources of this process and of its children."""
        own = {resource.name for resource in self._resources()}
        return sorted(own if self._board is None else own | self._board.names())

    def recycle(self, names: Sequence[str]) -> None:
        """Replace connections in this process and its children.

        Args:
            names: The resources; empty for all.
        """
        board, now = self._board, time.monotonic()
        if board is not None and board.owner == os.getpid():
            board.recycles.request(names, now)
        for resource in self._resources():
            if not names or resource.name in names:
                resource.ask(now)

    def _count(self, event: Event) -> None:
        for resource in self._resources():
            if resource.name == event.resource:
                resource.meter.count(_COUNTED[event.kind])
                # Most events follow the attempt's end, and so its publication.
                resource.meter.publish()

    def snapshot(self, children: Collection[int] | None = None) -> WorkerStats:
        """Return the statistics of this process and its children.

        Args:
            children: The process ids of the worker's living children; None to include every living process.
        """
        alive = _lives if children is None else children.__contains__
        execution_pool, concurrency, ceilings = self._worker()
        return assemble(
            [] if self._board is None else self._board.read(alive),
            self._own(),
            execution_pool=execution_pool,
            concurrency=concurrency,
            ceilings=ceilings,
            alive=alive,
            children=children or (),
            now=time.time(),
            monotonic=time.monotonic(),
            alerts=self.alerts,
        )

    def _own(self) -> ProcessStats:
        # Imported by readers only: children that merely count do not need it.
        from workerpools._stats.snapshot import ProcessStats, ResourceStats

        budget, resources = self._budget(), self._resources()
        return ProcessStats(
            pid=os.getpid(),
            started=self._started,
            published=time.time(),
            last_task=max((each.meter.last_attempt for each in resources), default=0.0),
            tokens=budget.tokens,
            capacity=budget.capacity,
            resources=tuple(ResourceStats(each.name, each.kind, each.meter.snapshot()) for each in resources),
        )


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
