"""Makes a snapshot of what a process counts, and of what its children have published."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING

from workerpools._core.alerts import Alert
from workerpools._core.board import SlotState
from workerpools._core.counters import lasting
from workerpools._core.meter import finished
from workerpools._core.stats import ProcessStats, ResourceStats, WorkerStats, merged

if TYPE_CHECKING:
    from workerpools._core.registry import Registry

__all__ = ["assemble", "own"]


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
