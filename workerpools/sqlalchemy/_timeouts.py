"""The server's statement timeout: its value for a deadline, and how to set it.

It is remembered per connection and set again only when it no longer fits, so that short tasks need no extra round trip
(PostgreSQL documentation, "statement_timeout"; MariaDB documentation, "max_statement_time"; MySQL Reference Manual,
"max_execution_time").
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

__all__ = [
    "FLOOR",
    "GRACE",
    "POSTGRESQL",
    "Kind",
    "ask",
    "fitting",
    "looks_back",
    "send",
    "send_outside",
    "send_session",
    "slack",
]

#: How long a statement may take after the deadline, in seconds: a task that handles its time limit may have to record
#: that in the database.
FLOOR = 1.0

#: How long after the deadline a server that has not ended a statement counts as unreachable, in seconds: less than the
#: deadline's margin before Celery's own limit.
GRACE = 0.08


class Kind(NamedTuple):
    """The statements that set a server's timeout.

    Attributes:
        session: Returns the statement for a session, given milliseconds.
        transaction: Returns the statement for a transaction; None where settings outlast a transaction.
    """

    session: Callable[[int], str]
    transaction: Callable[[int], str] | None = None


POSTGRESQL = Kind(
    lambda milliseconds: f"SET statement_timeout = {milliseconds}",
    lambda milliseconds: f"SET LOCAL statement_timeout = {milliseconds}",
)

#: By variable: MariaDB's is in seconds and applies to every statement, MySQL's applies to SELECT.
_VARIABLES = {
    "max_statement_time": (Kind(lambda milliseconds: f"SET SESSION max_statement_time = {milliseconds / 1000}"), 1000),
    "max_execution_time": (Kind(lambda milliseconds: f"SET SESSION max_execution_time = {milliseconds}"), 1),
}
_WHICH_VARIABLE = f"SHOW SESSION VARIABLES WHERE Variable_name IN ({', '.join(map(repr, _VARIABLES))})"

#: Questions to a MySQL server about the previous statement: nothing may be sent in between.
_LOOKS_BACK = re.compile(
    r"row_count\s*\(|found_rows\s*\(|\bshow\s+(?:count|warnings|errors)\b|\bget\b.*\bdiagnostics\b|@@\w*(?:warning|error)_count",
    re.IGNORECASE | re.DOTALL,
)


def slack(seconds: float) -> float:
    """Return how much shorter than the remaining time a timeout may be, in seconds.

    A twentieth, between 0.05 and 1, so that a connection's timeout serves several tasks; half of a short time.
    """
    return min(1.0, max(0.05, seconds / 20), seconds / 2)


def fitting(remaining: float | None, current: int, server: int) -> int | None:
    """Return the timeout to send, in milliseconds; None if the current one fits.

    It fits if it ends a statement at the deadline or slightly earlier, but never later: Celery's own limit comes next,
    and kills the process.

    Args:
        remaining: The time until the deadline, in seconds; None without one.
        current: The timeout in force, in milliseconds; 0 for none.
        server: The timeout in force when the connection was opened, from the role's or the user's settings, in
            milliseconds.
    """
    if remaining is None:
        return None if current == server else server
    wanted = remaining if remaining > 0.0 else FLOOR
    milliseconds = wanted * 1000
    if 0 < server <= milliseconds:
        return None if current == server else server
    # slack(wanted), without the call: every transaction under a deadline comes here.
    allowed = min(1.0, max(0.05, wanted / 20), wanted / 2) * 1000
    if milliseconds - allowed <= current <= milliseconds:
        return None
    return max(1, math.floor(milliseconds - allowed / 2))


def looks_back(statement: str) -> bool:
    """Return whether ``statement`` asks a MySQL server about the previous one, so that none may be sent in between."""
    return _LOOKS_BACK.search(statement) is not None


def ask(connection: Any) -> tuple[Kind, int] | None:
    """Ask MySQL or MariaDB for the timeout in force, in milliseconds; takes one round trip.

    Raises:
        Exception: Any error of the driver.
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
    """Execute a ``statement`` that returns no rows.

    Raises:
        Exception: Any error of the driver.
    """
    plain = getattr(connection, "plain", None)
    if plain is not None:
        plain(statement)
        return
    cursor = connection.cursor()
    try:
        cursor.execute(statement)
    finally:
        cursor.close()


def send_session(connection: Any, kind: Kind, milliseconds: int) -> None:
    """Set the timeout of a session, in milliseconds.

    Raises:
        Exception: Any error of the driver.
    """
    if kind.transaction is None:
        send(connection, kind.session(milliseconds))
        return
    send_outside(connection, kind.session(milliseconds))


def send_outside(connection: Any, statements: str) -> None:
    """Execute statements of PostgreSQL outside a transaction, whose end might undo them.

    Raises:
        Exception: Any error of the driver.
    """
    before = connection.autocommit
    connection.autocommit = True
    try:
        send(connection, statements)
    finally:
        if not connection.closed:
            connection.autocommit = before
