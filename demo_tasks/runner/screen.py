"""What the user sees: live bars and tables in a terminal, plain lines everywhere else."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Generator
from typing import TextIO

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from demo_tasks.runner.output import patient
from demo_tasks.summary import RESOURCES, Summary

__all__ = ["Bar", "Screen"]

# How often a line tells of the progress where there is no terminal, in seconds.
LINE_EVERY = 2.0


class Bar:
    """The progress of the tasks.

    Args:
        screen: Where it is shown.
        total: How many tasks there are.
        progress: The live display; None where plain lines do.
    """

    def __init__(self, screen: Screen, total: int, progress: Progress | None) -> None:
        self._screen = screen
        self._total = total
        self._progress = progress
        self._task = None if progress is None else progress.add_task("tasks", total=total)
        self._next_line = time.monotonic() + LINE_EVERY

    def update(self, done: int) -> None:
        """Show how many tasks have ended."""
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=done)
        elif time.monotonic() >= self._next_line:
            self._next_line = time.monotonic() + LINE_EVERY
            self._screen.say(f"{done:,} of {self._total:,} tasks done")


class Screen:
    """Standard output.

    Args:
        stream: Where to write instead.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        stream = patient(stream or sys.stdout)
        self.live = stream.isatty()
        # Said outright, because rich also looks at variables like FORCE_COLOR, which continuous integration sets.
        self._console = Console(
            file=stream,
            force_terminal=self.live,
            color_system="auto" if self.live else None,
            width=None if self.live else 100,
            highlight=False,
            emoji=False,
            markup=False,
        )

    def say(self, text: str, style: str = "") -> None:
        """Write one line; above the bar, if one is shown."""
        self._console.print(Text(text, style=style), soft_wrap=True)

    def opening(self, tasks: int, children: int) -> None:
        """Write what is going to be shown."""
        self.say(f"A shop's {tasks:,} tasks, in a Celery worker with {children} processes, on real servers.", "bold")
        self.say("Half-way every connection to PostgreSQL and Redis is cut, some at the very answer to a COMMIT, and")
        self.say("the HTTP server closes its own. Watch that no task fails, and no row is lost or written twice.")
        self.say("")

    def fail(self, text: str) -> None:
        """Write why the run could not go on, to standard error."""
        with contextlib.suppress(OSError):
            print(f"demo: {text}", file=sys.stderr, flush=True)

    @contextlib.contextmanager
    def waiting(self, text: str) -> Generator[None, None, None]:
        """Show that something takes its time, while the block runs; nothing without a terminal."""
        if not self.live:
            yield
            return
        with self._console.status(text):
            yield

    @contextlib.contextmanager
    def bar(self, total: int) -> Generator[Bar, None, None]:
        """Show the progress of ``total`` tasks while the block runs."""
        if not self.live:
            yield Bar(self, total, None)
            return
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
        )
        with Progress(*columns, console=self._console) as progress:
            yield Bar(self, total, progress)

    def summary(self, summary: Summary) -> None:
        """Show what a run came to."""
        first, *others = summary.lines()
        self.say("")
        self.say(first, "bold green" if summary.ok else "bold red")
        for line in others:
            self.say(line)
        self.say("\nConnections opened by each process, and what a client per task would have opened", "bold")
        self._console.print(self._children(summary))
        for line in summary.closing():
            self.say(line, "bold green" if summary.ok else "bold red")
        self.say("")

    def _children(self, summary: Summary) -> Table:
        table = Table(box=box.ROUNDED if self.live else box.ASCII2, show_footer=True)
        runs = sum(sum(child.runs.values()) for child in summary.children.values())
        table.add_column("process", footer="together\nwith a client per task")
        table.add_column("tasks run", justify="right", footer=f"{runs:,}")
        for resource, library in RESOURCES.items():
            footer = Text(f"{summary.opened(resource):,}", style="bold green")
            footer.append(f"\n{summary.opened_per_task(resource):,}", style="not bold dim default")
            table.add_column(f"{resource}:\n{library}", justify="right", style="bold green", footer=footer)
        for name, child in summary.children.items():
            opened = (f"{child.opened[resource]:,}" for resource in RESOURCES)
            table.add_row(f"pid {name.rpartition('/')[2]}", f"{sum(child.runs.values()):,}", *opened)
        return table
