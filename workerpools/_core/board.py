"""Shared memory through which children tell their parent what they count: the parent's side.

One mapping of a fixed size, made before the fork: :data:`SLOTS` slots of :data:`PLACES` resources, about 8 MB of
address space, of which only what is used takes memory. A child that finds no slot, or a resource that finds no place,
is counted as such and works all the same.

A reader that meets a slot which is just being written tries again a few times, and then keeps what it had read before:
a writer that was killed half-way costs nobody time.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from workerpools._core.counters import WIDTH
from workerpools._core.recycling import SIZE as RECYCLES
from workerpools._core.recycling import RecycleTable
from workerpools._core.slots import (
    BODY,
    CAPACITY,
    CLAIMS,
    FLOATS,
    HEAD,
    NAME,
    NAMES,
    OVERFLOW,
    PID,
    PLACES,
    PUBLISHED,
    SLOTS,
    STARTED,
    TITLE,
    TITLES,
    TOKENS,
    VALID,
    WRITES,
    Slot,
    past_of,
    text_of,
)

__all__ = ["Board", "SlotState"]

#: The size of it all, in bytes.
SIZE = (FLOATS + RECYCLES) * 8

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
