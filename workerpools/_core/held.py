"""Tells of connections that are in use for too long, with where they were acquired: once for each use."""

from __future__ import annotations

import logging
import os
import threading
import time
import weakref
from typing import TYPE_CHECKING, Any

from workerpools._core.events import EventKind

if TYPE_CHECKING:
    from workerpools._core.resource import Resource
    from workerpools._core.stacks import Stack

__all__ = ["HeldTooLong"]

logger = logging.getLogger("workerpools")

#: How often it is looked, in seconds; a quarter of ``leak_after`` within these bounds.
SHORTEST, LONGEST = 0.02, 5.0


class HeldTooLong:
    """Looks at the uses of some resources, in a thread that starts with the first of them: who hangs tells nothing."""

    def __init__(self) -> None:
        self._reset()

    def _reset(self) -> None:
        self._pid = os.getpid()
        self._lock = threading.Lock()
        # Made anew by each addition: the thread may be going through the one before.
        self._resources: tuple[weakref.ref[Resource[Any]], ...] = ()
        self._told: dict[tuple[str, int, float], None] = {}
        self._thread: threading.Thread | None = None

    def watch(self, resource: Resource[Any]) -> None:
        """Look at ``resource``, whose meter knows its ``leak_after``, from now on. Called under the resource's lock."""
        if self._pid != os.getpid():
            # The thread did not come along in the fork, and the lock may have been held.
            self._reset()
        with self._lock:
            if not any(ref() is resource for ref in self._resources):
                self._resources = (*self._resources, weakref.ref(resource))
            if self._thread is None:
                self._thread = threading.Thread(target=_run, args=(weakref.ref(self),), name="workerpools-leaks")
                self._thread.daemon = True
                self._thread.start()

    def look(self, now: float) -> float:
        """Tell of what is held too long; return when to look again, in seconds.

        Args:
            now: On the clock of :func:`time.monotonic`.
        """
        wait, over = LONGEST, dict[tuple[str, int, float], None]()
        for ref in self._resources:
            resource = ref()
            after = None if resource is None else resource.meter.leak_after
            if resource is None or after is None:
                continue
            wait = min(wait, max(SHORTEST, after / 4))
            for key, use in resource.meter.held_since(now - after):
                over[mark := (resource.name, key, use.since)] = None
                if mark not in self._told:
                    _tell(resource, now - use.since, after, use.attempt, use.stack)
        self._told = over
        return wait


def _run(ref: weakref.ref[HeldTooLong]) -> None:
    while (held := ref()) is not None:
        try:
            wait = held.look(time.monotonic())
        except Exception:
            logger.exception("could not look for connections that are held too long")
            wait = LONGEST
        # Not kept alive by its thread.
        del held
        time.sleep(wait)


def _tell(resource: Resource[Any], held: float, after: float, attempt: Any, stack: Stack | None) -> None:
    task = getattr(getattr(attempt, "allowance", None), "task", "")
    resource.registry.listeners.emit(
        EventKind.CONNECTION_HELD,
        resource.name,
        stack="" if stack is None else str(stack),
        task=task,
        held=round(held, 3),
        leak_after=after,
        at="" if stack is None else stack.at,
    )
