"""The contents of ``celery pools status``, independent of how they are drawn.

Styles are rich's style names; the plain table ignores them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from workerpools._stats.report import Workers, combined, shown
from workerpools._stats.snapshot import Alert, ProcessStats, ResourceStats, WorkerStats

__all__ = ["LEFT", "RESOURCE", "Line", "Row", "Section", "seconds", "sections"]

#: The terminal width, in columns, from which each number gets its own column.
WIDE = 120
#: The thresholds for highlighting: utilisation, wait in seconds, remaining fraction of the retry budget.
BUSY, LONG_WAIT, LOW_BUDGET = 0.8, 5.0, 0.5

# The headings in a wide and in a narrow terminal.
_WIDE = (
    *("in use", "open", "limit", "pending", "longest wait", "timed out", "reused"),
    *("failures", "replays", "retry budget"),
)
_NARROW = (
    *("in use/\nopen/limit", "pend-\ning", "longest\nwait", "timed\nout", "re-\nused"),
    *("failures/\nreplays", "retry\ntokens"),
)
#: The number of left-aligned columns; the others hold numbers, aligned right.
LEFT = 2
#: The only column that is truncated in a narrow terminal, so that no number is.
RESOURCE = 1

#: Pieces of text, each with its style.
Line = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Row:
    """A row of a table, with a cell per heading."""

    cells: Sequence[Line]
    style: str = ""


@dataclass(frozen=True)
class Section:
    """The output for one worker.

    Attributes:
        title: The worker's name, execution pool and number of processes.
        headings: The column headings.
        rows: The table's rows; empty without a table.
        gap: The number of spaces between two columns.
        notes: The lines below the table.
    """

    title: Line
    headings: Sequence[str] = ()
    rows: Sequence[Row] = ()
    gap: int = 1
    notes: Sequence[Line] = ()


def sections(workers: Workers, *, width: int, now: float, totals: bool = False) -> Iterator[Section]:
    """Yield a section per worker, by name.

    Args:
        workers: The snapshots of each worker.
        width: The terminal's width, in columns.
        now: The current time, in seconds since the epoch.
        totals: Whether to show only the totals per worker.
    """
    for name, stats in sorted(workers.items()):
        yield _section(name, stats, wide=width >= WIDE, now=now, totals=totals)


def _section(name: str, stats: Sequence[WorkerStats], *, wide: bool, now: float, totals: bool) -> Section:
    alerts = [alert for snapshot in stats for alert in snapshot.alerts]
    processes = combined(stats)
    title = _title(name, stats, processes, alerts)
    if not stats:
        return Section(title, notes=[_dim("  its app has no WorkerPools")])
    everything = [each for snapshot in stats for each in snapshot.totals()]
    used = shown(everything)
    unused = ", ".join(each.name for each in everything if each not in used)
    if not used:
        return Section(title, notes=[_dim(f"  not used yet: {unused}" if unused else "  no resource is declared")])
    concerned = {alert.resource for alert in alerts if alert.pid is None}
    rows = [
        Row(
            (_plain("" if number else "total"), _resource(each, concerned), *_numbers(each, None, wide=wide)),
            style="bold",
        )
        for number, each in enumerate(used)
    ]
    if not totals:
        for process in processes:
            rows += _process(process, alerts, wide=wide)
    notes = [_dim(f"not used yet: {unused}")] if unused else []
    notes += [_alert(alert, now) for alert in alerts]
    return Section(title, ("process", "resource", *(_WIDE if wide else _NARROW)), rows, 2 if wide else 1, notes)


def _plain(text: str) -> Line:
    return ((text, ""),)


def _dim(text: str) -> Line:
    return ((text, "dim"),)


def _title(name: str, stats: Sequence[WorkerStats], processes: Sequence[ProcessStats], alerts: Sequence[Alert]) -> Line:
    kinds = [snapshot.execution_pool for snapshot in stats if snapshot.execution_pool]
    facts = [*kinds[:1], _counted(len(processes), "process", "processes")]
    if unseen := max((snapshot.unseen for snapshot in stats), default=0):
        facts.append(f"{unseen} more without statistics")
    title = [(name, "bold cyan"), ("  " + ", ".join(facts), "")]
    if alerts:
        title.append(("  " + _counted(len(alerts), "alert", "alerts"), "bold red"))
    return tuple(title)


def _counted(count: int, one: str, many: str) -> str:
    return f"{count} {one if count == 1 else many}"


def _process(process: ProcessStats, alerts: Sequence[Alert], *, wide: bool) -> Iterator[Row]:
    label = f"main {process.pid}" if process.index is None else f"{process.index:>2} {process.pid}"
    concerned = {alert.resource for alert in alerts if alert.pid == process.pid}
    resources = shown(process.resources)
    for number, each in enumerate(resources):
        yield Row(
            (
                _plain("" if number else label),
                _resource(each, concerned),
                *_numbers(each, None if number else process, wide=wide),
            )
        )
    if not resources:
        yield Row((_plain(label), _dim("none yet")))


def _resource(stats: ResourceStats, concerned: set[str]) -> Line:
    return ((f"{stats.name} !", "bold red"),) if stats.name in concerned else _plain(stats.name)


def _numbers(stats: ResourceStats, process: ProcessStats | None, *, wide: bool) -> list[Line]:
    busy = stats.utilisation is not None and stats.utilisation >= BUSY
    pool: list[Line] = [
        ((str(stats.in_use), "yellow" if busy else ""),),
        _plain(str(stats.open)),
        _plain(str(stats.limit) if stats.limit else "–"),
    ]
    troubles = [_count(stats.value("failures")), _count(stats.value("replays"))]
    wait = stats.longest_wait_so_far
    ratio = stats.reuse_ratio
    return [
        *(pool if wide else [_joined(pool)]),
        _count(stats.pending, "yellow"),
        ((seconds(wait), "yellow" if wait > LONG_WAIT else ""),),
        _count(stats.value("acquire_timeouts")),
        _plain("–" if ratio is None else f"{int(ratio * 100)}%"),
        *(troubles if wide else [_joined(troubles)]),
        _budget(process, wide=wide),
    ]


def _joined(cells: Sequence[Line]) -> Line:
    first, *others = cells
    return (*first, *(piece for cell in others for piece in (("/", ""), *cell)))


def _count(number: float, style: str = "") -> Line:
    # Zeros are dimmed so that other counts stand out.
    return ((f"{number:.0f}", style if number else "not bold dim"),)


def _budget(process: ProcessStats | None, *, wide: bool) -> Line:
    if process is None or not process.capacity:
        return ()
    left = process.tokens / process.capacity
    style = "red" if process.tokens == 0 else "yellow" if left < LOW_BUDGET else ""
    return ((f"{process.tokens}/{process.capacity}" if wide else str(process.tokens), style),)


def _alert(alert: Alert, now: float) -> Line:
    about = [alert.resource, "" if alert.pid is None else f"process {alert.pid}"]
    where = " in ".join(part for part in about if part)
    line = [("! ", "bold red"), (f"{alert.rule} {where}".rstrip(), "bold red")]
    if alert.since:
        line.append((f" for {seconds(float(int(max(0.0, now - alert.since))))}", "red"))
    if alert.message:
        line.append((f": {alert.message}", ""))
    return tuple(line)


def seconds(value: float) -> str:
    """Return a time in readable form: ``0.4 ms``, ``12 ms``, ``3.1 s``, ``40 s``, ``4 min``, ``2 h``."""
    if value < 0.00995:
        return f"{value * 1000:.1f} ms" if value >= 0.00005 else "0 ms"
    if value < 0.9995:
        return f"{value * 1000:.0f} ms"
    if value < 99.5:
        return f"{value:.0f} s" if value >= 9.95 or value == int(value) else f"{value:.1f} s"
    minutes = value / 60
    return f"{minutes:.0f} min" if minutes < 99.5 else f"{minutes / 60:.0f} h"
