"""What a worker tells of its connection pools: in ``celery inspect stats``, and in ``celery inspect pools``."""

from __future__ import annotations

import contextlib
from typing import Any

from celery import bootsteps
from celery.worker.control import Panel, control_command, inspect_command

from workerpools._celery.pools import WorkerPools
from workerpools._celery.sharing import children
from workerpools._stats.metrics import FIRST
from workerpools._stats.snapshot import ResourceStats, WorkerStats
from workerpools.errors import ConfigurationError

__all__ = ["KEY", "PoolsStep", "readable", "register_command", "snapshots"]

#: The key in the reply of ``celery inspect stats``.
KEY = "workerpools"

_OPEN, _IN_USE, _PENDING = FIRST["open"], FIRST["in_use"], FIRST["pending"]
_OPENED, _REUSED, _TIMEOUTS = FIRST["opened"], FIRST["reused"], FIRST["acquire_timeouts"]


def snapshots(app: Any, worker: Any) -> list[WorkerStats]:
    """Return a snapshot of each WorkerPools of ``app``.

    Args:
        app: The Celery app.
        worker: Its worker in this process; None outside of one.
    """
    living = None if worker is None else children(worker)
    return [pools.collector.snapshot(living) for pools in WorkerPools.all_of(app)]


class PoolsStep(bootsteps.StartStopStep):
    """Adds the connection pools to what the worker says of itself; starts nothing."""

    def info(self, worker: Any) -> dict[str, Any]:
        stats = snapshots(worker.app, worker)
        return {KEY: {**readable(stats), "snapshots": [each.to_dict() for each in stats]}}


def readable(stats: list[WorkerStats]) -> dict[str, Any]:
    """Return snapshots as a person reads them in ``celery inspect stats`` or on Flower's page of a worker.

    One short text for each resource of the worker, and one for each of its processes.
    """
    resources: dict[str, str] = {}
    processes: dict[str, dict[str, str]] = {}
    for worker in stats:
        resources.update({each.name: _line(each) for each in worker.totals()})
        for process in worker.processes:
            processes.setdefault(str(process.pid), {}).update({each.name: _line(each) for each in process.resources})
    alerts = [f"{alert.rule}: {alert.message}" for each in stats for alert in each.alerts]
    unseen = max((each.unseen for each in stats), default=0)
    return {"resources": resources, "processes": processes, "alerts": alerts, "unseen": unseen}


def _line(stats: ResourceStats) -> str:
    row = stats.row
    limit = f"/{stats.limit}" if stats.limit else ""
    text = (
        f"open {row[_OPEN]:.0f}{limit}, in use {row[_IN_USE]:.0f}, pending {row[_PENDING]:.0f}; "
        f"opened {row[_OPENED]:.0f}, reused {row[_REUSED]:.0f}; "
        f"longest wait {stats.longest_wait_so_far:.3f} s, timed out {row[_TIMEOUTS]:.0f}"
    )
    troubles = [(name, stats.value(name)) for name in ("failures", "replays", "retries", "refused_replays", "leaks")]
    told = ", ".join(f"{name.replace('_', ' ')} {count:.0f}" for name, count in troubles if count)
    return f"{text}; {told}" if told else text


def register_command() -> None:
    """Have this process know ``celery inspect pools`` and ``celery control pools_recycle``."""
    if "pools" not in Panel.data:
        inspect_command(name="pools")(_inspect_pools)
        control_command(name="pools_recycle", args=[("name", str)], signature="[NAME]")(_recycle)


def _inspect_pools(state: Any, **_: Any) -> list[dict[str, Any]]:
    """Show what the connection pools of each of the worker's processes are doing."""
    return [each.to_dict() for each in snapshots(state.app, state.consumer.controller)]


def _recycle(state: Any, name: str | None = None, **_: Any) -> dict[str, Any]:
    """Have each process replace its connections at its next use: of one resource, or of all."""
    recycled: set[str] = set()
    for pools in WorkerPools.all_of(state.app):
        # Another WorkerPools of the app may have a resource of that name.
        with contextlib.suppress(ConfigurationError):
            recycled.update(pools.recycle(name))
    if name is not None and not recycled:
        known = {each for pools in WorkerPools.all_of(state.app) for each in pools.collector.names()}
        return {"error": f"no resource is named {name!r}", "resources": sorted(known)}
    return {"ok": "connections are replaced when they are used next", "resources": sorted(recycled)}
