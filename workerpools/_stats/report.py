"""Reports of worker snapshots: a JSON document for scripts, lines for people."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

from workerpools._stats.metrics import DEFINITIONS, MetricType
from workerpools._stats.snapshot import ProcessStats, ResourceStats, WorkerStats

__all__ = ["Workers", "combined", "document", "lines", "shown"]

#: The version of the document; readers ignore unknown keys.
VERSION = 1

#: The answers, by worker: one snapshot per WorkerPools of its app.
Workers = Mapping[str, Sequence[WorkerStats]]


def document(workers: Workers, missing: Collection[str], now: float) -> dict[str, Any]:
    """Return a JSON-serializable document with all numbers, including zeros.

    Args:
        workers: The answers of the workers.
        missing: The workers that were asked by name and did not answer.
        now: In seconds since the epoch.
    """
    return {
        "version": VERSION,
        "taken": round(now, 3),
        "workers": {name: [_snapshot(each) for each in stats] for name, stats in sorted(workers.items())},
        "missing": sorted(missing),
    }


def _snapshot(stats: WorkerStats) -> dict[str, Any]:
    return {
        **{key: value for key, value in stats.to_dict().items() if key not in ("version", "past")},
        "processes": [
            {**process.to_dict(), "resources": {each.name: full(each) for each in process.resources}}
            for process in stats.processes
        ],
        "totals": {each.name: full(each) for each in stats.totals()},
    }


def full(stats: ResourceStats) -> dict[str, Any]:
    """Return all numbers of a resource, with derived ratios; a ratio is None if undefined."""
    answer: dict[str, Any] = {"kind": stats.kind}
    for each in DEFINITIONS:
        if each.type is MetricType.HISTOGRAM:
            found = stats.histogram(each.name)
            answer[each.name] = {
                "count": found.count,
                "sum": round(found.sum, 6),
                "max": round(found.max, 6),
                "buckets": list(found.buckets),
            }
        elif each.values:
            answer[each.name] = {label: int(number) for label, number in stats.labelled(each.name).items()}
        else:
            number = stats.value(each.name)
            answer[each.name] = round(number, 6) if each.unit == "s" else int(number)
    for name, ratio in (("utilisation", stats.utilisation), ("reuse_ratio", stats.reuse_ratio)):
        answer[name] = None if ratio is None else round(ratio, 4)
    return answer


def lines(workers: Workers) -> Iterator[str]:
    """Yield one line per resource and per alert of each worker, for logs and ``grep``."""
    for name, stats in sorted(workers.items()):
        for each in (total for snapshot in stats for total in snapshot.totals()):
            reused = "-" if each.reuse_ratio is None else f"{each.reuse_ratio:.2f}"
            yield (
                f"{name} {each.name} in_use={each.in_use} open={each.open} limit={each.limit or '-'} "
                f"pending={each.pending} longest_wait={each.longest_wait_so_far:.3f} "
                f"timed_out={each.value('acquire_timeouts'):.0f} reused={reused} "
                f"failures={each.value('failures'):.0f} replays={each.value('replays'):.0f}"
            )
        for alert in (alert for snapshot in stats for alert in snapshot.alerts):
            yield f"{name} {alert.resource or '-'} alert={alert.rule} {alert.message}"


def combined(stats: Sequence[WorkerStats]) -> list[ProcessStats]:
    """Return a worker's processes, the main one last, each with the resources of all its WorkerPools."""
    found: dict[int, ProcessStats] = {}
    for process in (process for snapshot in stats for process in snapshot.processes):
        before = found.get(process.pid)
        if before is not None:
            # Each WorkerPools has its own budget; the emptier one matters.
            emptier = min(before, process, key=lambda each: each.tokens)
            process = ProcessStats(
                pid=process.pid,
                index=process.index,
                tokens=emptier.tokens,
                capacity=emptier.capacity,
                resources=before.resources + process.resources,
            )
        found[process.pid] = process
    return sorted(found.values(), key=lambda each: (each.index is None, each.index, each.pid))


def shown(resources: Iterable[ResourceStats]) -> list[ResourceStats]:
    """Return the resources that have been used: a worker may declare many and use few."""
    return [each for each in resources if any(each.value(name) for name in _DONE)]


_DONE = ("open", "in_use", "pending", "opened", "attempts", "failures", "acquire_timeouts")
