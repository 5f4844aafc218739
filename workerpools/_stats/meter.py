"""Counts what one resource does in this process, and puts the numbers where the parent can read them."""

from __future__ import annotations

import threading
from array import array
from bisect import bisect_left
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from time import monotonic
from typing import TYPE_CHECKING, NamedTuple

from workerpools._run.failure import FailureKind
from workerpools._stats.leaks import Stack, collect
from workerpools._stats.metrics import AGES, BOUNDS, CLOSE_REASONS, FIRST, WIDTH, definition

if TYPE_CHECKING:
    from workerpools._stats.shared import Slot

__all__ = ["Meter", "Use"]

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


class Use(NamedTuple):
    """One use of a connection that goes on.

    Attributes:
        since: When it began, on the clock of :func:`time.monotonic`.
        attempt: The attempt that it began in, if one is known.
        holder: What the adapter knows it by (see :attr:`Meter.reclaim`).
        thread: The thread that acquired the connection.
        stack: Where that was, if it was to be kept.
    """

    since: float
    attempt: object = None
    holder: object = None
    thread: int = 0
    stack: Stack | None = None


# A plain tuple until somebody looks: making one is a part of every acquisition.
_Use = tuple[float, object, object, int, "Stack | None"]


class Meter:
    """The numbers of one resource in one process.

    Its lock is held for a few additions at a time. It is re-entrant, because the garbage collector may close a
    connection in the middle of them, in the same thread.
    """

    def __init__(self) -> None:
        self.row = array("d", bytes(8 * WIDTH))
        self._lock = threading.RLock()
        # Who uses a connection since when, the oldest use first, and for which attempt.
        self._uses: dict[int, _Use] = {}
        # Since when somebody waits, the longest wait first.
        self._waits: dict[float, None] = {}
        #: Gives back a connection that its attempt has left in use, by its holder; returns whether it did.
        self.reclaim: Callable[[object], bool] | None = None
        #: For how long a connection may be in use, in seconds, before it is told of; None for any time.
        self.leak_after: float | None = None
        self._creating: dict[int, float] = {}
        self._made: dict[int, float] = {}
        self._closing = ""
        self._slot: Slot | None = None
        # The same row in shared memory.
        self._shown: memoryview[float] | None = None

    # Acquiring and giving back.

    def waiting(self) -> float:
        """Note that somebody wants a connection; return when, for :meth:`acquired` or :meth:`gave_up`."""
        row, shown = self.row, self._shown
        with self._lock:
            since = monotonic()
            if not self._waits:
                row[_LONGEST_WAIT] = since
                if shown is not None:
                    shown[_LONGEST_WAIT] = since
            self._waits[since] = None
            row[_PENDING] += 1
            # Told at once, a single number and so without the slot's counter: a wait may be a long one.
            if shown is not None:
                shown[_PENDING] = row[_PENDING]
        return since

    def _waited(self, since: float) -> None:
        row, waits = self.row, self._waits
        waits.pop(since, None)
        row[_PENDING] -= 1
        row[_LONGEST_WAIT] = longest = next(iter(waits)) if waits else 0.0
        if (shown := self._shown) is not None:
            shown[_PENDING], shown[_LONGEST_WAIT] = row[_PENDING], longest

    def acquired(
        self,
        since: float,
        key: int,
        attempt: object = None,
        *,
        creating: float = 0.0,
        reused: bool = True,
        holder: object = None,
    ) -> None:
        """Note that a connection came, and is in use from now on.

        Args:
            since: What :meth:`waiting` returned.
            key: Identifies the use, until :meth:`returned`.
            attempt: The attempt that it is used by, if one is known.
            creating: How much of the time went into opening a connection, in seconds.
            reused: Whether the connection was open before.
            holder: What the adapter knows the use by.
        """
        row, now = self.row, monotonic()
        with self._lock:
            self._waited(since)
            if reused:
                row[_REUSED] += 1
            self._add(_WAIT, max(0.0, now - since - creating))
            self._take(key, attempt, now, holder)

    def gave_up(self, since: float, *, timed_out: bool) -> None:
        """Note that none came: in time, or because of an error."""
        row = self.row
        self._creating.pop(threading.get_ident(), None)
        with self._lock:
            self._waited(since)
            if timed_out:
                row[_TIMEOUTS] += 1
                self._add(_WAIT, monotonic() - since)

    def taken(self, key: int, attempt: object = None, holder: object = None) -> None:
        """Note that a connection is in use from now on, where nothing tells of the wait for it."""
        with self._lock:
            self._take(key, attempt, monotonic(), holder)

    def _take(self, key: int, attempt: object, now: float, holder: object) -> None:
        row, uses = self.row, self._uses
        if key in uses:
            del uses[key]
        stack = None if self.leak_after is None else collect()
        uses[key] = (now, attempt, holder, 0 if attempt is None else threading.get_ident(), stack)
        row[_IN_USE] = in_use = len(uses)
        if (shown := self._shown) is not None:
            shown[_IN_USE] = in_use
        if in_use == 1:
            self._oldest(now)

    def returned(self, key: int) -> bool:
        """Note that a connection is not in use any more; return whether it was."""
        now, row, uses = monotonic(), self.row, self._uses
        with self._lock:
            use = uses.pop(key, None)
            if use is None:
                return False
            self._add(_USE, now - use[0])
            row[_IN_USE] = in_use = len(uses)
            if (shown := self._shown) is not None:
                shown[_IN_USE] = in_use
            self._oldest(next(iter(uses.values()))[0] if uses else 0.0)
        return True

    def _oldest(self, since: float) -> None:
        # Since when; who takes a snapshot makes an age of it.
        self.row[_LONGEST_USE] = since
        if self._shown is not None:
            self._shown[_LONGEST_USE] = since

    # Opening and closing.

    def opened(self) -> None:
        """Count a connection that was opened."""
        with self._lock:
            self.row[_OPENED] += 1
            self.row[_OPEN] += 1
        self.publish()

    def created(self, seconds: float) -> None:
        """Count how long it took to open a connection."""
        with self._lock:
            self._add(_CREATE, seconds)

    def creating(self) -> None:
        """Note that the calling thread begins to open a connection, until it calls :meth:`made`."""
        self._creating[threading.get_ident()] = monotonic()

    def made(self) -> None:
        """Note that the calling thread has opened a connection, and count how long it took."""
        thread = threading.get_ident()
        since = self._creating.pop(thread, None)
        if since is not None:
            seconds = monotonic() - since
            self._made[thread] = self._made.get(thread, 0.0) + seconds
            self.created(seconds)

    def took(self) -> float | None:
        """Return how long the calling thread has opened connections since it asked last, in seconds; None for none."""
        return self._made.pop(threading.get_ident(), None) if self._made else None

    def closed(self, reason: str = "", age: float | None = None) -> str:
        """Count a connection that was closed.

        Args:
            reason: Why; one that :meth:`closing` or :meth:`closes` gives wins.
            age: For how long it was open, in seconds; None where that is not known.

        Returns:
            Why, for the record.
        """
        with self._lock:
            why = self._closing or reason or "other"
            self.row[_CLOSED[why]] += 1
            self.row[_OPEN] = max(0.0, self.row[_OPEN] - 1)
            if age is not None:
                self._add(_OPEN_TIME, age, AGES)
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
        with self._lock:
            self.row[_CHECKS] += 1
            if not alive:
                self.row[_FAILED_CHECKS] += 1

    def failed(self, kind: FailureKind) -> None:
        """Count a failure."""
        with self._lock:
            self.row[_FAILED[kind]] += 1

    def count(self, name: str) -> None:
        """Count one more of the counter ``name``."""
        with self._lock:
            self.row[FIRST[definition(name).name]] += 1

    def attempt_ended(self, attempt: object) -> list[Use] | None:
        """Count an attempt that used the resource, publish, and return which connections it left in use, if any.

        Called in the thread of the attempt. What another thread has acquired is that one's, whatever its context says.
        """
        left = None
        with self._lock:
            self.row[_ATTEMPTS] += 1
            if self._uses:
                left = [use for use in self._disowned(attempt, 0.0) if use.thread == threading.get_ident()]
                self.row[_LEAKS] += len(left)
        if self._slot is not None:
            self.publish()
        return left

    def disown(self, attempt: object, since: float) -> None:
        """Note that what was acquired in ``attempt`` from ``since`` on is not the attempt's, but the process's."""
        with self._lock:
            self._disowned(attempt, since)

    def _disowned(self, attempt: object, since: float) -> list[Use]:
        found = {key: use for key, use in self._uses.items() if use[1] is attempt and use[0] >= since}
        # Counted once, and the attempt is not kept by it any longer.
        self._uses.update({key: (use[0], None, *use[2:]) for key, use in found.items()})
        return [Use(*use) for use in found.values()]

    def held_since(self, before: float) -> list[tuple[int, Use]]:
        """Return the uses that go on since before that time, the oldest first, with their keys."""
        with self._lock:
            return [(key, Use(*use)) for key, use in self._uses.items() if use[0] <= before]

    def _add(self, first: int, seconds: float, bounds: tuple[float, ...] = BOUNDS) -> None:
        row = self.row
        row[first + bisect_left(bounds, seconds)] += 1
        row[first + _SUM] += seconds
        if seconds > row[first + _MAX]:
            row[first + _MAX] = seconds

    # Where the numbers are seen.

    def show(self, slot: Slot, place: int) -> None:
        """Publish into ``slot`` from now on, at ``place`` there."""
        with self._lock:
            self._slot, self._shown = slot, slot.row(place)
        self.publish()

    @property
    def is_shown(self) -> bool:
        """Whether it publishes."""
        return self._slot is not None

    def publish(self) -> None:
        """Put the numbers where the parent can read them. Never blocks."""
        if self._slot is not None and self._shown is not None:
            self._slot.publish(self._shown, self.row)

    def snapshot(self) -> tuple[float, ...]:
        """Return the numbers as they are now."""
        with self._lock:
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
