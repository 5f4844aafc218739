"""Keeps every statement within its task's deadline: ``statement_timeout`` on the server, a watchdog on the socket.

The timeout is remembered per connection and sent again only when it no longer fits, so that short tasks pay no round
trip for it (PostgreSQL documentation, "statement_timeout").
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

from workerpools._core import scope
from workerpools._core.watchdog import Watchdog

__all__ = ["FLOOR", "GRACE", "Timeouts", "fitting"]

logger = logging.getLogger("workerpools")

_SERVER = "workerpools server timeout"
_SESSION = "workerpools session timeout"
_LOCAL = "workerpools local timeout"
_WATCHED = "workerpools watched"

#: What a statement may take when the deadline is over, in seconds: a task that handles its time limit may have to say
#: so in the database.
FLOOR = 1.0

#: How long after its time a server that has not ended a statement is taken for unreachable, in seconds.
GRACE = 0.3

_watchdog = Watchdog()


def slack(seconds: float) -> float:
    """Return by how much a timeout may exceed the time that is left, in seconds: a tenth, from 0.05 to 1."""
    return min(1.0, max(0.05, seconds / 10))


def fitting(remaining: float | None, current: int, server: int) -> int | None:
    """Return the timeout to send, in milliseconds; None if the current one fits.

    It fits if it ends a statement at the deadline or a little later, and never earlier.

    Args:
        remaining: Until the deadline, in seconds; None without one.
        current: What is in force, in milliseconds; 0 is none.
        server: What was in force when the connection was opened, by the role's or the user's own settings.
    """
    if remaining is None:
        return None if current == server else server
    wanted = _wanted(remaining)
    milliseconds = wanted * 1000
    if 0 < server <= milliseconds:
        return None if current == server else server
    allowed = slack(wanted) * 1000
    if milliseconds <= current <= milliseconds + allowed:
        return None
    return math.ceil(milliseconds + allowed / 2)


def _wanted(remaining: float) -> float:
    return remaining if remaining > 0.0 else FLOOR


class Timeouts:
    """The timeouts of one engine's connections.

    Args:
        session: Whether a session's settings stay with it; not so behind PgBouncer in transaction mode.
    """

    def __init__(self, *, session: bool) -> None:
        self._session = session

    def opened(self, info: dict[str, Any], server: int) -> None:
        """Note what a new connection's server has in force, in milliseconds."""
        info[_SERVER] = info[_SESSION] = server

    def at_checkout(self, connection: Any, info: dict[str, Any]) -> bool:
        """Make the session's timeout fit; return whether that took a round trip, which shows that it is alive.

        Raises:
            Exception: The driver's: the connection is dead.
        """
        if not self._session or _SERVER not in info:
            return False
        milliseconds = fitting(scope.deadline().remaining(), info[_SESSION], info[_SERVER])
        if milliseconds is None:
            return False
        before = connection.autocommit
        # Outside of a transaction, whose end would undo it.
        connection.autocommit = True
        try:
            with self.watched(connection):
                _send(connection, f"SET statement_timeout = {milliseconds}")
        finally:
            if not connection.closed:
                connection.autocommit = before
        info[_SESSION] = milliseconds
        return True

    def before_statement(self, connection: Any, info: dict[str, Any]) -> None:
        """Make the transaction's timeout fit, and have the socket watched while the statement runs."""
        remaining = scope.deadline().remaining()
        if remaining is None or _SERVER not in info:
            return
        current = info.get(_LOCAL, info[_SESSION])
        milliseconds = fitting(remaining, current, info[_SERVER])
        if milliseconds is not None and not connection.autocommit:
            try:
                _send(connection, f"SET LOCAL statement_timeout = {milliseconds}")
                info[_LOCAL] = milliseconds
            except Exception as error:
                # The statement that follows fails on the same connection, with an error that the caller can catch.
                logger.debug("setting a timeout failed: %s", type(error).__name__)
        self.after_statement(info)
        info[_WATCHED] = _watch(connection, remaining)

    def after_statement(self, info: dict[str, Any]) -> bool:
        """Stop watching the socket; return whether it was shut down."""
        number = info.pop(_WATCHED, None)
        return number is not None and not _watchdog.forget(number)

    def transaction_ends(self, info: dict[str, Any]) -> None:
        """Note that a timeout of the transaction is in force no longer."""
        info.pop(_LOCAL, None)

    @contextmanager
    def watched(self, connection: Any) -> Generator[None, None, None]:
        """Have the socket watched while something else waits for the server."""
        remaining = scope.deadline().remaining()
        if remaining is None or not hasattr(connection, "fileno"):
            yield
            return
        number = _watch(connection, remaining)
        try:
            yield
        finally:
            _watchdog.forget(number)


def _watch(connection: Any, remaining: float) -> int:
    return _watchdog.watch(
        connection.fileno(), time.monotonic() + _wanted(remaining) + slack(_wanted(remaining)) + GRACE
    )


def _send(connection: Any, statement: str) -> None:
    cursor = connection.cursor()
    try:
        cursor.execute(statement)
    finally:
        cursor.close()
