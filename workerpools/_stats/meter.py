"""Counts what one resource does in this process, and puts the numbers where the parent can read them."""

from __future__ import annotations

import threading
from array import array
from bisect import bisect_left
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from time import monotonic

from workerpools._run.attempts import Attempt, current
from workerpools._run.failure import FailureKind
from workerpools._stats.metrics import AGES, BOUNDS, CLOSE_REASONS, FIRST, WIDTH, definition
from workerpools._stats.shared import Slot
from workerpools._stats.stacks import Stack, collect

__all__ = ["Lease", "Meter"]

_OPEN, _IN_USE, _IDLE = FIRST["open"], FIRST["in_use"], FIRST["idle"]
_LIMIT, _PENDING = FIRST["limit"], FIRST["pending"]
_LONGEST_WAIT, _LONGEST_USE = FIRST["longest_wait"], FIRST["longest_use"]
_OPENED, _REUSED, _TIMEOUTS = FIRST["opened"], FIRST["reused"], FIRST["acquire_timeouts"]
_WAIT, _CREATE, _USE = FIRST["acquire_wait"], FIRST["create_time"], FIRST["use_time"]
_OPEN_TIME = FIRST["open_time"]
_CHECKS, _FAILED_CHECKS = FIRST["checks"], FIRST["failed_checks"]
_ATTEMPTS, _LEAKS = FIRST["attempts"], FIRST["leaks"]
_CLOSED = {reason: FIRST["closed"] + n for n, reason in enumerate(CLOSE_REASONS)}
_FAILED = {kind: FIRST["failures"] + n for n, kind in enumerate(FailureKind)}
_SUM = len(BOUNDS) + 1
_MAX = _SUM + 1
_ABSENT = object()


class Lease:
    """One use of a connection: waiting, then acquired and returned; or given up.

    Made by :meth:`Meter.wait`. Times are those of :func:`time.monotonic`.

    Attributes:
        since: When the wait began, then when the connection was acquired.
        attempt: The attempt that acquired it; None outside one, or once it is not that attempt's any more.
        thread: The thread that acquired it for an attempt; else 0.
        reclaim: Gives the connection back for an attempt that left it in use; see :meth:`acquired`.
        stack: Where it was acquired, if that was to be kept.
    """

    __slots__ = ("__weakref__", "_meter", "attempt", "reclaim", "since", "stack", "thread")

    def __init__(self, meter: Meter, since: float) -> None:
        self._meter = meter
        self.since = since
        self.attempt: Attempt | None = None
        self.thread = 0
        self.reclaim: Callable[[], bool] | None = None
        self.stack: Stack | None = None

    def acquired(
        self, *, creating: float = 0.0, reused: bool = True, reclaim: Callable[[], bool] | None = None
    ) -> None:
        """Note that a connection came, and is in use from now on.

        Args:
            creating: Seconds of the wait that went into opening a connection.
            reused: Whether the connection was open before.
            reclaim: Called in the attempt's thread where the attempt has ended and left the connection in use; gives
                it back and returns whether it was still out. None where nothing can.
        """
        meter = self._meter
        row, now = meter.row, monotonic()
        with meter.lock:
            meter.waited(self)
            if reused:
                row[_REUSED] += 1
            meter.add(_WAIT, max(0.0, now - self.since - creating))
            meter.take(self, now, reclaim)

    def gave_up(self, *, timed_out: bool = False) -> None:
        """Note that none came.

        Args:
            timed_out: Whether the wait's bound was reached; else an error ended it.
        """
        meter = self._meter
        with meter.lock:
            meter.waited(self)
            if timed_out:
                meter.row[_TIMEOUTS] += 1
                meter.add(_WAIT, monotonic() - self.since)

    def returned(self) -> bool:
        """Note that the connection is not in use any more; return whether it was."""
        meter = self._meter
        now, row, leases = monotonic(), meter.row, meter.leases
        with meter.lock:
            if self not in leases:
                return False
            del leases[self]
            self.attempt = self.reclaim = None
            meter.add(_USE, now - self.since)
            row[_IN_USE] = in_use = len(leases)
            if (shown := meter.shown) is not None:
                shown[_IN_USE] = in_use
            meter.oldest(next(iter(leases)).since if leases else 0.0)
        return True


class Meter:
    """The numbers of one resource in one process.

    Its lock is held for a few additions at a time. It is re-entrant, because the garbage collector may close a
    connection in the middle of them, in the same thread.
    """

    def __init__(self) -> None:
        self.row = array("d", bytes(8 * WIDTH))
        self.lock = threading.RLock()
        #: The leases of connections in use, the oldest first.
        self.leases: dict[Lease, None] = {}
        # Those that wait, the longest wait first.
        self._waits: dict[Lease, None] = {}
        #: Seconds after which a connection in use is reported, so that stacks are kept; None for never.
        self.leak_after: float | None = None
        self._closing = ""
        self._slot: Slot | None = None
        #: The same row in shared memory.
        self.shown: memoryview[float] | None = None

    # Acquiring and giving back.

    def wait(self) -> Lease:
        """Note that somebody wants a connection."""
        row, shown = self.row, self.shown
        with self.lock:
            lease = Lease(self, since := monotonic())
            if not self._waits:
                row[_LONGEST_WAIT] = since
                if shown is not None:
                    shown[_LONGEST_WAIT] = since
            self._waits[lease] = None
            row[_PENDING] += 1
            # Shown at once, a single number and so without the slot's counter: the wait may be a long one.
            if shown is not None:
                shown[_PENDING] = row[_PENDING]
        return lease

    def waited(self, lease: Lease) -> None:
        """Note, under the lock, that a wait is over."""
        row, waits = self.row, self._waits
        if waits.pop(lease, _ABSENT) is _ABSENT:
            return
        row[_PENDING] -= 1
        row[_LONGEST_WAIT] = longest = next(iter(waits)).since if waits else 0.0
        if (shown := self.shown) is not None:
            shown[_PENDING], shown[_LONGEST_WAIT] = row[_PENDING], longest

    def taken(self, reclaim: Callable[[], bool] | None = None) -> Lease:
        """Note that a connection is in use from now on, where nothing tells of the wait for it."""
        with self.lock:
            lease = Lease(self, now := monotonic())
            self.take(lease, now, reclaim)
        return lease

    def take(self, lease: Lease, now: float, reclaim: Callable[[], bool] | None) -> None:
        """Note, under the lock, that a lease's connection is in use."""
        lease.since, lease.reclaim = now, reclaim
        lease.attempt = attempt = current()
        if attempt is not None:
            lease.thread = threading.get_ident()
        if self.leak_after is not None:
            lease.stack = collect()
        self.leases[lease] = None
        self.row[_IN_USE] = in_use = len(self.leases)
        if (shown := self.shown) is not None:
            shown[_IN_USE] = in_use
        if in_use == 1:
            self.oldest(now)

    def oldest(self, since: float) -> None:
        """Note, under the lock, since when the oldest lease is out; a snapshot makes an age of it."""
        self.row[_LONGEST_USE] = since
        if self.shown is not None:
            self.shown[_LONGEST_USE] = since

    # Opening and closing.

    def opened(self) -> None:
        """Count a connection that was opened."""
        with self.lock:
            self.row[_OPENED] += 1
            self.row[_OPEN] += 1
        self.publish()

    def created(self, seconds: float) -> None:
        """Count how long it took to open a connection."""
        with self.lock:
            self.add(_CREATE, seconds)

    def closed(self, reason: str = "", age: float | None = None) -> str:
        """Count a connection that was closed.

        Args:
            reason: Why; one that :meth:`closing` or :meth:`closes` gives wins.
            age: For how long it was open, in seconds; None where that is not known.

        Returns:
            Why, for the record.
        """
        with self.lock:
            why = self._closing or reason or "other"
            self.row[_CLOSED[why]] += 1
            self.row[_OPEN] = max(0.0, self.row[_OPEN] - 1)
            if age is not None:
                self.add(_OPEN_TIME, age, AGES)
        self.publish()
        return why

    def discarded(self, count: int) -> None:
        """Count connections that were inherited by a fork; they are the parent's, and not among the open ones."""
        self.row[_CLOSED["discarded"]] += count

    @contextmanager
    def closing(self, reason: str) -> Generator[None, None, None]:
        """Count whatever is closed meanwhile as closed for ``reason``."""
        before, self._closing = self._closing, self._closing or reason
        try:
            yield
        finally:
            self._closing = before

    def closes(self, reason: str) -> None:
        """Count whatever is closed from now on as closed for ``reason``; for none in particular if it is empty."""
        self._closing = reason

    # The rest.

    def limited(self, limit: int) -> None:
        """Note how many connections may be open; 0 for any number."""
        self.row[_LIMIT] = limit
        self.publish()

    def checked(self, *, alive: bool) -> None:
        """Count a check of an idle connection."""
        with self.lock:
            self.row[_CHECKS] += 1
            if not alive:
                self.row[_FAILED_CHECKS] += 1

    def failed(self, kind: FailureKind) -> None:
        """Count a failure."""
        with self.lock:
            self.row[_FAILED[kind]] += 1

    def count(self, name: str) -> None:
        """Count one more of the counter ``name``."""
        with self.lock:
            self.row[FIRST[definition(name).name]] += 1

    def attempt_ended(self, attempt: Attempt) -> list[Lease]:
        """Count an attempt that used the resource, publish, and return the leases that it left.

        Called in the thread of the attempt. What another thread has acquired is that one's, whatever its context says.
        """
        left: list[Lease] = []
        with self.lock:
            self.row[_ATTEMPTS] += 1
            if self.leases:
                left = [lease for lease in self._disowned(attempt, 0.0) if lease.thread == threading.get_ident()]
                self.row[_LEAKS] += len(left)
        if self._slot is not None:
            self.publish()
        return left

    def disown(self, attempt: Attempt, since: float) -> None:
        """Note that leases of ``attempt`` from ``since`` on are not the attempt's, but the process's."""
        with self.lock:
            self._disowned(attempt, since)

    def _disowned(self, attempt: Attempt, since: float) -> list[Lease]:
        found = [lease for lease in self.leases if lease.attempt is attempt and lease.since >= since]
        for lease in found:
            # Counted once, and the attempt is not kept by it any longer.
            lease.attempt = None
        return found

    def held_since(self, before: float) -> list[Lease]:
        """Return the leases that are out since before that time, the oldest first."""
        with self.lock:
            return [lease for lease in self.leases if lease.since <= before]

    def add(self, first: int, seconds: float, bounds: tuple[float, ...] = BOUNDS) -> None:
        """Add a value to a histogram, under the lock."""
        row = self.row
        row[first + bisect_left(bounds, seconds)] += 1
        row[first + _SUM] += seconds
        if seconds > row[first + _MAX]:
            row[first + _MAX] = seconds

    # Where the numbers are seen.

    def show(self, slot: Slot, place: int) -> None:
        """Publish into ``slot`` from now on, at ``place`` there."""
        with self.lock:
            self._slot, self.shown = slot, slot.row(place)
        self.publish()

    @property
    def is_shown(self) -> bool:
        """Whether it publishes."""
        return self._slot is not None

    def publish(self) -> None:
        """Put the numbers where the parent can read them. Never blocks."""
        if self._slot is not None and self.shown is not None:
            self._slot.publish(self.shown, self.row)

    def snapshot(self) -> tuple[float, ...]:
        """Return the numbers as they are now."""
        with self.lock:
            return finished(self.row, monotonic())


def finished(row: Iterable[float], now: float) -> tuple[float, ...]:
    """Return a raw row as a snapshot shows it: with what follows from the other numbers.

    Args:
        row: As it is counted and published.
        now: On the clock of :func:`time.monotonic`, which the processes of a machine share.
    """
    values = list(row)
    values[_IDLE] = max(0.0, values[_OPEN] - values[_IN_USE])
    for cell in (_LONGEST_WAIT, _LONGEST_USE):
        since = values[cell]
        values[cell] = max(0.0, now - since) if since else 0.0
    return tuple(values)
