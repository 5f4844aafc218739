"""The complete adapter interface: the protocol to implement, and the objects to report to.

An adapter integrates one client library. The built-in ones for httpx and SQLAlchemy use no other part of the project.
Subclass :class:`Adapter`, open the client in :meth:`Adapter.open`, and pass the :class:`Opening` to the code that
observes the client::

    class Memcached(Adapter[Client]):
        kind = "cache"
        libraries = ("pymemcache",)

        def open(self, opening: Opening) -> Client: ...
        def close(self, value: Client, timeout: float) -> None: ...

===============  =====================================  ==================================  =======================
method           called                                 in the process                      in the thread
===============  =====================================  ==================================  =======================
``prepare``      before the fork, once per worker       a worker's main process             its main thread
``open``         on first use, once per process         each that uses the resource         the task's
``discard``      right after a fork                     a child, for its parent's value      its only one
``recycle``      at the next use after a request        each that has a value               the task's
``attached``     after ``on_open``, and once replaced   each that has a value               the task's
``classify``     after an attempt failed                each                                the task's
``close``        at shutdown, or once replaced          each that has a value               one of its own
``capacity``     when statistics are asked for          a worker's main process             any
``limits``       by ``celery pools budget``             one that runs no tasks              one of its own
``describe``     for messages                           any                                 any
===============  =====================================  ==================================  =======================

A value reports through its :class:`Opening`:

- **Connections** (:meth:`Opening.connected`, :meth:`Opening.disconnected`): a forked child discards their sockets.
- **Leases** (:meth:`Opening.wait`, :class:`Lease`): waiting, then acquired and returned, or given up. All statistics
  of use, waits and leaks derive from them.
- **Failures** (:meth:`Opening.failed`): the meaning of an exception, on which replay and retry depend.
- **Effects** (:meth:`Opening.effect`): irreversible actions, which forbid a replay.
- **The deadline** (:func:`deadline`): no wait may extend past it.
- **Attempt-scoped objects** (:func:`scoped`, :class:`Scoped`): committed when the body returns, rolled back on every
  other exit, and released in both cases.

Durations are floats in seconds; points in time are on the clock of :func:`time.monotonic`. Adapters of other
distributions are found through the entry-point group ``workerpools.adapters``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from workerpools._pools.adapter import Adapter, Opening
from workerpools._pools.factory import Factory, FunctionAdapter
from workerpools._pools.lifetime import Due, Lifetime, due
from workerpools._pools.limits import Limit
from workerpools._pools.resource import Overridable, Resource
from workerpools._pools.settings import Setting
from workerpools._pools.shared import UNKNOWN, ExecutionPool
from workerpools._process.descriptors import Descriptors, SocketNumber
from workerpools._process.event_loop import is_here as on_loop
from workerpools._process.event_loop import is_running as loop_is_running
from workerpools._process.event_loop import start as start_coroutine
from workerpools._process.flows import flow
from workerpools._process.greenlets import library as greenlet_library
from workerpools._process.greenlets import time_limit as greenlet_time_limit
from workerpools._process.watchdog import Watch, Watchdog
from workerpools._run.attempts import Attempt, Effect, Scoped, concerned, current, deadline, note_effect, require
from workerpools._run.coroutines import run as run_coroutine
from workerpools._run.deadline import Deadline
from workerpools._run.failure import Failure, FailureKind, Phase, Sent, causes, noted_of, retry_after
from workerpools._run.on_commit import on_commit
from workerpools._sql_limits import sql_limits
from workerpools._stats.meter import Lease
from workerpools._text import add_note, explained, meant, redact_url, refusal
from workerpools._values import WEEK, YEAR, seconds, whole

__all__ = [
    "UNKNOWN",
    "WEEK",
    "YEAR",
    "Adapter",
    "Attempt",
    "Deadline",
    "Descriptors",
    "Due",
    "Effect",
    "ExecutionPool",
    "Factory",
    "Failure",
    "FailureKind",
    "FunctionAdapter",
    "Lease",
    "Lifetime",
    "Limit",
    "Opening",
    "Overridable",
    "Phase",
    "Resource",
    "Scoped",
    "Sent",
    "Setting",
    "SocketNumber",
    "Watch",
    "Watchdog",
    "add_note",
    "causes",
    "current",
    "deadline",
    "due",
    "explained",
    "failure_of",
    "flow",
    "greenlet_library",
    "greenlet_time_limit",
    "in_attempt",
    "kept_key",
    "loop_is_running",
    "meant",
    "note_effect",
    "on_commit",
    "on_loop",
    "redact_url",
    "refusal",
    "require",
    "retry_after",
    "run_coroutine",
    "scoped",
    "seconds",
    "sql_limits",
    "start_coroutine",
    "whole",
]

S = TypeVar("S")


def failure_of(error: BaseException) -> Failure | None:
    """Return the failure that :meth:`Opening.failed` recorded for this exception; None if there is none.

    Args:
        error: The exception itself; its causes are not searched.
    """
    noted = noted_of(error)
    return None if noted is None else noted.failure


def in_attempt() -> bool:
    """Return whether the calling code may belong to an attempt.

    In a thread without an attempt of its own, True while any attempt of the process runs: it may have started the
    thread.
    """
    return current() is not None or bool(concerned())


def kept_key(place: str, content: bytes | None, key: str) -> str | None:
    """Return the idempotency key to send a request with, so that a replay sends the same request under the same key.

    Args:
        place: The request's method and URL.
        content: Its content; None if it is not known before it is sent.
        key: The key that it was given.

    Returns:
        The key. None if nothing makes sure that a replay would send this request under it: then it is an effect.
    """
    attempt = current()
    if attempt is None:
        derived = [each for each in concerned() if each.delivery is not None and key in each.delivery.keys.derived]
        return key if derived or not concerned() else None
    if attempt.delivery is None:
        return key
    # A nested task is another one each time that the task around it runs.
    return attempt.delivery.keys.keep(place, content, key) if attempt.parent is None else None


def scoped(key: object, make: Callable[[], S], what: str, instead: str = "") -> S:
    """Return the attempt-scoped object for ``key``, created on first use in the attempt of the calling context.

    Args:
        key: Identifies the object within the attempt.
        make: Creates the object, which has the methods of :class:`Scoped`.
        what: The name of the object, for the error message.
        instead: The alternative outside an attempt, for the error message.

    Returns:
        The object; the attempt commits or rolls it back, and releases it at its end.

    Raises:
        NoAttemptError: No attempt runs in the calling context.
    """
    attempt = current() or require(what, instead)
    found: S | None = attempt.scoped.get(key)
    if found is None:
        found = attempt.scoped[key] = make()
    return found
