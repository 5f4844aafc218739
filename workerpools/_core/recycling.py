"""Since when a resource's connections are to be replaced: told by a worker's main process, read by its children.

A table of a fixed size at the end of the shared memory. One process writes it, without a lock that a reader could
meet: entries are only added, a name is written before it counts, and the version moves last. A reader that looked at
the middle of that looks again. Times are those of :func:`time.monotonic`, which the processes of a machine share: a
child that was started later has opened everything later, too.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence

from workerpools._core.slots import NAME, text_of

__all__ = ["SIZE", "RecycleTable", "Recycles"]

VERSION, EVERY, COUNT = range(3)
_HEAD = 8
_ENTRY = NAME // 8 + 1
#: How many names there is room for; where they do not suffice, every resource is meant: that is never wrong.
ENTRIES = 64
#: The table's size, in floats.
SIZE = _HEAD + ENTRIES * _ENTRY


class RecycleTable:
    """When each resource was last asked to replace its connections.

    Args:
        cells: :data:`SIZE` floats, all 0 in the beginning. The first one changes with each request: it is all that a
            reader looks at each time.
    """

    def __init__(self, cells: memoryview[float]) -> None:
        self.cells = cells
        self._raw = cells.cast("B")
        self._writing = threading.Lock()

    def tell(self, names: Iterable[str], now: float) -> None:
        """Ask for new connections in place of those that were opened before ``now``.

        Args:
            names: The resources; none for every one.
            now: On the clock of :func:`time.monotonic`.
        """
        with self._writing:
            cells = self.cells
            places = [self._place(name) for name in names]
            if not places or None in places:
                cells[EVERY] = now
            for place in places:
                if place is not None:
                    cells[place + _ENTRY - 1] = now
            cells[VERSION] += 1

    def _place(self, name: str) -> int | None:
        raw = name.encode()[:NAME]
        for place in self._places():
            if self._name(place) == text_of(raw):
                return place
        count = int(self.cells[COUNT])
        if count == ENTRIES:
            return None
        place = _HEAD + count * _ENTRY
        self._raw[place * 8 : place * 8 + NAME] = raw.ljust(NAME, b"\0")
        self.cells[COUNT] = count + 1
        return place

    def at(self, name: str) -> float:
        """Return when the resource ``name`` was asked last, on the clock of :func:`time.monotonic`; 0 for never."""
        cut = text_of(name.encode()[:NAME])
        own = (self.cells[place + _ENTRY - 1] for place in self._places() if self._name(place) == cut)
        return max(self.cells[EVERY], next(own, 0.0))

    def _places(self) -> range:
        return range(_HEAD, _HEAD + int(self.cells[COUNT]) * _ENTRY, _ENTRY)

    def _name(self, place: int) -> str:
        return text_of(bytes(self._raw[place * 8 : place * 8 + NAME]))


class Recycles:
    """What this process is told: the table of its parent, or nothing."""

    def __init__(self) -> None:
        self._table: RecycleTable | None = None
        #: The first one changes with each request.
        self.cells: Sequence[float] = (0.0,)

    def follow(self, table: RecycleTable | None) -> None:
        """Be told by ``table`` from now on; by nobody if None."""
        self._table = table
        self.cells = (0.0,) if table is None else table.cells

    def at(self, name: str) -> float:
        """Return when the resource ``name`` was asked last, on the clock of :func:`time.monotonic`; 0 for never."""
        return 0.0 if self._table is None else self._table.at(name)
