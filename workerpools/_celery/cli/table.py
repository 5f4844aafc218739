"""Draws the connection pools of workers in a terminal; the only module that needs rich."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from workerpools._celery.cli.rows import LEFT, RESOURCE, Line, Section, sections
from workerpools._stats.report import Workers, lines

__all__ = ["Screen"]


class Screen:
    """A terminal, or a file that output is redirected to.

    Args:
        no_color: Whether to omit colours.
        totals: Whether to show only the totals per worker.
        console: The console to write to; None for standard output.
    """

    def __init__(self, *, no_color: bool = False, totals: bool = False, console: Console | None = None) -> None:
        self._console = console or Console(highlight=False, no_color=no_color or None)
        self._totals = totals

    def show(self, workers: Workers) -> None:
        """Write a table per worker, once."""
        if workers:
            self._console.print(self._drawn(workers))

    def show_sections(self, drawn: Iterable[Section]) -> None:
        """Write other sections than those of workers, once."""
        self._console.print(_drawn(drawn))

    @contextmanager
    def watching(self) -> Generator[Callable[[Workers, str], None], None, None]:
        """Yield a function that shows the workers and an error message, in place of the previous output.

        Without a terminal, output cannot be replaced: the function appends one line per resource.
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
        return _drawn(sections(workers, width=self._console.width, now=time.time(), totals=self._totals))


def _drawn(drawn: Iterable[Section]) -> RenderableType:
    parts: list[RenderableType] = []
    for section in drawn:
        parts += [""] if parts else []
        parts.append(_text(section.title))
        parts += [_table(section)] if section.rows else []
        parts += map(_text, section.notes)
    return Group(*parts)


def _table(section: Section) -> Table:
    table = Table(box=None, padding=(0, section.gap, 0, 0), show_edge=False, header_style="dim")
    for number, heading in enumerate(section.headings):
        if number == RESOURCE:
            table.add_column(heading, overflow="ellipsis", min_width=6)
        else:
            table.add_column(heading, justify="left" if number < LEFT else "right", no_wrap=True)
    for row in section.rows:
        table.add_row(*map(_text, row.cells), style=row.style)
    return table


def _text(line: Line) -> Text:
    return Text.assemble(*line)
