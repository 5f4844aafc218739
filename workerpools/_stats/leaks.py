"""Connections in use for too long, or left in use by an attempt: found, logged with a stack, given back."""

from __future__ import annotations

import logging
import os
import sys
import sysconfig
import threading
import time
import weakref
from pathlib import PurePath
from types import CodeType
from typing import TYPE_CHECKING, Any

from workerpools._run.events import LEAKS, EventKind

if TYPE_CHECKING:
    from collections.abc import Sequence

    from workerpools._pools.resource import Resource
    from workerpools._stats.meter import Use

__all__ = ["BASE", "HeldTooLong", "Stack", "collect", "give_back"]

#: How many calls are kept, from the innermost.
DEPTH = 40

#: Packages between a task's own code and a connection.
_BETWEEN = frozenset(("celery", "httpcore", "httpx", "sqlalchemy", "workerpools"))


class _Base:
    #: Where a task's body is called: what is further out is the same for every task. Set by who calls it.
    code: CodeType | None = None


BASE = _Base()


class Stack:
    """The calls that led to one moment, the innermost first."""

    __slots__ = ("calls",)

    def __init__(self, calls: list[tuple[CodeType, int]]) -> None:
        self.calls = calls

    @property
    def at(self) -> str:
        """The innermost call that is neither a library's nor ours: ``shop/tasks.py:42 in charge``; or empty."""
        for code, line in self.calls:
            if not _is_between(code.co_filename):
                return f"{code.co_filename}:{line} in {code.co_name}"
        return ""

    def __str__(self) -> str:
        # As logging and tracebacks write it, but for the source: that may hold a password.
        lines = [f'  File "{code.co_filename}", line {line}, in {code.co_name}' for code, line in self.calls]
        return "\n".join(["Acquired at (most recent call last):", *reversed(lines)])


def collect() -> Stack:
    """Return the calls that led here, without this one."""
    calls: list[tuple[CodeType, int]] = []
    # Frames are documented as CPython's own; elsewhere there is nothing to tell.
    frame = sys._getframe(1) if hasattr(sys, "_getframe") else None
    base = BASE.code
    while frame is not None and len(calls) < DEPTH and (code := frame.f_code) is not base:
        calls.append((code, frame.f_lineno))
        frame = frame.f_back
    return Stack(calls)


def _is_between(file: str) -> bool:
    if file.startswith("<"):
        return True
    path = PurePath(file)
    if any(part in _BETWEEN or part.removesuffix(".py") in _BETWEEN for part in path.parts):
        return True
    # Where packages are installed lies below the standard library, and is none of it.
    standard = PurePath(sysconfig.get_path("stdlib"))
    return path.is_relative_to(standard) and "site-packages" not in path.parts and "dist-packages" not in path.parts


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


def give_back(resource: Resource[Any], left: Sequence[Use], task: str) -> BaseException | None:
    """Give back what an attempt has left in use, and log each.

    Args:
        resource: Whose connections they are.
        left: The uses, as :meth:`workerpools._stats.meter.Meter.attempt_ended` returned them.
        task: The task's name.

    Returns:
        What interrupted the process meanwhile, if anything did. Nothing else is raised: the attempt's outcome is
        decided already.
    """
    interruption: BaseException | None = None
    for use in left:
        returned, stack = False, use.stack
        try:
            returned = resource.meter.reclaim is not None and resource.meter.reclaim(use.holder)
        except BaseException as error:
            logging.getLogger(LEAKS).debug("a connection of %r was not given back", resource, exc_info=error)
            if not isinstance(error, Exception):
                interruption = error
        resource.registry.listeners.emit(
            EventKind.CONNECTION_LEAKED,
            resource.name,
            stack="" if stack is None else str(stack),
            task=task,
            held=round(time.monotonic() - use.since, 3),
            returned=str(returned).lower(),
            at="(unknown: set workerpools_leak_after)" if stack is None else stack.at,
        )
    resource.meter.publish()
    return interruption
