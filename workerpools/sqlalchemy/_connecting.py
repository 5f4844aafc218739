"""Bounds the opening of a connection: what the driver, SQLAlchemy and this adapter wait for until it can be used.

The drivers' ``connect_timeout`` comes in whole seconds and ends with the log-in. So the watchdog shuts the socket down
at the task's deadline, or at the end of the time for resolving a COMMIT. The questions that follow the log-in, those of
psycopg2 (hstore) and SQLAlchemy (``dialect.initialize``) included, have ``connect_timeout`` in all.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import socket
import threading
import weakref
from collections.abc import Mapping
from contextlib import suppress
from contextvars import ContextVar
from enum import Enum
from time import monotonic
from typing import Any

import sqlalchemy

from workerpools.adapter import Opening, SocketNumber, Watch, deadline
from workerpools.sqlalchemy._connection import raw, watchdog
from workerpools.sqlalchemy._driver import named
from workerpools.sqlalchemy._timeouts import FLOOR, GRACE

__all__ = ["ASKING", "Limit", "begin", "bound_connecting", "end", "ended", "finish", "opened"]

#: The end of the time for resolving a COMMIT, set while a connection is opened only for that: it belongs to no attempt.
#: Infinite for other questions of the adapter's own.
ASKING: ContextVar[float | None] = ContextVar("workerpools_asking", default=None)

#: How often the watchdog looks for another socket, in seconds: libpq tries a host's next address after each failure.
_EVERY = 0.05

_USER_TIMEOUT: int | None = getattr(socket, "TCP_USER_TIMEOUT", None)
_marks = itertools.count(1)


class Limit(Enum):
    """The limit that ended the opening of a connection."""

    DEADLINE = "the task's deadline"
    RESOLVING = "resolve_timeout"
    CONNECT_TIMEOUT = "connect_timeout"


class _Progress:
    """The calling thread's connection in progress, or that of the event loop's task."""

    expected: bool = False
    watch: Watch | None = None
    limit: Limit = Limit.CONNECT_TIMEOUT
    ended: Limit | None = None


class _OfThread(threading.local):
    def __init__(self) -> None:
        self.progress = _Progress()


_of_thread = _OfThread()
_of_tasks: weakref.WeakKeyDictionary[Any, _Progress] = weakref.WeakKeyDictionary()


def _own() -> _Progress:
    # In C: every lost connection comes here.
    try:
        task = asyncio.current_task()
    except RuntimeError:
        return _of_thread.progress
    return _of_thread.progress if task is None else _of_tasks.setdefault(task, _Progress())


def finish() -> None:
    """Stop watching the opening of a connection by the calling thread. Call it before its socket is closed."""
    progress = _own()
    watch, progress.watch = progress.watch, None
    if watch is not None and not watchdog.forget(watch):
        progress.ended = progress.limit


def end(limit: Limit) -> None:
    """Note that a limit ended the calling thread's wait for a connection."""
    finish()
    _own().ended = limit


def ended() -> Limit | None:
    """Return the limit that ended the calling thread's last opening of a connection, once; None if none did."""
    progress = _own()
    if progress.watch is not None:
        finish()
    limit, progress.ended = progress.ended, None
    return limit


def opened(number: Any, connect_timeout: float) -> None:
    """Watch the first questions on a connection that the dialect has not opened: a user's ``creator`` has.

    Args:
        number: Its socket; None if unknown.
        connect_timeout: Time limit of these questions, in seconds.
    """
    if _own().watch is None and number is not None:
        _watch(number, [*_task_limits(), (monotonic() + connect_timeout, Limit.CONNECT_TIMEOUT)])


def _watch(found: Any, limits: list[tuple[float, Limit]], *, every: float | None = None) -> None:
    if limits:
        progress = _own()
        at, progress.limit = min(limits, key=lambda limit: limit[0])
        progress.watch = watchdog.watch(found, at, every)


def _task_limits() -> list[tuple[float, Limit]]:
    now, limits = monotonic(), []
    if (at := deadline().at) is not None:
        limits.append(((at if now < at else now + FLOOR) + GRACE, Limit.DEADLINE))
    if (ends := ASKING.get()) is not None:
        limits.append(((ends if now < ends else now + FLOOR) + GRACE, Limit.RESOLVING))
    return limits


def _number(parameters: Mapping[str, Any], name: str) -> float:
    """Return a driver's argument, which is text if it comes from a URL; 0 for none."""
    try:
        return max(0.0, float(parameters.get(name) or 0))
    except (TypeError, ValueError):
        # The driver rejects it.
        return 0.0


def begin() -> float | None:
    """Expect a connection for a pool, until :func:`finish`.

    Returns:
        The time left for it, in seconds; None for no limit.
    """
    _own().expected = True
    limits = _task_limits()
    return min(at for at, _ in limits) - monotonic() if limits else None


def bound_connecting(engine: sqlalchemy.Engine, opening: Opening, connect_timeout: float) -> None:
    """Watch each connection of ``engine`` from its first byte.

    Args:
        engine: The engine; its dialect's ``connect`` is replaced.
        opening: The engine's opening.
        connect_timeout: In seconds, where the driver's arguments have none.
    """
    dialect: Any = engine.dialect
    connect = dialect.connect
    libpq = dialect.driver in ("psycopg2", "psycopg")
    asynchronous = dialect.driver == "asyncpg"
    if not libpq and not asynchronous and dialect.name not in ("mysql", "mariadb"):
        return

    def bounded(*arguments: Any, **parameters: Any) -> Any:
        finish()
        progress = _own()
        progress.ended = None
        expected, progress.expected = progress.expected, False
        given = named(dialect.loaded_dbapi, parameters) if libpq else parameters
        limits, seconds = _task_limits(), _number(given, "connect_timeout") or connect_timeout
        user_timeout = mark = None
        if libpq:
            if limits and _USER_TIMEOUT is not None:
                # Tells the new socket from those that other threads are opening.
                user_timeout = int(_number(given, "tcp_user_timeout"))
                parameters["tcp_user_timeout"] = mark = (user_timeout or 30_000) + next(_marks) % 1000
        elif not asynchronous:
            # Their connect_timeout does not cover the server's greeting.
            limits.append((monotonic() + seconds + GRACE, Limit.CONNECT_TIMEOUT))
        connecting = opening.descriptors.in_progress(mark)
        _watch(connecting, limits, every=_EVERY)
        try:
            connection = connect(*arguments, **parameters)
        except BaseException as error:
            if dialect.is_async and not isinstance(error, Exception):
                # Cancelled: what the driver has begun would live until the garbage is collected.
                _shut_down(connecting.fileno())
            raise
        finally:
            finish()
        found: SocketNumber | None
        if hasattr(raw(connection), "fileno"):
            found = SocketNumber(raw(connection).fileno())
            if mark is not None and user_timeout is not None:
                _set_user_timeout(found, user_timeout)
        else:
            found = opening.descriptors.look(connection)
        # Nobody calls finish() for a connection that a user makes with the dialect itself.
        if found is not None and expected:
            _watch(found, [*_task_limits(), (monotonic() + seconds, Limit.CONNECT_TIMEOUT)])
        return connection

    dialect.connect = bounded


def _shut_down(number: int) -> None:
    with suppress(OSError), socket.socket(fileno=os.dup(number)) as duplicate:
        duplicate.shutdown(socket.SHUT_RDWR)


def _set_user_timeout(number: SocketNumber, milliseconds: int) -> None:
    assert _USER_TIMEOUT is not None
    with suppress(OSError), socket.socket(fileno=os.dup(number.fileno())) as duplicate:
        if duplicate.family != socket.AF_UNIX:
            duplicate.setsockopt(socket.IPPROTO_TCP, _USER_TIMEOUT, milliseconds)
