"""The child's side of the shared memory in which its parent reads what it counts: one slot, one writer, no lock.

Each slot has a counter of writes (a "seqlock"): odd while its writer writes. A slot outlives its child. Who takes it
over folds the predecessor's counters into its past, in a second buffer that one store puts into force: killed at any
point of that, it has counted nothing twice.
"""

from __future__ import annotations

import os
import threading
from array import array
from time import time

from workerpools._core.counters import WIDTH, fold

__all__ = ["PLACES", "SLOTS", "Slot"]

#: How many children of a worker can publish, and how many resources each.
SLOTS = 256
PLACES = 16

#: What a resource's name may take, and its kind, in bytes of UTF-8.
NAME = 56
KIND = 8
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


def past_of(body: int, claims: int) -> int:
    """Return where the rows of a slot's past begin, after so many have taken it over."""
    return body + TITLES + ROWS * (1 + claims % 2)


def text_of(raw: bytes) -> str:
    """Return a name or a kind as it was written."""
    # A name that is too long was cut, perhaps within a character.
    return raw.rstrip(b"\0").decode("utf-8", "ignore")


class Slot:
    """The slot of this process; made by :meth:`workerpools._core.board.Board.claim`."""

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
        for cell, value in ((OVERFLOW, 0.0), (STARTED, time()), (PUBLISHED, time())):
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
            view[head + PUBLISHED] = time()
            view[head] = writes
        finally:
            self._lock.release()
