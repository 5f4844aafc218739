"""The contents of ``celery pools budget``: as rows for a terminal, and as a JSON document. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

from workerpools._celery.cli.rows import Line, Section
from workerpools._celery.cli.rows import Row as Drawn
from workerpools._check.budget import Row, Workers

__all__ = ["document", "sections"]

_HEADINGS = (
    *("limit", "resources", "most", "re-\nserved", "others", "the\nworkers", "head\nroom"),
    *("largest\nconcurrency", "… in a\ndeploy"),
)
#: The number of other clients that are named.
_NAMED = 4


def sections(rows: Sequence[Row], workers: Sequence[Workers]) -> Iterator[Section]:
    """Yield a section per server.

    Args:
        rows: The budget.
        workers: The workers.
    """
    count, processes = sum(each.count for each in workers), sum(each.processes for each in workers)
    fleet = (
        f"{count} {'worker' if count == 1 else 'workers'}, {processes} {'process' if processes == 1 else 'processes'}"
    )
    if not rows:
        yield Section(_line(fleet, "bold cyan"), notes=[_line("  no resource counts against a server's limit", "dim")])
    for server, found in groupby(rows, key=lambda row: row.limit.server):
        of_server = list(found)
        known = [row for row in of_server if row.limit.most is not None]
        yield Section(
            (*_line(server, "bold cyan"), (f"  {fleet}", "")),
            _HEADINGS if known else (),
            [_drawn(row) for row in known],
            notes=[*_sums(of_server), *_notes(of_server)],
        )


def _drawn(row: Row) -> Drawn:
    limit = row.limit
    style = "bold red" if (row.head_room or 0) < 0 and not limit.waits else "" if row.overlaps else "yellow"
    numbers = (
        str(limit.most),
        str(limit.reserved or "–"),
        "?" if row.others is None else str(row.others),
        "no limit" if row.sum is None else str(row.sum),
    )
    fits = [_fits(row, number) for number in (row.largest, row.largest_overlapping)]
    cells = [limit.name, ", ".join(row.resources), *numbers]
    head_room = "?" if row.head_room is None else str(row.head_room)
    return Drawn([*map(_line, cells), _line(head_room, style), *map(_line, fits)])


def _fits(row: Row, number: int | None) -> str:
    if row.head_room is None:
        return "?"
    return "any" if number is None else str(number) if number else "none"


def _sums(rows: Sequence[Row]) -> Iterator[Line]:
    of_resources: dict[str, Sequence[tuple[int, int]]] = {}
    for row in rows:
        for name, found in row.parts.items():
            of_resources.setdefault(name, found)
    for name, found in of_resources.items():
        parts = [f"{processes} × {most or 'no limit'}" for processes, most in found]
        # Workers that are alike are one part.
        counted = [f"{parts.count(part)} × {part}" if parts.count(part) > 1 else part for part in dict.fromkeys(parts)]
        yield _line(f"{name}: {' + '.join(counted)} (processes × connections)", "dim")


def _notes(rows: Sequence[Row]) -> Iterator[Line]:
    for row in rows:
        limit = row.limit
        if limit.most is None:
            yield _line(f"{limit.name} is not known: {limit.unknown}", "yellow")
        elif limit.clients:
            told = [f"{count} {who}" for who, count in limit.clients[:_NAMED]]
            more = sum(count for _, count in limit.clients[_NAMED:])
            yield _line(f"open now, {limit.name}: {', '.join([*told, *([f'{more} more'] if more else [])])}", "dim")
        if limit.waits:
            yield _line(f"above the {limit.name}, transactions wait for each other", "dim")


def _line(text: str, style: str = "") -> Line:
    return ((text, style),)


def document(rows: Sequence[Row], workers: Sequence[Workers]) -> dict[str, Any]:
    """Return the budget as a JSON document; what is unknown is None.

    Args:
        rows: The budget.
        workers: The workers.
    """
    return {
        "version": 1,
        "workers": [
            {
                "count": each.count,
                "execution_pool": each.kind,
                "concurrency": each.concurrency,
                "processes": each.processes,
                "ceilings": dict(each.ceilings),
                "open": None if each.open is None else {name: each.open.get(name, 0) for name in each.ceilings},
            }
            for each in workers
        ],
        "limits": [
            {
                "server": row.limit.server,
                "limit": row.limit.name,
                "most": row.limit.most,
                "reserved": row.limit.reserved,
                "open": row.limit.open,
                "others": row.others,
                "clients": dict(row.limit.clients),
                "waits": row.limit.waits,
                "unknown": row.limit.unknown,
                "resources": dict(row.resources),
                "sum": row.sum,
                "head_room": row.head_room,
                "largest_concurrency": row.largest,
                "largest_concurrency_in_a_deploy": row.largest_overlapping,
            }
            for row in rows
        ],
    }
