"""Leaks: connections in use for longer than ``leak_after``, and connections that an attempt left in use."""

from __future__ import annotations

import logging
import os
import threading
import time
import weakref
from collections.abc import Sequence
from typing import NamedTuple

from workerpools._run.events import LEAKS, EventKind, Listeners
from workerpools._stats.meter import Lease, Meter

__all__ = ["LeakDetector", "reclaim"]

logger = logging.getLogger("workerpools")

#: The bounds of the interval between checks, in seconds; it is a quarter of ``leak_after``.
SHORTEST, LONGEST = 0.02, 5.0


class _Watched(NamedTuple):
    resource: str
    meter: weakref.ref[Meter]
    listeners: Listeners


class LeakDetector:
    """Reports each overdue lease once, from its own thread, because a hanging task cannot report itself.

    The thread is started by the first resource with a ``leak_after``.
    """

    def __init__(self) -> None:
        self._reset()

    def _reset(self) -> None:
        self._pid = os.getpid()
        self._lock = threading.Lock()
        # Replaced on every addition, because the thread may be iterating over it.
        self._watched: tuple[_Watched, ...] = ()
        self._reported: weakref.WeakSet[Lease] = weakref.WeakSet()
        self._thread: threading.Thread | None = None

    def watch(self, resource: str, meter: Meter, listeners: Listeners) -> None:
        """Watch the leases of ``meter``, using its ``leak_after``. Called under the resource's lock."""
        if self._pid != os.getpid():
            # The thread does not survive a fork, and the lock may have been held.
            self._reset()
        with self._lock:
            living = tuple(each for each in self._watched if each.meter() not in (None, meter))
            self._watched = (*living, _Watched(resource, weakref.ref(meter), listeners))
            if self._thread is None:
                self._thread = threading.Thread(target=_run, args=(weakref.ref(self),), name="workerpools-leaks")
                self._thread.daemon = True
                self._thread.start()

    def check(self, now: float) -> float:
        """Report overdue leases; return the time until the next check, in seconds.

        Args:
            now: On the clock of :func:`time.monotonic`.
        """
        wait = LONGEST
        for resource, ref, listeners in self._watched:
            meter = ref()
            after = None if meter is None else meter.leak_after
            if meter is None or after is None:
                continue
            wait = min(wait, max(SHORTEST, after / 4))
            for lease in meter.held_since(now - after):
                if lease not in self._reported:
                    self._reported.add(lease)
                    _report(resource, listeners, lease, now - lease.since, after)
        return wait


def _run(ref: weakref.ref[LeakDetector]) -> None:
    while (detector := ref()) is not None:
        try:
            wait = detector.check(time.monotonic())
        except Exception:
            logger.exception("the check for leaked connections failed")
            wait = LONGEST
        # The thread must not keep the detector alive.
        del detector
        time.sleep(wait)


def _report(resource: str, listeners: Listeners, lease: Lease, held: float, after: float) -> None:
    attempt, stack = lease.attempt, lease.stack
    listeners.emit(
        EventKind.CONNECTION_HELD,
        resource,
        stack="" if stack is None else str(stack),
        task="" if attempt is None else attempt.task,
        held=round(held, 3),
        leak_after=after,
        at="" if stack is None else stack.at,
    )


def reclaim(
    resource: str, meter: Meter, listeners: Listeners, left: Sequence[Lease], task: str, *, interrupted: bool
) -> BaseException | None:
    """Return the connections that an attempt left in use to their pool, and report each.

    One that an interruption kept from being returned is not reported: it is nobody's mistake.

    Args:
        resource: The resource's name.
        meter: The resource's meter.
        listeners: The listeners to notify.
        left: The leases, from :meth:`workerpools._stats.meter.Meter.left_by`.
        task: The task's name.
        interrupted: Whether the attempt was interrupted.

    Returns:
        An interruption that arrived meanwhile; None without one. Nothing is raised: the attempt's outcome is decided
        already.
    """
    interruption: BaseException | None = None
    for lease in left:
        returned = failed = False
        waited, since, stack = lease in meter.waiting, lease.since, lease.stack
        try:
            returned = lease.reclaim is not None and lease.reclaim()
        except BaseException as error:
            failed = True
            logging.getLogger(LEAKS).debug("a connection of %r was not returned to its pool", resource, exc_info=error)
            if not isinstance(error, Exception):
                interruption = error
        if waited or not (returned or failed or lease.is_active):
            lease.gave_up()
            lease.returned()
            continue
        if interrupted and not lease.is_active:
            continue
        meter.leaked(lease)
        listeners.emit(
            EventKind.CONNECTION_LEAKED,
            resource,
            stack="" if stack is None else str(stack),
            task=task,
            held=round(time.monotonic() - since, 3),
            returned=str(returned).lower(),
            at="(unknown: set workerpools_leak_after)" if stack is None else stack.at,
        )
    return interruption
