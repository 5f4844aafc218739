"""What a driver's error proves, and what a statement's text says. Pure functions."""

from __future__ import annotations

import re
from typing import Any

from workerpools.adapter import Failure, FailureKind, Phase, Sent

__all__ = ["IDLE", "IN_ERROR", "classify_connect", "classify_lost", "driver_error", "is_lost", "may_end", "status_of"]

#: Statuses of a transaction in libpq, which both drivers show (``PQtransactionStatus``).
IDLE, IN_ERROR, UNKNOWN = 0, 3, 4

_DRIVERS = ("psycopg", "psycopg2", "psycopg_pool")

#: Connect errors carry no SQLSTATE, only the server's message. These are permanent; any other means that the server is
#: unavailable.
_PERMANENT = re.compile(
    r"authentication failed|no password supplied|does not exist|no pg_hba\.conf entry|certificate verify failed"
    r"|root certificate file|server does not support SSL|SSL is required",
    re.IGNORECASE,
)

#: serialization_failure, deadlock_detected, lock_not_available (PostgreSQL documentation, appendix A).
_ABORTED = frozenset(("40001", "40P01", "55P03"))

_BLANK = re.compile(r"(?:\s+|--[^\n]*(?:\n|$)|/\*(?:[^*/]|\*(?!/)|/(?!\*))*\*/)+")
_WORD = re.compile(r"\(*\s*([A-Za-z]*)")
_BACK_TO_SAVEPOINT = re.compile(r"rollback\s+(?:work\s+|transaction\s+)?to\b", re.IGNORECASE)
_ENDS = frozenset(("", "abort", "commit", "end", "prepare", "rollback"))


def may_end(statement: object) -> bool:
    """Return whether a statement may end its transaction: what does not plainly begin as another one may.

    Args:
        statement: One or several statements, with the driver's placeholders. Whatever is not a string may.
    """
    if not isinstance(statement, str):
        return True
    blank = _BLANK.match(statement)
    text = (statement[blank.end() :] if blank else statement).rstrip().rstrip(";")
    if ";" in text:
        return True
    word = _WORD.match(text)
    return word is None or (word[1].lower() in _ENDS and _BACK_TO_SAVEPOINT.match(text) is None)


def status_of(connection: Any) -> int:
    """Return the status of a driver's connection, as the client knows it; takes no round trip."""
    try:
        return int(connection.info.transaction_status)
    except Exception:  # closed, or not a connection of these drivers
        return UNKNOWN


def driver_error(error: BaseException) -> BaseException | None:
    """Return the driver's error, which Django wraps in one of its own; None if it is not a driver's."""
    for each in (error, error.__cause__):
        if each is not None and type(each).__module__.partition(".")[0] in _DRIVERS:
            return each
    return None


def code_of(error: BaseException) -> str:
    """Return the SQLSTATE of a driver's error; empty without one."""
    return str(getattr(error, "sqlstate", None) or getattr(error, "pgcode", None) or "")


def is_lost(error: BaseException, connection: Any) -> bool:
    """Return whether a driver's error means that the connection is lost.

    The server ends a session with FATAL or PANIC (PostgreSQL documentation, "Message Severity Levels"); an
    OperationalError without a SQLSTATE is the driver's own.
    """
    if connection is None or connection.closed:
        return True
    if getattr(getattr(error, "diag", None), "severity_nonlocalized", None) in ("FATAL", "PANIC"):
        return True
    return type(error).__name__ == "OperationalError" and not code_of(error)


def classify_connect(error: BaseException) -> Failure:
    """Classify a failure to connect, or to get a connection from psycopg's pool: nothing was sent.

    Args:
        error: The driver's exception.
    """
    text = str(error)
    if type(error).__name__ in ("PoolTimeout", "TooManyRequests"):
        known = "psycopg's pool had no connection in time"
        return Failure(FailureKind.POOL_EXHAUSTED, Sent.NOTHING, phase=Phase.ACQUIRE, timed_out=True, known=known)
    timed_out = "timeout" in text.lower() or "timed out" in text.lower()
    if _PERMANENT.search(text):
        kind, known = FailureKind.PERMANENT, "the server rejected the credentials, the database or the encryption"
    else:
        kind, known = FailureKind.UNAVAILABLE, "the server cannot be reached or accepts no connections at the moment"
    return Failure(kind, Sent.NOTHING, phase=Phase.CONNECT, code=code_of(error), timed_out=timed_out, known=known)


def classify_lost(error: BaseException, *, lost: bool, phase: Phase, unknown: bool) -> Failure | None:
    """Classify an error of a statement or a COMMIT; None if it is not a connection failure.

    Args:
        error: The driver's exception.
        lost: Whether the connection was lost.
        phase: STATEMENT or COMMIT.
        unknown: Whether a statement whose answer was lost may have been committed.
    """
    code = code_of(error)
    if not lost:
        if code not in _ABORTED:
            return None
        known = f"the server rolled the transaction back ({code})"
        return Failure(FailureKind.ABORTED, Sent.ALL, phase=phase, code=code, known=known)
    if phase is Phase.COMMIT:
        known = "the connection was lost during COMMIT"
        return Failure(FailureKind.INDETERMINATE, Sent.ALL, phase=phase, code=code, known=known)
    if unknown:
        known = "the connection was lost during a statement that may have been committed"
        return Failure(FailureKind.INDETERMINATE, Sent.UNKNOWN, phase=phase, code=code, known=known)
    known = "the connection was lost and the server rolled the transaction back"
    return Failure(FailureKind.STALE, Sent.UNKNOWN, phase=phase, code=code, known=known)
