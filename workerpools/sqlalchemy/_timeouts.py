"""The server's own timeout of a statement: which one fits a deadline, and how a server is told.

It is remembered per connection and sent again only when it no longer fits, so that short tasks pay no round trip for
it (PostgreSQL documentation, "statement_timeout"; MariaDB documentation, "max_statement_time"; MySQL Reference
Manual, "max_execution_time").
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

__all__ = ["FLOOR", "GRACE", "POSTGRESQL", "Kind", "ask", "fitting", "looks_back", "send", "send_session", "slack"]

#: What a statement may take when the deadline is over, in seconds: a task that handles its time limit may have to say
#: so in the database.
FLOOR = 1.0

#: How long after the deadline a server that has not ended a statement is taken for unreachable, in seconds: less than
#: the margin by which the deadline comes before Celery's own limit.
GRACE = 0.08


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
    wanted = remaining if remaining > 0.0 else FLOOR
    milliseconds = wanted * 1000
    if 0 < server <= milliseconds:
        return None if current == server else server
    allowed = slack(wanted) * 1000
    if milliseconds - allowed <= current <= milliseconds:
        return None
    return max(1, math.floor(milliseconds - allowed / 2))


def looks_back(statement: str) -> bool:
    """Return whether ``statement`` asks a MySQL server about the one before, so that none may be sent in between."""
    return _LOOKS_BACK.search(statement) is not None


def ask(connection: Any) -> tuple[Kind, int] | None:
    """Ask MySQL or MariaDB which timeout is in force, in milliseconds; costs one round trip.

    Raises:
        Exception: The driver's.
    """
    found = None
    cursor = connection.cursor()
    try:
        cursor.execute(_WHICH_VARIABLE)
        for name, value in cursor.fetchall():
            kind, factor = _VARIABLES[name.lower()]
            found = kind, math.ceil(float(value) * factor)
    finally:
        cursor.close()
    return found


def send(connection: Any, statement: str) -> None:
    """Execute ``statement``, which returns nothing.

    Raises:
        Exception: The driver's.
    """
    cursor = connection.cursor()
    try:
        cursor.execute(statement)
    finally:
        cursor.close()


def send_session(connection: Any, kind: Kind, milliseconds: int) -> None:
    """Tell a server the timeout of a session.

    Raises:
        Exception: The driver's.
    """
    if kind.transaction is None:
        send(connection, kind.session(milliseconds))
        return
    before = connection.autocommit
    # Outside of a transaction, whose end would undo it.
    connection.autocommit = True
    try:
        send(connection, kind.session(milliseconds))
    finally:
        if not connection.closed:
            connection.autocommit = before
