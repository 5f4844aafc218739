"""Keeps every statement within its task's deadline: a timeout on the server, a watchdog on the socket.

The timeout is remembered per connection and sent again only when it no longer fits, so that short tasks pay no round
trip for it (PostgreSQL documentation, "statement_timeout"; MariaDB documentation, "max_statement_time"; MySQL Reference
Manual, "max_execution_time").
"""

from __future__ import annotations

import logging
import math
import re
import time
import weakref
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any, NamedTuple

from workerpools.adapter import SocketNumber, Watchdog, deadline

__all__ = ["FLOOR", "GRACE", "POSTGRESQL", "Timeouts", "fitting", "slack"]

logger = logging.getLogger("workerpools")

_KIND = "workerpools kind of timeout"
_SERVER = "workerpools server timeout"
_SESSION = "workerpools session timeout"
_LOCAL = "workerpools local timeout"
_WATCHED = "workerpools watched"
_ENDS = "workerpools ends"

#: What a statement may take when the deadline is over, in seconds: a task that handles its time limit may have to say
#: so in the database.
FLOOR = 1.0

#: How long after the deadline a server that has not ended a statement is taken for unreachable, in seconds: less than
#: the margin by which the deadline comes before Celery's own limit.
GRACE = 0.08

_watchdog = Watchdog()


class Kind(NamedTuple):
    """How a server is told its timeout.

    Attributes:
        session: Returns what to send for a session, given milliseconds.
        transaction: The same for a transaction; None where the end of a transaction undoes no setting.
    """

    session: Callable[[int], str]
    transaction: Callable[[int], str] | None = None


POSTGRESQL = Kind(
    lambda milliseconds: f"SET statement_timeout = {milliseconds}",
    lambda milliseconds: f"SET LOCAL statement_timeout = {milliseconds}",
)

#: By the variable: MariaDB's counts in seconds and ends every statement, MySQL's ends a SELECT.
_VARIABLES = {
    "max_statement_time": (Kind(lambda milliseconds: f"SET SESSION max_statement_time = {milliseconds / 1000}"), 1000),
    "max_execution_time": (Kind(lambda milliseconds: f"SET SESSION max_execution_time = {milliseconds}"), 1),
}
_WHICH_VARIABLE = f"SHOW SESSION VARIABLES WHERE Variable_name IN ({', '.join(map(repr, _VARIABLES))})"

#: What a MySQL server answers about the statement before: nothing may be sent in between.
_LOOKS_BACK = re.compile(
    r"row_count\s*\(|found_rows\s*\(|\bshow\s+(?:count|warnings|errors)\b|\bget\b.*\bdiagnostics\b|@@\w*(?:warning|error)_count",
    re.IGNORECASE | re.DOTALL,
)


def slack(seconds: float) -> float:
    """Return by how much a timeout may be shorter than the time that is left, in seconds.

    A twentieth, from 0.05 to 1, so that a connection's timeout serves more tasks than one; half of a short time.
    """
    return min(1.0, max(0.05, seconds / 20), seconds / 2)


def fitting(remaining: float | None, current: int, server: int) -> int | None:
    """Return the timeout to send, in milliseconds; None if the current one fits.

    It fits if it ends a statement at the deadline or a little earlier, and never later: what comes next is Celery's own
    limit, of which a process is killed.

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
    if milliseconds - allowed <= current <= milliseconds:
        return None
    return max(1, math.floor(milliseconds - allowed / 2))


def _wanted(remaining: float) -> float:
    return remaining if remaining > 0.0 else FLOOR


class Timeouts:
    """The timeouts of one engine's connections.

    Args:
        session: Whether a session's settings stay with it; not so behind PgBouncer in transaction mode.
    """

    def __init__(self, *, session: bool) -> None:
        self._session = session
        self._seen: weakref.WeakKeyDictionary[Any, SocketNumber] = weakref.WeakKeyDictionary()

    def see(self, connection: Any, socket: SocketNumber | None) -> None:
        """Note the socket of a connection that has no ``fileno()``; without it the connection is not watched."""
        if socket is not None:
            self._seen[connection] = socket

    def opened(self, info: dict[str, Any], kind: Kind, server: int) -> None:
        """Note what a new connection's server has in force, in milliseconds."""
        info[_KIND] = kind
        info[_SERVER] = info[_SESSION] = server

    def ask(self, connection: Any, info: dict[str, Any]) -> None:
        """Ask a new connection to MySQL or MariaDB what is in force; costs one round trip.

        Raises:
            Exception: The driver's.
        """
        if not self._session:
            return
        cursor = connection.cursor()
        try:
            cursor.execute(_WHICH_VARIABLE)
            for name, value in cursor.fetchall():
                kind, factor = _VARIABLES[name.lower()]
                self.opened(info, kind, math.ceil(float(value) * factor))
        finally:
            cursor.close()

    def at_checkout(self, connection: Any, info: dict[str, Any]) -> bool:
        """Make the session's timeout fit; return whether that took a round trip, which shows that it is alive.

        Raises:
            Exception: The driver's: the connection is dead.
        """
        if not self._session or _SERVER not in info:
            return False
        milliseconds = fitting(deadline().remaining(), info[_SESSION], info[_SERVER])
        if milliseconds is None:
            return False
        with self.watched(connection), _outside_of_transactions(connection, info[_KIND]):
            _send(connection, info[_KIND].session(milliseconds))
        info[_SESSION] = milliseconds
        return True

    def before_statement(self, connection: Any, info: dict[str, Any], statement: str) -> None:
        """Make the timeout fit, and have the socket watched while the statement runs."""
        # What interrupts a statement may leave it watched, and this one may be another task's.
        self.after_statement(info)
        remaining = deadline().remaining()
        if remaining is None or _SERVER not in info:
            return
        current = info.get(_LOCAL, info[_SESSION])
        milliseconds = fitting(remaining, current, info[_SERVER])
        # Before anything is sent: the timeout, too, may never be answered.
        if (socket := self._socket(connection)) is not None:
            info[_WATCHED] = _watch(socket, remaining)
        if milliseconds is not None:
            try:
                _tell(connection, info, milliseconds, statement)
            except Exception as error:
                # The statement that follows fails on the same connection, with an error that the caller can catch.
                logger.debug("setting a timeout failed: %s", type(error).__name__)
        current = info.get(_LOCAL, info[_SESSION])
        info[_ENDS] = time.monotonic() + current / 1000 if current and current != info[_SERVER] else None

    def has_ended(self, info: dict[str, Any]) -> bool:
        """Return whether the timeout that the deadline has set for the last statement is over."""
        ends = info.get(_ENDS)
        return ends is not None and time.monotonic() >= ends

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
        remaining = deadline().remaining()
        socket = self._socket(connection)
        if remaining is None or socket is None:
            yield
            return
        number = _watch(socket, remaining)
        try:
            yield
        finally:
            _watchdog.forget(number)

    def _socket(self, connection: Any) -> Any:
        if hasattr(connection, "fileno"):
            return connection
        # Not of every driver's connection there is a weak reference.
        return self._seen.get(connection) if self._seen else None


def _watch(socket: Any, remaining: float) -> int:
    return _watchdog.watch(socket.fileno(), time.monotonic() + _wanted(remaining) + GRACE)


def _tell(connection: Any, info: dict[str, Any], milliseconds: int, statement: str) -> None:
    kind: Kind = info[_KIND]
    if kind.transaction is None:
        if not _LOOKS_BACK.search(statement):
            _send(connection, kind.session(milliseconds))
            info[_SESSION] = milliseconds
    elif not connection.autocommit:
        _send(connection, kind.transaction(milliseconds))
        info[_LOCAL] = milliseconds


@contextmanager
def _outside_of_transactions(connection: Any, kind: Kind) -> Generator[None, None, None]:
    if kind.transaction is None:
        yield
        return
    before = connection.autocommit
    # The end of a transaction would undo it.
    connection.autocommit = True
    try:
        yield
    finally:
        if not connection.closed:
            connection.autocommit = before


def _send(connection: Any, statement: str) -> None:
    cursor = connection.cursor()
    try:
        cursor.execute(statement)
    finally:
        cursor.close()
