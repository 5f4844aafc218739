"""Draws the connection pools of workers for a terminal; the only file that needs rich."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from workerpools._stats.report import Workers, combined, lines, shown
from workerpools._stats.snapshot import Alert, ProcessStats, ResourceStats, WorkerStats

__all__ = ["Screen", "seconds", "tables"]

#: From this width on, in columns, each number has a column of its own.
WIDE = 120
#: What is worth a look: which part of the connections is in use, how long somebody waited in seconds, which part of the
#: retry budget is left.
BUSY, LONG_WAIT, LOW_BUDGET = 0.8, 5.0, 0.5

#: The headings: for a wide terminal, and for a narrow one.
_WIDE = (
    *("in use", "open", "limit", "pending", "longest wait", "timed out", "reused"),
    *("failures", "replays", "retry budget"),
)
_NARROW = (
    *("in use/\nopen/limit", "pend-\ning", "longest\nwait", "timed\nout", "re-\nused"),
    *("failures/\nreplays", "retry\ntokens"),
)


class Screen:
    """A terminal, or the file that stands in its place.

    Args:
        no_color: Whether to do without colours.
        totals: Whether to leave out the single processes.
        console: Where to write; the standard output if None.
    """

    def __init__(self, *, no_color: bool = False, totals: bool = False, console: Console | None = None) -> None:
        self._console = console or Console(highlight=False, no_color=no_color or None)
        self._totals = totals

    def show(self, workers: Workers) -> None:
        """Write a table for each worker, once."""
        if workers:
            self._console.print(self._drawn(workers))

    @contextmanager
    def watching(self) -> Generator[Callable[[Workers, str], None], None, None]:
        """Give what shows the workers, and a sentence on what is wrong, in place of what was shown before.

        Where there is no terminal nothing can be taken back: that is a line for each resource.
        """
        if not self._console.is_terminal:
            yield self._write
            return
        with Live(console=self._console, auto_refresh=False) as live:

            def update(workers: Workers, trouble: str) -> None:
                below = [Text(trouble, style="yellow")] if trouble else []
                live.update(Group(*([self._drawn(workers)] if workers else []), *below), refresh=True)

            yield update

    def _write(self, workers: Workers, trouble: str) -> None:
        clock = time.strftime("%H:%M:%S")
        for line in [*lines(workers), *([trouble] if trouble else [])]:
            self._console.out(clock, line)
        self._console.file.flush()

    def _drawn(self, workers: Workers) -> RenderableType:
        return tables(workers, width=self._console.width, now=time.time(), totals=self._totals)


def tables(workers: Workers, *, width: int, now: float, totals: bool = False) -> RenderableType:
    """Return a table for each worker.

    Args:
        workers: What each worker answered.
        width: The terminal's, in columns.
        now: In seconds since the epoch.
        totals: Whether to leave out the single processes.
    """
    parts: list[RenderableType] = []
    for name, stats in sorted(workers.items()):
        if parts:
            parts.append("")
        parts += _worker(name, stats, width=width, now=now, totals=totals)
    return Group(*parts)


def _worker(
    name: str, stats: Sequence[WorkerStats], *, width: int, now: float, totals: bool
) -> Iterator[RenderableType]:
    alerts = [alert for snapshot in stats for alert in snapshot.alerts]
    processes = combined(stats)
    yield _title(name, stats, processes, alerts)
    if not stats:
        yield Text("  its app has no WorkerPools", style="dim")
        return
    everything = [each for snapshot in stats for each in snapshot.totals()]
    used = shown(everything)
    unused = ", ".join(each.name for each in everything if each not in used)
    if not used:
        told = f"not used yet: {unused}" if unused else "no resource is declared"
        yield Text(f"  {told}", style="dim")
        return
    wide = width >= WIDE
    table = Table(box=None, padding=(0, 2 if wide else 1, 0, 0), show_edge=False, header_style="dim")
    table.add_column("process", no_wrap=True)
    # The only one that gives way, so that no number is cut.
    table.add_column("resource", overflow="ellipsis", min_width=6)
    for heading in _WIDE if wide else _NARROW:
        table.add_column(heading, justify="right", no_wrap=True)
    concerned = {alert.resource for alert in alerts if alert.pid is None}
    for number, each in enumerate(used):
        table.add_row(
            "total" if number == 0 else "",
            _resource(each, each.name in concerned),
            *_numbers(each, None, wide=wide),
            style="bold",
        )
    if not totals:
        for process in processes:
            _add_process(table, process, alerts, wide=wide)
    yield table
    if unused:
        yield Text(f"not used yet: {unused}", style="dim")
    for alert in alerts:
        yield _alert(alert, now)


def _title(name: str, stats: Sequence[WorkerStats], processes: Sequence[ProcessStats], alerts: Sequence[Alert]) -> Text:
    title = Text(name, style="bold cyan")
    kinds = [snapshot.execution_pool for snapshot in stats if snapshot.execution_pool]
    facts = [*kinds[:1], _counted(len(processes), "process", "processes")]
    if unseen := max((snapshot.unseen for snapshot in stats), default=0):
        facts.append(f"{unseen} more that cannot be seen")
    title.append("  " + ", ".join(facts), style="not bold default")
    if alerts:
        title.append("  " + _counted(len(alerts), "alert", "alerts"), style="bold red")
    return title


def _counted(count: int, one: str, many: str) -> str:
    return f"{count} {one if count == 1 else many}"


def _add_process(table: Table, process: ProcessStats, alerts: Sequence[Alert], *, wide: bool) -> None:
    label = f"main {process.pid}" if process.index is None else f"{process.index:>2} {process.pid}"
    concerned = {alert.resource for alert in alerts if alert.pid == process.pid}
    resources = shown(process.resources)
    for number, each in enumerate(resources):
        first = number == 0
        table.add_row(
            label if first else "",
            _resource(each, each.name in concerned),
            *_numbers(each, process if first else None, wide=wide),
        )
    if not resources:
        table.add_row(label, Text("none yet", style="dim"))


def _resource(stats: ResourceStats, concerned: bool) -> Text:
    return Text(f"{stats.name} !" if concerned else stats.name, style="bold red" if concerned else "")


def _numbers(stats: ResourceStats, process: ProcessStats | None, *, wide: bool) -> list[Text]:
    busy = stats.utilisation is not None and stats.utilisation >= BUSY
    used = Text(str(stats.in_use), style="yellow" if busy else "")
    limit = str(stats.limit) if stats.limit else "–"
    wait = stats.longest_wait_so_far
    ratio = stats.reuse_ratio
    pool = [used, Text(str(stats.open)), Text(limit)]
    troubles = [_count(stats.value("failures")), _count(stats.value("replays"))]
    return [
        *(pool if wide else [Text("/").join(pool)]),
        _count(stats.pending, "yellow"),
        Text(seconds(wait), style="yellow" if wait > LONG_WAIT else ""),
        _count(stats.value("acquire_timeouts")),
        Text("–" if ratio is None else f"{int(ratio * 100)}%"),
        *(troubles if wide else [Text("/").join(troubles)]),
        _budget(process, wide=wide),
    ]


def _count(number: float, style: str = "") -> Text:
    # What did not happen steps back, so that what did is seen.
    return Text(f"{number:.0f}", style=style if number else "not bold dim")


def _budget(process: ProcessStats | None, *, wide: bool) -> Text:
    if process is None or not process.capacity:
        return Text()
    left = process.tokens / process.capacity
    style = "red" if process.tokens == 0 else "yellow" if left < LOW_BUDGET else ""
    return Text(f"{process.tokens}/{process.capacity}" if wide else str(process.tokens), style=style)


def _alert(alert: Alert, now: float) -> Text:
    about = [alert.resource, "" if alert.pid is None else f"process {alert.pid}"]
    where = " in ".join(part for part in about if part)
    text = Text("! ", style="bold red")
    text.append(f"{alert.rule} {where}".rstrip(), style="bold red")
    text.append(f" for {seconds(float(int(max(0.0, now - alert.since))))}" if alert.since else "", style="red")
    text.append(f": {alert.message}" if alert.message else "", style="not bold default")
    return text


def seconds(value: float) -> str:
    """Return a time as a person reads it: ``0.4 ms``, ``12 ms``, ``3.1 s``, ``40 s``, ``4 min``, ``2 h``."""
    if value < 0.00995:
        return f"{value * 1000:.1f} ms" if value >= 0.00005 else "0 ms"
    if value < 0.9995:
        return f"{value * 1000:.0f} ms"
    if value < 99.5:
        return f"{value:.0f} s" if value >= 9.95 or value == int(value) else f"{value:.1f} s"
    minutes = value / 60
    return f"{minutes:.0f} min" if minutes < 99.5 else f"{minutes / 60:.0f} h"
