"""Lock-free shared memory: children publish statistics, and the worker publishes recycle requests."""

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

from workerpools._stats.metrics import DEFINITIONS, FIRST, WIDTH, MetricType
from workerpools._values import NAME

__all__ = [
    "PLACES",
    "RECYCLE_SIZE",
    "SLOTS",
    "Board",
    "RecycleTable",
    "Recycles",
    "Slot",
    "SlotState",
    "fold",
    "lasting",
    "merge",
]

#: The most children that can publish, and the most resources per child.
SLOTS = 256
PLACES = 16

#: The room for a resource's kind, in bytes of UTF-8, after its name.
KIND = 16
TITLE = NAME + KIND

# The head of a slot, in floats. All heads lie together, so that a search for used slots touches few pages.
WRITES, PID, CLAIMS, VALID, NAMES, OVERFLOW, STARTED, PUBLISHED, TOKENS, CAPACITY, LAST_TASK = range(11)
HEAD = 16
TITLES = PLACES * TITLE // 8
ROWS = PLACES * WIDTH
BODY = TITLES + 3 * ROWS
#: The total size of the slots, in floats.
FLOATS = SLOTS * (HEAD + BODY)

_ALL = slice(None)

_now = time.time


def past_of(body: int, claims: int) -> int:
    """Return the start of a slot's rows of past counters, after the given number of claims."""
    return body + TITLES + ROWS * (1 + claims % 2)


def text_of(raw: bytes) -> str:
    """Return a name or kind from its raw bytes."""
    # A truncated name may end within a character.
    return raw.rstrip(b"\0").decode("utf-8", "ignore")


class Slot:
    """The slot of this process; created by :meth:`Board.claim`."""

    def __init__(self, view: memoryview[float], raw: memoryview[int], index: int) -> None:
        self.index = index
        self._raw = raw
        self._view = view
        self._head = index * HEAD
        self._body = SLOTS * HEAD + index * BODY
        self._lock = threading.RLock()
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
            # From here on the predecessor's numbers count as past ones, and no longer as current ones.
            claims += 1
            view[head + CLAIMS] = claims
        view[own : own + ROWS] = array("d", bytes(8 * ROWS))
        for cell, value in ((OVERFLOW, 0.0), (STARTED, _now()), (PUBLISHED, _now())):
            view[head + cell] = value
        view[head + TOKENS] = view[head + CAPACITY] = view[head + LAST_TASK] = 0.0
        view[head + VALID] = claims
        view[head + WRITES] = self._writes
        self._names = {text_of(self._title(place)[:NAME]): place for place in range(count)}

    def _title(self, place: int) -> bytes:
        start = self._body * 8 + place * TITLE
        return bytes(self._raw[start : start + TITLE])

    def place(self, name: str, kind: str) -> int | None:
        """Return the place of the resource ``name``; None if the slot is full, which is counted."""
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
        """Return the row of a place, for writing single numbers directly."""
        start = self._body + TITLES + place * WIDTH
        return self._view[start : start + WIDTH]

    def publish_tokens(self, tokens: int, capacity: int) -> None:
        """Publish the tokens and the capacity of the retry budget."""
        self._view[self._head + TOKENS], self._view[self._head + CAPACITY] = tokens, capacity

    def publish(self, target: memoryview[float], row: array[float], last_task: float | None = None) -> None:
        """Write one resource's row. Never blocks: skipped while another thread writes, until the next publication.

        Args:
            target: The row, from :meth:`row`.
            row: The numbers.
            last_task: When a task ended that used the resource, in seconds since the epoch; None if none has since
                the last publication.
        """
        lock: Any = self._lock
        if lock._is_owned():
            # The garbage collector closes a connection in the middle of it.
            return
        try:
            # Within the block: a signal may interrupt the call after it has acquired the lock.
            if not lock.acquire(False):
                return
            view, head = self._view, self._head
            self._writes = writes = self._writes + 2
            view[head] = writes - 1
            target[_ALL] = row
            view[head + PUBLISHED] = _now()
            if last_task is not None:
                view[head + LAST_TASK] = last_task
            view[head] = writes
        finally:
            # First of all: a signal may interrupt any call before it, suppress() too.
            try:  # noqa: SIM105
                lock.release()
            except RuntimeError:
                # Not acquired.
                pass


VERSION, EVERY, COUNT = range(3)
_HEAD = 8
_ENTRY = NAME // 8 + 1
#: The most names. A request for more applies to all resources, which is always safe.
ENTRIES = 64
#: The table's size, in floats.
RECYCLE_SIZE = _HEAD + ENTRIES * _ENTRY


class RecycleTable:
    """When each resource was last asked to replace its connections.

    Args:
        cells: :data:`RECYCLE_SIZE` floats, initially 0. The first one changes with each request, so that readers check
            only this one.
    """

    def __init__(self, cells: memoryview[float]) -> None:
        self.cells = cells
        self._raw = cells.cast("B")
        self._writing = threading.Lock()

    def request(self, names: Iterable[str], now: float) -> None:
        """Request the replacement of all connections opened before ``now``.

        Args:
            names: The resources; empty for all.
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
    """The recycle requests that this process follows: its parent's table, or none."""

    def __init__(self) -> None:
        self._table: RecycleTable | None = None
        #: The first one changes with each request.
        self.cells: Sequence[float] = (0.0,)

    def follow(self, table: RecycleTable | None) -> None:
        """Follow the requests in ``table`` from now on; none if None."""
        self._table = table
        self.cells = (0.0,) if table is None else table.cells

    def at(self, name: str) -> float:
        """Return when the resource ``name`` was asked last, on the clock of :func:`time.monotonic`; 0 for never."""
        return 0.0 if self._table is None else self._table.at(name)


#: The total size, in bytes.
SIZE = (FLOATS + RECYCLE_SIZE) * 8

#: The number of attempts at a consistent read.
TRIES = 50

#: The time after which an unfinished write counts as interrupted, in seconds; the writer may merely be paused.
STOPPED = 1.0


@dataclass(frozen=True)
class SlotState:
    """The contents of one slot.

    Attributes:
        index: The slot's number.
        pid: The process id of its last writer.
        started: The start of that process, in seconds since the epoch.
        published: The time of its last publication, in seconds since the epoch.
        tokens: The tokens of its retry budget.
        capacity: The capacity of that budget.
        last_task: The end of its last task that used a resource, in seconds since the epoch; 0 before the first.
        overflow: The number of resources without a place in the slot.
        interrupted: Whether the writer seems to have stopped during a write.
        titles: The name and kind of each resource.
        past: The counters of earlier writers, one row per resource.
        rows: The numbers of the last writer, one row per resource.
    """

    index: int
    pid: int
    started: float = 0.0
    published: float = 0.0
    tokens: int = 0
    capacity: int = 0
    last_task: float = 0.0
    overflow: int = 0
    interrupted: bool = False
    titles: tuple[tuple[str, str], ...] = ()
    past: tuple[Sequence[float], ...] = field(default=(), repr=False)
    rows: tuple[Sequence[float], ...] = field(default=(), repr=False)


class Board:
    """The shared memory of one worker.

    Args:
        memory: The mapping.
        path: The path by which other processes open it; empty for anonymous memory, which only forks inherit.
        keep: An object to keep alive as long as the board.
        owner: The id of the process that created it.
    """

    def __init__(self, memory: mmap.mmap, path: str = "", keep: object = None, owner: int = 0) -> None:
        self._memory = memory
        self._bytes = memoryview(memory)
        self._view = self._bytes.cast("d")
        #: The process that created it, and the only one to write outside the slots.
        self.owner = owner
        #: The recycle requests to the children.
        self.recycles = RecycleTable(self._view[FLOATS:])
        self.path = path
        self._keep = keep
        self._seen: dict[int, SlotState] = {}
        # The write counter and first sighting of each slot that could not be read.
        self._met: dict[int, tuple[float, float]] = {}

    @classmethod
    def anonymous(cls) -> Board:
        """Return a new board that forked children inherit."""
        return cls(mmap.mmap(-1, SIZE), owner=os.getpid())

    @classmethod
    def in_file(cls) -> Board:
        """Return a new board that children of any start method can open by its :attr:`path`."""
        import tempfile

        number, path = tempfile.mkstemp(prefix="workerpools-")
        # Stays open as long as the board.
        file = os.fdopen(number, "r+b")
        file.truncate(SIZE)
        board = cls(mmap.mmap(number, SIZE), path, file, os.getpid())
        through = f"/proc/{os.getpid()}/fd/{number}"
        if os.path.exists(through):
            # Unlinked, so that nothing remains however this process ends.
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
        """Open the board of another process.

        Raises:
            OSError: It does not exist.
            ValueError: Its size differs, so it belongs to another version.
        """
        with open(path, "r+b") as file:
            if os.fstat(file.fileno()).st_size != SIZE:
                raise ValueError(path)
            return cls(mmap.mmap(file.fileno(), SIZE), path)

    def claim(self, index: int) -> Slot | None:
        """Take over the slot of the child ``index`` for this process; None if the index is out of range.

        An index must be unique among living processes, as it is among the children of a pool.
        """
        return Slot(self._view, self._bytes, index) if 0 <= index < SLOTS else None

    def read(self, alive: Callable[[int], bool]) -> list[SlotState]:
        """Return all slots that were ever used.

        Args:
            alive: Returns whether the process with a given id is alive.
        """
        found = (self._read(index, alive) for index in range(SLOTS) if self._view[index * HEAD + CLAIMS])
        return [state for state in found if state is not None]

    def names(self) -> set[str]:
        """Return the names of all resources ever published by a child."""
        found: set[str] = set()
        for index in range(SLOTS):
            # A title is written before it is counted, and never removed.
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
        # The writer is dead, or the slot was never read before. Single numbers are atomic: unless the slot is claimed
        # meanwhile, the copy at worst mixes numbers from before and after the last publication.
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
            last_task=now[LAST_TASK],
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


# Rows of several processes.


def _cells(types: tuple[MetricType, ...]) -> list[int]:
    return [FIRST[each.name] + n for each in DEFINITIONS if each.type in types for n in range(each.width)]


#: The numbers merged by maximum; the last one of each histogram is its highest value.
_HIGHEST = _cells((MetricType.MAX,)) + [
    FIRST[each.name] + each.width - 1 for each in DEFINITIONS if each.type is MetricType.HISTOGRAM
]
#: The numbers that become meaningless when their process ends.
_MOMENTARY = _cells((MetricType.GAUGE, MetricType.MAX))


def merge(rows: Sequence[Sequence[float]]) -> list[float]:
    """Return one row for several processes: sums, or the maximum for types that require it."""
    if not rows:
        return [0.0] * WIDTH
    if len(rows) == 1:
        return list(rows[0])
    merged = [float(sum(column)) for column in zip(*rows, strict=True)]
    for cell in _HIGHEST:
        merged[cell] = max(row[cell] for row in rows)
    return merged


def fold(past: Sequence[float], last: Sequence[float]) -> list[float]:
    """Return the counters of a process that has ended, added to those of its predecessors.

    Args:
        past: The row of its predecessors.
        last: Its own last row.
    """
    return lasting(merge([past, last]))


def lasting(row: Sequence[float]) -> list[float]:
    """Return a row with all current states set to 0."""
    counters = list(row)
    for cell in _MOMENTARY:
        counters[cell] = 0.0
    return counters
