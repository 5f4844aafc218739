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
from workerpools._stats.memory import Slot
from workerpools._stats.metrics import AGES, BOUNDS, CLOSE_REASONS, FIRST, WIDTH, definition
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

    Times are those of :func:`time.monotonic`.

    Args:
        meter: Counts it.
        waits: Whether the wait for a connection begins now; else the connection is there already.

    Attributes:
        since: When the wait began, then when the connection was acquired.
        attempt: The attempt that acquired it; None outside one, or once it is not that attempt's any more.
        thread: The thread that acquired it for an attempt; else 0.
        reclaim: Gives the connection back for an attempt that left it in use; see :meth:`acquired`.
        stack: Where it was acquired, if that was to be kept.
    """

    # Long methods without helpers: every task that uses a connection pays for each call.

    __slots__ = ("__weakref__", "_meter", "attempt", "reclaim", "since", "stack", "thread")

    def __init__(self, meter: Meter, *, waits: bool = True) -> None:
        self._meter = meter
        self.attempt: Attempt | None = None
        self.thread = 0
        self.reclaim: Callable[[], bool] | None = None
        self.stack: Stack | None = None
        if not waits:
            self.since = monotonic()
            return
        with meter.lock:
            self.since = since = monotonic()
            row, shown, waiting = meter.row, meter.shown, meter.waiting
            if not waiting:
                row[_LONGEST_WAIT] = since
            waiting[self] = None
            row[_PENDING] = len(waiting)
            # Shown at once, single numbers and so without the slot's counter: the wait may be a long one.
            if shown is not None:
                shown[_PENDING], shown[_LONGEST_WAIT] = row[_PENDING], row[_LONGEST_WAIT]

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
        row, leases, waiting, now = meter.row, meter.leases, meter.waiting, monotonic()
        with meter.lock:
            if waiting.pop(self, _ABSENT) is not _ABSENT:
                row[_PENDING] = len(waiting)
                row[_LONGEST_WAIT] = next(iter(waiting)).since if waiting else 0.0
                if reused:
                    row[_REUSED] += 1
                meter.add(_WAIT, max(0.0, now - self.since - creating))
            self.since, self.reclaim = now, reclaim
            self.attempt = attempt = current()
            if attempt is not None:
                self.thread = threading.get_ident()
            if meter.leak_after is not None:
                self.stack = collect()
            leases[self] = None
            row[_IN_USE] = in_use = len(leases)
            if in_use == 1:
                # A snapshot makes an age of it.
                row[_LONGEST_USE] = now
            if (shown := meter.shown) is not None:
                shown[_PENDING], shown[_LONGEST_WAIT] = row[_PENDING], row[_LONGEST_WAIT]
                shown[_IN_USE], shown[_LONGEST_USE] = in_use, row[_LONGEST_USE]

    def gave_up(self, *, timed_out: bool = False) -> None:
        """Note that none came.

        Args:
            timed_out: Whether the wait's bound was reached; else an error ended it.
        """
        meter = self._meter
        row, waiting = meter.row, meter.waiting
        with meter.lock:
            if waiting.pop(self, _ABSENT) is not _ABSENT:
                row[_PENDING] = len(waiting)
                row[_LONGEST_WAIT] = next(iter(waiting)).since if waiting else 0.0
                if (shown := meter.shown) is not None:
                    shown[_PENDING], shown[_LONGEST_WAIT] = row[_PENDING], row[_LONGEST_WAIT]
            if timed_out:
                row[_TIMEOUTS] += 1
                meter.add(_WAIT, monotonic() - self.since)

    def returned(self) -> bool:
        """Note that the connection is not in use any more; return whether it was."""
        meter = self._meter
        now, row, leases = monotonic(), meter.row, meter.leases
        with meter.lock:
            if leases.pop(self, _ABSENT) is _ABSENT:
                return False
            self.attempt = self.reclaim = None
            meter.add(_USE, now - self.since)
            row[_IN_USE] = in_use = len(leases)
            row[_LONGEST_USE] = oldest = next(iter(leases)).since if leases else 0.0
            if (shown := meter.shown) is not None:
                shown[_IN_USE], shown[_LONGEST_USE] = in_use, oldest
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
        #: Those that wait, the longest wait first.
        self.waiting: dict[Lease, None] = {}
        #: Seconds after which a connection in use is reported, so that stacks are kept; None for never.
        self.leak_after: float | None = None
        self._closing = ""
        self._slot: Slot | None = None
        #: The same row in shared memory.
        self.shown: memoryview[float] | None = None

    # Acquiring and giving back.

    def wait(self) -> Lease:
        """Begin a lease with the wait for a connection."""
        return Lease(self)

    def taken(self, reclaim: Callable[[], bool] | None = None) -> Lease:
        """Begin a lease of a connection that is in use at once, where nothing tells of the wait for it."""
        lease = Lease(self, waits=False)
        lease.acquired(reclaim=reclaim)
        return lease

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
            row, cell = self.row, _CLOSED[why]
            row[cell] += 1
            row[_OPEN] = max(0.0, row[_OPEN] - 1)
            if (shown := self.shown) is not None:
                shown[cell], shown[_OPEN] = row[cell], row[_OPEN]
            if age is not None:
                self.add(_OPEN_TIME, age, AGES)
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
        if self._slot is not None and self.shown is not None:
            self._slot.publish(self.shown, self.row)
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
