"""The statistics of one resource in one process: counting, and publishing to the parent."""

from __future__ import annotations

import threading
from array import array
from bisect import bisect_left
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from contextvars import ContextVar
from time import monotonic, time
from typing import Any

from workerpools._process.flows import flow, loop_thread
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

#: The blocks of :meth:`Meter.closing` that surround the caller, the innermost first: (meter, reason, outer block).
#: Other threads close connections of the same resource for reasons of their own.
_closing: ContextVar[Any] = ContextVar("workerpools_closing", default=None)


def _reason_in_block(meter: Meter) -> str:
    # The outermost block of the meter decides.
    found, block = "", _closing.get()
    while block is not None:
        within, reason, block = block
        if within is meter:
            found = reason
    return found


class Lease:
    """One use of a connection: waiting, then acquired and returned; or given up.

    Obtained from :attr:`Opening.wait` or :meth:`Opening.lease`. Times are on the clock of :func:`time.monotonic`.

    Args:
        meter: Counts the lease.
        waits: Whether a wait for the connection begins now; otherwise it is available already.

    Attributes:
        since: The start of the wait; after :meth:`acquired`, the start of the use.
        attempt: The attempt that waits or acquired the connection; None outside one, and once the attempt no longer
            owns it.
        thread: The thread that waits or acquired the connection for an attempt, or the event loop's task (below 0); 0
            otherwise.
        held: The pool's entry, for the adapter; None at the end.
        reclaim: Returns the connection to its pool after its attempt left it in use; see :meth:`acquired`. Set before,
            it is also called after an interruption of the wait.
        stack: The stack at which the connection was acquired; None unless ``leak_after`` is set.
    """

    # Long methods without helpers: every task that uses a connection would pay for the calls. A signal may interrupt
    # each between any two steps: a lease waits or is in use until the last one, and is found at the attempt's end.

    __slots__ = ("__weakref__", "_meter", "attempt", "held", "reclaim", "since", "stack", "thread")

    def __init__(self, meter: Meter, *, waits: bool = True) -> None:
        self._meter = meter
        self.attempt: Attempt | None = current()
        self.thread = 0 if self.attempt is None else threading.get_ident()
        if self.thread == loop_thread.ident != 0:
            self.thread = flow()
        self.held: Any = None
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
            # Published at once, because the wait may be long; single numbers need no write counter.
            if shown is not None:
                shown[_PENDING], shown[_LONGEST_WAIT] = row[_PENDING], row[_LONGEST_WAIT]

    def acquired(
        self, *, creating: float = 0.0, reused: bool = True, reclaim: Callable[[], bool] | None = None
    ) -> None:
        """Report that a connection was acquired, and is now in use.

        Args:
            creating: The part of the wait that was spent opening a connection, in seconds.
            reused: Whether the connection was open already.
            reclaim: Called in the attempt's thread if the attempt has ended and left the connection in use. Returns the
                connection to its pool, and returns whether it was still in use. None if that is impossible.
        """
        meter = self._meter
        row, leases, waiting, now = meter.row, meter.leases, meter.waiting, monotonic()
        with meter.lock:
            if self in waiting:
                if reused:
                    row[_REUSED] += 1
                meter.add(_WAIT, max(0.0, now - self.since - creating))
            self.since, self.reclaim = now, reclaim
            if meter.leak_after is not None:
                self.stack = collect()
            leases[self] = None
            waiting.pop(self, None)
            row[_PENDING] = len(waiting)
            row[_LONGEST_WAIT] = next(iter(waiting)).since if waiting else 0.0
            row[_IN_USE] = in_use = len(leases)
            if in_use == 1:
                # Snapshots convert it to an age.
                row[_LONGEST_USE] = now
            if (shown := meter.shown) is not None:
                shown[_PENDING], shown[_LONGEST_WAIT] = row[_PENDING], row[_LONGEST_WAIT]
                shown[_IN_USE], shown[_LONGEST_USE] = in_use, row[_LONGEST_USE]

    def gave_up(self, *, timed_out: bool = False) -> None:
        """Report that the wait ended without a connection.

        Args:
            timed_out: Whether the wait timed out; otherwise an error ended it.
        """
        meter = self._meter
        row, waiting = meter.row, meter.waiting
        with meter.lock:
            if waiting.pop(self, _ABSENT) is not _ABSENT:
                row[_PENDING] = len(waiting)
                row[_LONGEST_WAIT] = next(iter(waiting)).since if waiting else 0.0
                if (shown := meter.shown) is not None:
                    shown[_PENDING], shown[_LONGEST_WAIT] = row[_PENDING], row[_LONGEST_WAIT]
            self.attempt = self.reclaim = self.held = None
            if timed_out:
                row[_TIMEOUTS] += 1
                meter.add(_WAIT, monotonic() - self.since)

    def returned(self) -> bool:
        """Report that the connection is no longer in use; return whether it was in use until now."""
        meter = self._meter
        now, row, leases = monotonic(), meter.row, meter.leases
        with meter.lock:
            if leases.pop(self, _ABSENT) is _ABSENT:
                return False
            self.attempt = self.reclaim = self.held = None
            meter.add(_USE, now - self.since)
            row[_IN_USE] = in_use = len(leases)
            row[_LONGEST_USE] = oldest = next(iter(leases)).since if leases else 0.0
            if (shown := meter.shown) is not None:
                shown[_IN_USE], shown[_LONGEST_USE] = in_use, oldest
        return True

    @property
    def is_active(self) -> bool:
        """Whether it is waiting or in use."""
        return self in self._meter.leases or self in self._meter.waiting


class Meter:
    """The statistics of one resource in one process.

    Its lock is held only for a few additions at a time. It is re-entrant, because the garbage collector may close a
    connection between them in the same thread.
    """

    def __init__(self) -> None:
        self.row = array("d", bytes(8 * WIDTH))
        self.lock = threading.RLock()
        #: The leases of connections in use, the oldest first.
        self.leases: dict[Lease, None] = {}
        #: The waiting leases, the longest wait first.
        self.waiting: dict[Lease, None] = {}
        #: The time after which a connection in use is reported, in seconds; None for never, and for keeping no stacks.
        self.leak_after: float | None = None
        self._reason = ""
        #: The end of the last attempt that used the resource, in seconds since the epoch; 0 before the first.
        self.last_attempt = 0.0
        self._slot: Slot | None = None
        #: The published copy of the row, in shared memory; None before :meth:`show`.
        self.shown: memoryview[float] | None = None

    # Acquiring and returning.

    def wait(self) -> Lease:
        """Begin a lease with the wait for a connection."""
        return Lease(self)

    def taken(self, reclaim: Callable[[], bool] | None = None) -> Lease:
        """Begin a lease of a connection that is in use at once, without an observable wait."""
        lease = Lease(self, waits=False)
        lease.acquired(reclaim=reclaim)
        return lease

    # Opening and closing.

    def opened(self) -> None:
        """Count an opened connection."""
        with self.lock:
            self.row[_OPENED] += 1
            self.row[_OPEN] += 1
        self.publish()

    def created(self, seconds: float) -> None:
        """Count the time taken to open a connection, in seconds."""
        with self.lock:
            self.add(_CREATE, seconds)

    def closed(self, reason: str = "", age: float | None = None) -> str:
        """Count a closed connection.

        Args:
            reason: One of ``CLOSE_REASONS``; that of :meth:`closing` or :meth:`closes` takes precedence.
            age: The time since it was opened, in seconds; None if unknown.

        Returns:
            The reason counted.
        """
        row = self.row
        with self.lock:
            why = self._reason or _reason_in_block(self) or (reason if reason in _CLOSED else "other")
            cell = _CLOSED[why]
            row[cell] += 1
            row[_OPEN] = max(0.0, row[_OPEN] - 1)
            if age is not None:
                self.add(_OPEN_TIME, age, AGES)
        if current() is None:
            # The process may end with it.
            self.publish()
        elif (shown := self.shown) is not None:
            # The end of the attempt publishes the rest.
            shown[cell], shown[_OPEN] = row[cell], row[_OPEN]
        return why

    def discarded(self, count: int) -> None:
        """Count connections inherited by a fork and discarded; they were never counted as open in this process."""
        self.row[_CLOSED["discarded"]] += count

    @contextmanager
    def closing(self, reason: str) -> Generator[None, None, None]:
        """Count connections closed in the block as closed for ``reason``."""
        token = _closing.set((self, reason, _closing.get()))
        try:
            yield
        finally:
            _closing.reset(token)

    def closes(self, reason: str) -> None:
        """Count connections closed from now on as closed for ``reason``; for their own reasons if it is empty."""
        self._reason = reason

    # The rest.

    def limited(self, limit: int) -> None:
        """Set the maximum number of connections; 0 for no limit."""
        self.row[_LIMIT] = limit
        self.publish()

    @property
    def limit(self) -> int:
        """The maximum number of connections; 0 for no limit."""
        return int(self.row[_LIMIT])

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
        """Increment the counter ``name``."""
        with self.lock:
            self.row[FIRST[definition(name).name]] += 1

    def attempt_ended(self, attempt: Attempt) -> list[Lease]:
        """Count an attempt that used the resource, publish, and return the leases that it left in use.

        Called in the attempt's thread. Leases acquired by other threads belong to those, whatever their context; those
        of the event loop's tasks are the attempt's, which its tasks do not outlive.
        """
        left: list[Lease] = []
        with self.lock:
            if self.leases or self.row[_IN_USE] or self.row[_PENDING]:
                thread = threading.get_ident()
                left = [lease for lease in self._disowned(attempt, 0.0) if lease.thread == thread or lease.thread < 0]
                self.row[_LEAKS] += len(left)
                self.agree()
            self.row[_ATTEMPTS] += 1
        self.last_attempt = now = time()
        if self._slot is not None and self.shown is not None:
            self._slot.publish(self.shown, self.row, now)
        return left

    def leaked(self, lease: Lease) -> None:
        """Count a lease that its attempt left in use; from now on it belongs to the process."""
        with self.lock:
            lease.attempt = None
            self.row[_LEAKS] += 1

    def left_by(self, attempt: Attempt) -> list[Lease]:
        """Return the leases that ``attempt`` left waiting or in use in the calling thread, or on the event loop."""
        with self.lock:
            found = (*self.waiting, *(lease for lease in self.leases if lease not in self.waiting))
        thread = threading.get_ident()
        return [lease for lease in found if lease.attempt is attempt and (lease.thread == thread or lease.thread < 0)]

    def agree(self) -> None:
        """Derive the gauges from the leases: a signal may have interrupted any change of both."""
        row, leases, waiting = self.row, self.leases, self.waiting
        with self.lock:
            row[_PENDING], row[_IN_USE] = len(waiting), len(leases)
            row[_LONGEST_WAIT] = next(iter(waiting)).since if waiting else 0.0
            row[_LONGEST_USE] = next(iter(leases)).since if leases else 0.0

    def recount(self, connections: int) -> None:
        """Set the number of open connections, after an interruption may have kept one from being counted."""
        with self.lock:
            self.row[_OPEN] = connections

    def disown(self, attempt: Attempt, since: float) -> None:
        """Transfer the leases of ``attempt`` that began at or after ``since`` from the attempt to the process."""
        with self.lock:
            self._disowned(attempt, since)

    def _disowned(self, attempt: Attempt, since: float) -> list[Lease]:
        found = [lease for lease in self.leases if lease.attempt is attempt and lease.since >= since]
        for lease in found:
            # Counted only once, and no longer keeps the attempt alive.
            lease.attempt = None
        return found

    def held_since(self, before: float) -> list[Lease]:
        """Return the leases in use since ``before`` or earlier, the oldest first."""
        with self.lock:
            return [lease for lease in self.leases if lease.since <= before]

    def add(self, first: int, seconds: float, bounds: tuple[float, ...] = BOUNDS) -> None:
        """Add a value in seconds to a histogram. The caller holds the lock."""
        row = self.row
        row[first + bisect_left(bounds, seconds)] += 1
        row[first + _SUM] += seconds
        if seconds > row[first + _MAX]:
            row[first + _MAX] = seconds

    # Publishing.

    def show(self, slot: Slot, place: int) -> None:
        """Publish into ``slot`` from now on, at ``place`` in it."""
        with self.lock:
            self._slot, self.shown = slot, slot.row(place)
        self.publish()

    @property
    def is_shown(self) -> bool:
        """Whether it publishes."""
        return self._slot is not None

    def publish(self) -> None:
        """Write the numbers to shared memory. Never blocks."""
        if self._slot is not None and self.shown is not None:
            self._slot.publish(self.shown, self.row)

    def snapshot(self) -> tuple[float, ...]:
        """Return the current numbers."""
        with self.lock:
            return finished(self.row, monotonic())


def finished(row: Iterable[float], now: float) -> tuple[float, ...]:
    """Return a raw row completed for a snapshot: with derived numbers, and ages in place of times.

    Args:
        row: The row as counted and published.
        now: On the clock of :func:`time.monotonic`, which the processes of a machine share.
    """
    values = list(row)
    values[_IDLE] = max(0.0, values[_OPEN] - values[_IN_USE])
    for cell in (_LONGEST_WAIT, _LONGEST_USE):
        since = values[cell]
        values[cell] = max(0.0, now - since) if since else 0.0
    return tuple(values)
