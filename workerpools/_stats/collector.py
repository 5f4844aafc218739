"""The statistics of one WorkerPools: shared with the parent by a child, collected by the parent."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any

from workerpools._process import fork
from workerpools._run.budget import Budget
from workerpools._run.events import Event, EventKind, Listeners
from workerpools._stats.memory import Board, Recycles, Slot, SlotState
from workerpools._stats.meter import finished
from workerpools._stats.metrics import lasting

if TYPE_CHECKING:
    from workerpools._stats.snapshot import Alert, ProcessStats, ResourceStats, WorkerStats

__all__ = ["Collector", "assemble"]


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
    from workerpools._stats.snapshot import WorkerStats, merged

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
    from workerpools._stats.snapshot import ProcessStats

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
    from workerpools._stats.snapshot import ResourceStats

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
    """The statistics of one WorkerPools. Counting needs no set-up: without shared memory it is this process's alone.

    Args:
        listeners: Whose events are counted.
        recycles: Follows the shared memory's requests to recycle.
        resources: Returns the resources: each with ``name``, ``kind``, ``meter``, and ``ask()`` to be recycled.
        budget: Returns this process's budget for replays.
        execution_pool: Returns the kind of the worker's execution pool.
    """

    def __init__(
        self,
        listeners: Listeners,
        recycles: Recycles,
        *,
        resources: Callable[[], Sequence[Any]],
        budget: Callable[[], Budget],
        execution_pool: Callable[[], str],
    ) -> None:
        self._recycles = recycles
        self._resources = resources
        self._budget = budget
        self._execution_pool = execution_pool
        self._started = time.time()
        self._slot: Slot | None = None
        self._board: Board | None = None
        self._at_end: list[Callable[[], object]] = []
        #: The alerts in force; set by the worker's monitor.
        self.alerts: tuple[Alert, ...] = ()
        listeners.add(self._count, _COUNTED)
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
        self._recycles.follow(None if board is None else board.recycles)
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
        budget = self._budget()
        slot.tell_tokens(budget.tokens, budget.capacity)
        budget.tell(slot.tell_tokens)
        for resource in self._resources():
            self.attach(resource)
        return True

    @property
    def answers(self) -> bool:
        """Whether this process tells what it counts, and not a parent for it."""
        return self._slot is None and (self._board is None or self._board.owner == os.getpid())

    def attach(self, resource: Any) -> None:
        """Publish what ``resource`` counts from now on, where this process publishes at all."""
        slot = self._slot
        if slot is not None and not resource.meter.is_shown:
            place = slot.place(resource.name, resource.kind)
            if place is not None:
                resource.meter.show(slot, place)

    def names(self) -> list[str]:
        """Return the names of the resources of this process, and of those that its children have made themselves."""
        own = {resource.name for resource in self._resources()}
        return sorted(own if self._board is None else own | self._board.names())

    def recycle(self, names: Sequence[str]) -> None:
        """Have connections replaced, here and by the children of this process.

        Args:
            names: The resources; none for every one.
        """
        board, now = self._board, time.monotonic()
        if board is not None and board.owner == os.getpid():
            board.recycles.tell(names, now)
        for resource in self._resources():
            if not names or resource.name in names:
                resource.ask(now)

    def _count(self, event: Event) -> None:
        for resource in self._resources():
            if resource.name == event.resource:
                resource.meter.count(_COUNTED[event.kind])
                # Most come after the attempt has ended, and so was published.
                resource.meter.publish()

    def snapshot(self, children: Collection[int] | None = None) -> WorkerStats:
        """Return what this process counts, and what its children publish.

        Args:
            children: The process ids of the worker's living children; whoever lives, where that is not known.
        """
        alive = _lives if children is None else children.__contains__
        return assemble(
            [] if self._board is None else self._board.read(alive),
            self._own(),
            execution_pool=self._execution_pool(),
            alive=alive,
            children=children or (),
            now=time.time(),
            monotonic=time.monotonic(),
            alerts=self.alerts,
        )

    def _own(self) -> ProcessStats:
        # Loaded by readers alone: a child that only counts has no use for it.
        from workerpools._stats.snapshot import ProcessStats, ResourceStats

        budget = self._budget()
        return ProcessStats(
            pid=os.getpid(),
            started=self._started,
            published=time.time(),
            tokens=budget.tokens,
            capacity=budget.capacity,
            resources=tuple(ResourceStats(each.name, each.kind, each.meter.snapshot()) for each in self._resources()),
        )


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
