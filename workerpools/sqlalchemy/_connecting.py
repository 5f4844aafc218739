"""Bounds the opening of a connection: what the driver, SQLAlchemy and this adapter wait for until it can be used.

The drivers' ``connect_timeout`` comes in whole seconds and ends with the log-in. So the watchdog shuts the socket down
at the task's deadline, or at the end of the time for resolving a COMMIT. The questions that follow the log-in, those of
psycopg2 (hstore) and SQLAlchemy (``dialect.initialize``) included, have ``connect_timeout`` in all.
"""

from __future__ import annotations

import itertools
import os
import socket
import threading
from collections.abc import Mapping
from contextlib import suppress
from contextvars import ContextVar
from enum import Enum
from time import monotonic
from typing import Any

import sqlalchemy

from workerpools.adapter import Opening, SocketNumber, Watch, deadline
from workerpools.sqlalchemy._connection import watchdog
from workerpools.sqlalchemy._timeouts import FLOOR, GRACE

__all__ = ["ASKING", "Limit", "begin", "bound_connecting", "end", "ended", "finish", "opened"]

#: The end of the time for resolving a COMMIT, set while a connection is opened only for that: it belongs to no attempt.
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


class _Progress(threading.local):
    """The calling thread's connection in progress."""

    expected: bool = False
    watch: Watch | None = None
    limit: Limit = Limit.CONNECT_TIMEOUT
    ended: Limit | None = None


_progress = _Progress()


def finish() -> None:
    """Stop watching the opening of a connection by the calling thread. Call it before its socket is closed."""
    watch, _progress.watch = _progress.watch, None
    if watch is not None and not watchdog.forget(watch):
        _progress.ended = _progress.limit


def end(limit: Limit) -> None:
    """Note that a limit ended the calling thread's wait for a connection."""
    finish()
    _progress.ended = limit


def ended() -> Limit | None:
    """Return the limit that ended the calling thread's last opening of a connection, once; None if none did."""
    finish()
    limit, _progress.ended = _progress.ended, None
    return limit


def opened(number: Any, connect_timeout: float) -> None:
    """Watch the first questions on a connection that the dialect has not opened: a user's ``creator`` has.

    Args:
        number: Its socket; None if unknown.
        connect_timeout: Time limit of these questions, in seconds.
    """
    if _progress.watch is None and number is not None:
        _watch(number, [*_task_limits(), (monotonic() + connect_timeout, Limit.CONNECT_TIMEOUT)])


def _watch(found: Any, limits: list[tuple[float, Limit]], *, every: float | None = None) -> None:
    if limits:
        at, _progress.limit = min(limits, key=lambda limit: limit[0])
        _progress.watch = watchdog.watch(found, at, every)


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
    _progress.expected = True
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
    if not libpq and dialect.name not in ("mysql", "mariadb"):
        return

    def bounded(*arguments: Any, **parameters: Any) -> Any:
        finish()
        _progress.ended = None
        expected, _progress.expected = _progress.expected, False
        limits, seconds = _task_limits(), _number(parameters, "connect_timeout") or connect_timeout
        user_timeout = mark = None
        if libpq:
            if limits and _USER_TIMEOUT is not None:
                # Tells the new socket from those that other threads are opening.
                user_timeout = int(_number(parameters, "tcp_user_timeout"))
                parameters["tcp_user_timeout"] = mark = (user_timeout or 30_000) + next(_marks) % 1000
        else:
            # Their connect_timeout does not cover the server's greeting.
            limits.append((monotonic() + seconds + GRACE, Limit.CONNECT_TIMEOUT))
        _watch(opening.descriptors.in_progress(mark), limits, every=_EVERY)
        try:
            connection = connect(*arguments, **parameters)
        finally:
            finish()
        found: SocketNumber | None
        if hasattr(connection, "fileno"):
            found = SocketNumber(connection.fileno())
            if mark is not None and user_timeout is not None:
                _set_user_timeout(found, user_timeout)
        else:
            found = opening.descriptors.look(connection)
        # Nobody calls finish() for a connection that a user makes with the dialect itself.
        if found is not None and expected:
            _watch(found, [*_task_limits(), (monotonic() + seconds, Limit.CONNECT_TIMEOUT)])
        return connection

    dialect.connect = bounded


def _set_user_timeout(number: SocketNumber, milliseconds: int) -> None:
    assert _USER_TIMEOUT is not None
    with suppress(OSError), socket.socket(fileno=os.dup(number.fileno())) as duplicate:
        if duplicate.family != socket.AF_UNIX:
            duplicate.setsockopt(socket.IPPROTO_TCP, _USER_TIMEOUT, milliseconds)
