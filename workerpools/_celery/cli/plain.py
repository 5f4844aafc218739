"""The table of ``celery pools status`` without rich: the same rows, no colours."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager

from workerpools._celery.cli.rows import LEFT, RESOURCE, Line, Section, sections
from workerpools._stats.report import Workers, lines

__all__ = ["PlainScreen", "text"]

# Move to the upper left corner and erase below (ECMA-48: CUP, ED).
_CLEAR = "\x1b[H\x1b[J"
_NARROWEST = 6


class PlainScreen:
    """Standard output, with the interface of :class:`workerpools._celery.cli.table.Screen`.

    Args:
        totals: Whether to show only the totals per worker.
    """

    def __init__(self, *, totals: bool = False) -> None:
        self._totals = totals

    def show(self, workers: Workers) -> None:
        """Write a table per worker, once."""
        if workers:
            self._print(self._drawn(workers))

    def show_sections(self, drawn: Iterable[Section]) -> None:
        """Write other sections than those of workers, once."""
        self._print(_text(drawn, shutil.get_terminal_size().columns))

    @contextmanager
    def watching(self) -> Generator[Callable[[Workers, str], None], None, None]:
        """Yield a function that shows the workers and an error message; in a terminal it redraws in place."""
        yield self._redraw if sys.stdout.isatty() else self._write

    def _redraw(self, workers: Workers, trouble: str) -> None:
        self._print("\n".join([_CLEAR + self._drawn(workers), *([trouble] if trouble else [])]))

    def _write(self, workers: Workers, trouble: str) -> None:
        clock = time.strftime("%H:%M:%S")
        for line in [*lines(workers), *([trouble] if trouble else [])]:
            self._print(f"{clock} {line}")

    def _drawn(self, workers: Workers) -> str:
        return text(workers, width=shutil.get_terminal_size().columns, now=time.time(), totals=self._totals)

    def _print(self, written: str) -> None:
        sys.stdout.write(written + "\n")
        sys.stdout.flush()


def text(workers: Workers, *, width: int, now: float, totals: bool = False) -> str:
    """Return a table per worker.

    Args:
        workers: The snapshots of each worker.
        width: The terminal's width, in columns.
        now: The current time, in seconds since the epoch.
        totals: Whether to show only the totals per worker.
    """
    return _text(sections(workers, width=width, now=now, totals=totals), width)


def _text(drawn: Iterable[Section], width: int) -> str:
    return "\n\n".join("\n".join(_lines(section, width)) for section in drawn)


def _lines(section: Section, width: int) -> Iterator[str]:
    yield _joined(section.title)
    if section.rows:
        yield from _table(section, width)
    yield from map(_joined, section.notes)


def _joined(line: Line) -> str:
    return "".join(piece for piece, _ in line)


def _table(section: Section, width: int) -> Iterator[str]:
    headings = [heading.split("\n") for heading in section.headings]
    depth = max(map(len, headings))
    # Headings are aligned at the bottom.
    rows = [[([""] * (depth - len(heading)) + heading)[line] for heading in headings] for line in range(depth)]
    rows += [[_joined(cell) for cell in row.cells] for row in section.rows]
    widths = [max(len(row[column]) for row in rows if column < len(row)) for column in range(len(headings))]
    excess = sum(widths) + section.gap * len(widths) - width
    widths[RESOURCE] = min(widths[RESOURCE], max(_NARROWEST, widths[RESOURCE] - excess))
    for row in rows:
        cells = [
            _fitted(cell, wide) if number < LEFT else cell.rjust(wide)
            for number, (cell, wide) in enumerate(zip(row, widths, strict=False))
        ]
        yield (" " * section.gap).join(cells).rstrip()


def _fitted(cell: str, width: int) -> str:
    return cell.ljust(width) if len(cell) <= width else f"{cell[: width - 1]}…"
