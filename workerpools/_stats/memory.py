"""Shared memory between a worker and its children: counters up, requests to recycle down; one writer each, no lock."""

from __future__ import annotations

import contextlib
import mmap
import os
import threading
import time
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from workerpools._stats.metrics import WIDTH, fold
from workerpools._values import NAME

__all__ = ["PLACES", "RECYCLE_SIZE", "SLOTS", "Board", "RecycleTable", "Recycles", "Slot", "SlotState"]

#: How many children of a worker can publish, and how many resources each.
SLOTS = 256
PLACES = 16

#: What a resource's kind may take, in bytes of UTF-8, after its name.
KIND = 16
TITLE = NAME + KIND

# The head of a slot, as floats: the heads lie together, so that looking for used slots touches few pages.
WRITES, PID, CLAIMS, VALID, NAMES, OVERFLOW, STARTED, PUBLISHED, TOKENS, CAPACITY = range(10)
HEAD = 16
TITLES = PLACES * TITLE // 8
ROWS = PLACES * WIDTH
BODY = TITLES + 3 * ROWS
#: The size of all, in floats.
FLOATS = SLOTS * (HEAD + BODY)

_ALL = slice(None)

_now = time.time


def past_of(body: int, claims: int) -> int:
    """Return where the rows of a slot's past begin, after so many have taken it over."""
    return body + TITLES + ROWS * (1 + claims % 2)


def text_of(raw: bytes) -> str:
    """Return a name or a kind as it was written."""
    # A name that is too long was cut, perhaps within a character.
    return raw.rstrip(b"\0").decode("utf-8", "ignore")


class Slot:
    """The slot of this process; made by :meth:`workerpools._stats.board.Board.claim`."""

    def __init__(self, view: memoryview[float], raw: memoryview[int], index: int) -> None:
        self.index = index
        self._raw = raw
        self._view = view
        self._head = index * HEAD
        self._body = SLOTS * HEAD + index * BODY
        self._lock = threading.Lock()
        # A predecessor may have been killed while the counter was odd.
        self._writes = int(view[self._head + WRITES]) // 2 * 2
        self._names: dict[str, int] = {}
        self._take_over()

    def _take_over(self) -> None:
        view, head, body = self._view, self._head, self._body
        self._writes += 2
        view[head + WRITES] = self._writes - 1
        view[head + PID] = os.getpid()
        claims, count = int(view[head + CLAIMS]), int(view[head + NAMES])
        own = body + TITLES
        if view[head + VALID] == claims:
            before, after = past_of(body, claims), past_of(body, claims + 1)
            for at in range(0, count * WIDTH, WIDTH):
                folded = fold(
                    view[before + at : before + at + WIDTH].tolist(), view[own + at : own + at + WIDTH].tolist()
                )
                view[after + at : after + at + WIDTH] = array("d", folded)
            # From here on the predecessor's own numbers count as its past, and do not count as anybody's own.
            claims += 1
            view[head + CLAIMS] = claims
        view[own : own + ROWS] = array("d", bytes(8 * ROWS))
        for cell, value in ((OVERFLOW, 0.0), (STARTED, _now()), (PUBLISHED, _now())):
            view[head + cell] = value
        view[head + TOKENS] = view[head + CAPACITY] = 0.0
        view[head + VALID] = claims
        view[head + WRITES] = self._writes
        self._names = {text_of(self._title(place)[:NAME]): place for place in range(count)}

    def _title(self, place: int) -> bytes:
        start = self._body * 8 + place * TITLE
        return bytes(self._raw[start : start + TITLE])

    def place(self, name: str, kind: str) -> int | None:
        """Return the place of the resource ``name``; None if there is none left, which is counted."""
        raw = name.encode()[:NAME]
        known = text_of(raw)
        with self._lock:
            place = self._names.get(known)
            view, head = self._view, self._head
            if place is None:
                place = len(self._names)
                if place >= PLACES:
                    view[head + OVERFLOW] += 1
                    return None
                self._names[known] = place
            start = self._body * 8 + place * TITLE
            self._raw[start : start + TITLE] = raw.ljust(NAME, b"\0") + kind.encode()[:KIND].ljust(KIND, b"\0")
            view[head + NAMES] = len(self._names)
            return place

    def row(self, place: int) -> memoryview[float]:
        """Return the row of a place, for single numbers that are to be seen at once."""
        start = self._body + TITLES + place * WIDTH
        return self._view[start : start + WIDTH]

    def tell_tokens(self, tokens: int, capacity: int) -> None:
        """Show the tokens of the retry budget, and how many it can hold."""
        self._view[self._head + TOKENS], self._view[self._head + CAPACITY] = tokens, capacity

    def publish(self, target: memoryview[float], row: array[float]) -> None:
        """Write one resource's row. Never blocks: what another thread is writing meanwhile is newer next time.

        Args:
            target: What :meth:`row` returned.
            row: The numbers.
        """
        if not self._lock.acquire(False):
            return
        try:
            view, head = self._view, self._head
            self._writes = writes = self._writes + 2
            view[head] = writes - 1
            target[_ALL] = row
            view[head + PUBLISHED] = _now()
            view[head] = writes
        finally:
            self._lock.release()


VERSION, EVERY, COUNT = range(3)
_HEAD = 8
_ENTRY = NAME // 8 + 1
#: How many names there is room for; where they do not suffice, every resource is meant: that is never wrong.
ENTRIES = 64
#: The table's size, in floats.
RECYCLE_SIZE = _HEAD + ENTRIES * _ENTRY


class RecycleTable:
    """When each resource was last asked to replace its connections.

    Args:
        cells: :data:`RECYCLE_SIZE` floats, all 0 in the beginning. The first one changes with each request: it is all
            that a reader looks at each time.
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


#: The size of it all, in bytes.
SIZE = (FLOATS + RECYCLE_SIZE) * 8

#: How often a reader tries again.
TRIES = 50

#: A writer that has not gone on for so long seems to have stopped, in seconds; it may have been paused by the system.
STOPPED = 1.0


@dataclass(frozen=True)
class SlotState:
    """What was read of one slot.

    Attributes:
        index: The slot's number.
        pid: Its last writer.
        started: When that one began, in seconds since the epoch.
        published: When it last published, in seconds since the epoch.
        tokens: The tokens of its retry budget.
        capacity: How many that can hold.
        overflow: How many resources found no place.
        interrupted: Whether its writer seems to have stopped half-way.
        titles: The name and kind of each resource.
        past: A row for each: the counters of earlier writers.
        rows: A row for each: its last writer's own.
    """

    index: int
    pid: int
    started: float = 0.0
    published: float = 0.0
    tokens: int = 0
    capacity: int = 0
    overflow: int = 0
    interrupted: bool = False
    titles: tuple[tuple[str, str], ...] = ()
    past: tuple[Sequence[float], ...] = field(default=(), repr=False)
    rows: tuple[Sequence[float], ...] = field(default=(), repr=False)


class Board:
    """The shared memory of one worker.

    Args:
        memory: The mapping.
        path: Where other processes can open it; empty for an anonymous one, which is only inherited by a fork.
        keep: Whatever must stay open as long as the board is in use.
        owner: The process that made it.
    """

    def __init__(self, memory: mmap.mmap, path: str = "", keep: object = None, owner: int = 0) -> None:
        self._memory = memory
        self._bytes = memoryview(memory)
        self._view = self._bytes.cast("d")
        #: The process that made it: it alone writes what is not in a slot.
        self.owner = owner
        #: Which connections the children are to replace.
        self.recycles = RecycleTable(self._view[FLOATS:])
        self.path = path
        self._keep = keep
        self._seen: dict[int, SlotState] = {}
        # Since when each slot that could not be read was at which write.
        self._met: dict[int, tuple[float, float]] = {}

    @classmethod
    def anonymous(cls) -> Board:
        """Return a new one that forked children inherit."""
        return cls(mmap.mmap(-1, SIZE), owner=os.getpid())

    @classmethod
    def in_file(cls) -> Board:
        """Return a new one that children of any start method can open by its :attr:`path`."""
        import tempfile

        number, path = tempfile.mkstemp(prefix="workerpools-")
        # Open as long as the board is, and closed with it.
        file = os.fdopen(number, "r+b")
        file.truncate(SIZE)
        board = cls(mmap.mmap(number, SIZE), path, file, os.getpid())
        through = f"/proc/{os.getpid()}/fd/{number}"
        if os.path.exists(through):
            # Then nothing is left behind, however this process ends.
            os.unlink(path)
            board.path = through
        return board

    def remove(self) -> None:
        """Remove the file, if there is one."""
        if self._keep is not None and not self.path.startswith("/proc/"):
            with contextlib.suppress(OSError):
                os.unlink(self.path)

    @classmethod
    def at(cls, path: str) -> Board:
        """Open the one that another process made.

        Raises:
            OSError: There is none.
            ValueError: It is of another size, and so of another version.
        """
        with open(path, "r+b") as file:
            if os.fstat(file.fileno()).st_size != SIZE:
                raise ValueError(path)
            return cls(mmap.mmap(file.fileno(), SIZE), path)

    def claim(self, index: int) -> Slot | None:
        """Take over the slot of the child ``index``, for this process; None if there is none of that number.

        Of all living processes only one may have an index, as is so among the children of a pool.
        """
        return Slot(self._view, self._bytes, index) if 0 <= index < SLOTS else None

    def read(self, alive: Callable[[int], bool]) -> list[SlotState]:
        """Return every slot that was ever used.

        Args:
            alive: Tells whether the process of that id lives.
        """
        found = (self._read(index, alive) for index in range(SLOTS) if self._view[index * HEAD + CLAIMS])
        return [state for state in found if state is not None]

    def names(self) -> set[str]:
        """Return the names of all resources that any child has ever published."""
        found: set[str] = set()
        for index in range(SLOTS):
            # A title is written before it is counted, and stays.
            for place in range(min(int(self._view[index * HEAD + NAMES]), PLACES)):
                start = (SLOTS * HEAD + index * BODY) * 8 + place * TITLE
                found.add(text_of(bytes(self._bytes[start : start + NAME])))
        return found

    def _read(self, index: int, alive: Callable[[int], bool]) -> SlotState | None:
        view, head = self._view, index * HEAD
        for _ in range(TRIES):
            writes = view[head + WRITES]
            if writes % 2:
                continue
            state = self._copy(index)
            if view[head + WRITES] == writes:
                self._seen[index] = state
                return state
        writes, now = view[head + WRITES], time.monotonic()
        met, since = self._met.get(index, (0.0, now))
        if met != writes:
            self._met[index], since = (writes, now), now
        interrupted = now - since >= STOPPED
        if alive(int(view[head + PID])) and index in self._seen:
            return replace(self._seen[index], interrupted=interrupted)
        # Nobody writes here any more, or nothing was ever read. Each number is whole: as long as the slot was not
        # taken over meanwhile, the worst is that some are from before the last publication and some from after it.
        for _ in range(TRIES):
            claims = view[head + CLAIMS], view[head + VALID]
            state = self._copy(index)
            if (view[head + CLAIMS], view[head + VALID]) == claims:
                self._seen[index] = state
                return replace(state, interrupted=interrupted)
        return self._seen.get(index)

    def _copy(self, index: int) -> SlotState:
        view: Any = self._view
        head, body = index * HEAD, SLOTS * HEAD + index * BODY
        now = view[head : head + HEAD].tolist()
        count, claims = min(int(now[NAMES]), PLACES), int(now[CLAIMS])
        titles = bytes(self._bytes[body * 8 : body * 8 + count * TITLE])
        past = view[(start := past_of(body, claims)) : start + count * WIDTH].tolist()
        rows = view[(start := body + TITLES) : start + count * WIDTH].tolist()
        if now[VALID] != now[CLAIMS]:
            rows = [0.0] * len(rows)
        return SlotState(
            index=index,
            pid=int(now[PID]),
            started=now[STARTED],
            published=now[PUBLISHED],
            tokens=int(now[TOKENS]),
            capacity=int(now[CAPACITY]),
            overflow=int(now[OVERFLOW]),
            titles=tuple(_title(titles, place) for place in range(count)),
            past=_split(past, count),
            rows=_split(rows, count),
        )


def _split(numbers: list[float], count: int) -> tuple[list[float], ...]:
    return tuple(numbers[place * WIDTH : (place + 1) * WIDTH] for place in range(count))


def _title(titles: bytes, place: int) -> tuple[str, str]:
    raw = titles[place * TITLE :]
    return text_of(raw[:NAME]), text_of(raw[NAME:TITLE])
