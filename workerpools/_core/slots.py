"""Shared memory through which children tell their parent what they count: a slot a child, one writer, no lock.

One mapping of a fixed size, made before the fork: :data:`SLOTS` slots of :data:`PLACES` resources, about 7 MB of
address space, of which only what is used takes memory. A child that finds no slot, or a resource that finds no place,
is counted as such and works all the same.

Each slot has a counter of writes (a "seqlock"): odd while its writer writes. A reader that meets an odd or a changed
one tries again a few times, and then keeps what it had read before: a writer that was killed half-way costs nobody
time.

A slot outlives its child. Who takes it over folds the predecessor's counters into its past, in a second buffer that
one store puts into force: killed at any point of that, it has counted nothing twice.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import threading
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from time import time
from typing import Any

from workerpools._core.counters import WIDTH, fold

__all__ = ["PLACES", "SLOTS", "Board", "Slot", "SlotState"]

#: How many children of a worker can publish, and how many resources each.
SLOTS = 256
PLACES = 16

#: What a name may take, and a kind, in bytes of UTF-8.
NAME = 56
KIND = 8

# The head of a slot, as floats: the heads lie together, so that looking for used slots touches few pages.
_WRITES, _PID, _CLAIMS, _VALID, _NAMES, _OVERFLOW, _STARTED, _PUBLISHED, _TOKENS, _CAPACITY = range(10)
_HEAD = 16
_TITLES = PLACES * (NAME + KIND) // 8
_ROWS = PLACES * WIDTH
_BODY = _TITLES + 3 * _ROWS
_FLOATS = SLOTS * (_HEAD + _BODY)

_ALL = slice(None)

#: How often a reader tries again.
TRIES = 50


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
    """

    def __init__(self, memory: mmap.mmap, path: str = "", keep: object = None) -> None:
        self._memory = memory
        self._bytes = memoryview(memory)
        self._view = self._bytes.cast("d")
        self.path = path
        self._keep = keep
        self._seen: dict[int, SlotState] = {}

    @classmethod
    def anonymous(cls) -> Board:
        """Return a new one that forked children inherit."""
        return cls(mmap.mmap(-1, _FLOATS * 8))

    @classmethod
    def in_file(cls) -> Board:
        """Return a new one that children of any start method can open by its :attr:`path`."""
        import tempfile

        number, path = tempfile.mkstemp(prefix="workerpools-")
        # Open as long as the board is, and closed with it.
        file = os.fdopen(number, "r+b")
        file.truncate(_FLOATS * 8)
        board = cls(mmap.mmap(number, _FLOATS * 8), path, file)
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
            if os.fstat(file.fileno()).st_size != _FLOATS * 8:
                raise ValueError(path)
            return cls(mmap.mmap(file.fileno(), _FLOATS * 8), path)

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
        found = (self._read(index, alive) for index in range(SLOTS) if self._view[index * _HEAD + _CLAIMS])
        return [state for state in found if state is not None]

    def _read(self, index: int, alive: Callable[[int], bool]) -> SlotState | None:
        view, head = self._view, index * _HEAD
        for _ in range(TRIES):
            writes = view[head + _WRITES]
            if writes % 2:
                continue
            state = self._copy(index)
            if view[head + _WRITES] == writes:
                self._seen[index] = state
                return state
        if alive(int(view[head + _PID])) and index in self._seen:
            return replace(self._seen[index], interrupted=True)
        # Nobody writes here any more, or nothing was ever read. Each number is whole: as long as the slot was not
        # taken over meanwhile, the worst is that some are from before the last publication and some from after it.
        for _ in range(TRIES):
            claims = view[head + _CLAIMS], view[head + _VALID]
            state = self._copy(index)
            if (view[head + _CLAIMS], view[head + _VALID]) == claims:
                self._seen[index] = replace(state, interrupted=True)
                return self._seen[index]
        return self._seen.get(index)

    def _copy(self, index: int) -> SlotState:
        view: Any = self._view
        head, body = index * _HEAD, SLOTS * _HEAD + index * _BODY
        now = view[head : head + _HEAD].tolist()
        count, claims = min(int(now[_NAMES]), PLACES), int(now[_CLAIMS])
        titles = bytes(self._bytes[body * 8 : body * 8 + count * (NAME + KIND)])
        past = view[(start := _past(body, claims)) : start + count * WIDTH].tolist()
        rows = view[(start := body + _TITLES) : start + count * WIDTH].tolist()
        if now[_VALID] != now[_CLAIMS]:
            rows = [0.0] * len(rows)
        return SlotState(
            index=index,
            pid=int(now[_PID]),
            started=now[_STARTED],
            published=now[_PUBLISHED],
            tokens=int(now[_TOKENS]),
            capacity=int(now[_CAPACITY]),
            overflow=int(now[_OVERFLOW]),
            titles=tuple(_title(titles, place) for place in range(count)),
            past=_split(past, count),
            rows=_split(rows, count),
        )


def _past(body: int, claims: int) -> int:
    return body + _TITLES + _ROWS * (1 + claims % 2)


def _split(numbers: list[float], count: int) -> tuple[list[float], ...]:
    return tuple(numbers[place * WIDTH : (place + 1) * WIDTH] for place in range(count))


def _title(titles: bytes, place: int) -> tuple[str, str]:
    raw = titles[place * (NAME + KIND) :]
    return _text(raw[:NAME]), _text(raw[NAME : NAME + KIND])


def _text(raw: bytes) -> str:
    # A name that is too long was cut, perhaps within a character.
    return raw.rstrip(b"\0").decode("utf-8", "ignore")


class Slot:
    """The slot of this process; made by :meth:`Board.claim`."""

    def __init__(self, view: memoryview[float], raw: memoryview[int], index: int) -> None:
        self.index = index
        self._raw = raw
        self._view = view
        self._head = index * _HEAD
        self._body = SLOTS * _HEAD + index * _BODY
        self._lock = threading.Lock()
        # A predecessor may have been killed while the counter was odd.
        self._writes = int(view[self._head + _WRITES]) // 2 * 2
        self._names: dict[str, int] = {}
        self._take_over()

    def _take_over(self) -> None:
        view, head, body = self._view, self._head, self._body
        self._writes += 2
        view[head + _WRITES] = self._writes - 1
        view[head + _PID] = os.getpid()
        claims, count = int(view[head + _CLAIMS]), int(view[head + _NAMES])
        own = body + _TITLES
        if view[head + _VALID] == claims:
            before, after = _past(body, claims), _past(body, claims + 1)
            for at in range(0, count * WIDTH, WIDTH):
                folded = fold(
                    view[before + at : before + at + WIDTH].tolist(), view[own + at : own + at + WIDTH].tolist()
                )
                view[after + at : after + at + WIDTH] = array("d", folded)
            # From here on the predecessor's own numbers count as its past, and do not count as anybody's own.
            claims += 1
            view[head + _CLAIMS] = claims
        view[own : own + _ROWS] = array("d", bytes(8 * _ROWS))
        for cell, value in ((_OVERFLOW, 0.0), (_STARTED, time()), (_PUBLISHED, time())):
            view[head + cell] = value
        view[head + _TOKENS] = view[head + _CAPACITY] = 0.0
        view[head + _VALID] = claims
        view[head + _WRITES] = self._writes
        self._names = {_text(self._title(place)[:NAME]): place for place in range(count)}

    def _title(self, place: int) -> bytes:
        start = self._body * 8 + place * (NAME + KIND)
        return bytes(self._raw[start : start + NAME + KIND])

    def place(self, name: str, kind: str) -> int | None:
        """Return the place of the resource ``name``; None if there is none left, which is counted."""
        raw = name.encode()[:NAME]
        known = _text(raw)
        with self._lock:
            place = self._names.get(known)
            view, head = self._view, self._head
            if place is None:
                place = len(self._names)
                if place >= PLACES:
                    view[head + _OVERFLOW] += 1
                    return None
                self._names[known] = place
            start = self._body * 8 + place * (NAME + KIND)
            self._raw[start : start + NAME + KIND] = raw.ljust(NAME, b"\0") + kind.encode()[:KIND].ljust(KIND, b"\0")
            view[head + _NAMES] = len(self._names)
            return place

    def row(self, place: int) -> memoryview[float]:
        """Return the row of a place, for single numbers that are to be seen at once."""
        start = self._body + _TITLES + place * WIDTH
        return self._view[start : start + WIDTH]

    def tell_tokens(self, tokens: int, capacity: int) -> None:
        """Show the tokens of the retry budget, and how many it can hold."""
        self._view[self._head + _TOKENS], self._view[self._head + _CAPACITY] = tokens, capacity

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
            view[head + _PUBLISHED] = time()
            view[head] = writes
        finally:
            self._lock.release()
