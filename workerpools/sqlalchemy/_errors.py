"""Classification of database errors, by code, text and phase. Pure functions, and the listener that calls them."""

from __future__ import annotations

import asyncio
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from time import monotonic
from typing import Any

import sqlalchemy
from sqlalchemy import event
from sqlalchemy.engine import Connection, ExceptionContext

from workerpools.adapter import Failure, FailureKind, Opening, Phase, Sent, current, deadline
from workerpools.sqlalchemy._connecting import Limit, ended
from workerpools.sqlalchemy._connection import ConnectionState, commits_each_statement, state_of
from workerpools.sqlalchemy._texts import read

__all__ = [
    "COMMIT",
    "COMMIT_OR_IMPLICIT",
    "POOL_EXHAUSTED",
    "classify_connect",
    "classify_statement",
    "classify_unwatched",
    "ends_session",
    "error_code",
    "is_client_side",
    "is_outdated_plan",
    "is_read_only",
    "is_timeout",
    "note_errors",
]

#: COMMIT as text, which fires no commit event; END is PostgreSQL's synonym.
_COMMIT = r"(?:^|;|\*/)\s*(?:commit|end|prepare\s+transaction)\b"
COMMIT = re.compile(_COMMIT, re.IGNORECASE)

#: COMMIT, or an implicit commit of MySQL and MariaDB ("Statements That Cause an Implicit Commit" in both manuals).
COMMIT_OR_IMPLICIT = re.compile(
    rf"{_COMMIT}|(?:^|;|\*/)\s*(?:alter|analyze|begin|cache|change|check"
    r"|create(?!(?:\s+or\s+replace)?\s+temporary\b)|drop(?!\s+temporary\b)|flush|grant|install|load\s+index|lock"
    r"|optimize|rename|repair|reset|revoke|set\s+password|start|stop|truncate|uninstall|unlock)\b",
    re.IGNORECASE,
)

#: SQLAlchemy's ``TimeoutError``.
POOL_EXHAUSTED = Failure(
    FailureKind.POOL_EXHAUSTED,
    Sent.NOTHING,
    phase=Phase.ACQUIRE,
    timed_out=True,
    known="no connection became free in time",
)

#: Connect errors carry no SQLSTATE, only the server's message. These failures are permanent; any other means that the
#: server is unavailable.
_PERMANENT = re.compile(
    r"password authentication failed|no password supplied|authentication failed"
    r"|(?:role|database|user) .* (?:does not exist|is not permitted)"
    r"|no pg_hba\.conf entry|certificate verify failed|root certificate file|server does not support SSL"
    r"|SSL is required|no encryption|no such (?:database|user)|unsupported authentication"
    r"|Access denied for user|Unknown database",
    re.IGNORECASE,
)

#: SQLSTATE 40001, 40P01 and 55P03 (PostgreSQL documentation, appendix A); 1205 and 1213 of MySQL (MySQL Server Error
#: Message Reference); SQLite's result code 5 (SQLITE_BUSY).
_ABORTED = frozenset(("40001", "40P01", "55P03", "1205", "1213", "SQLITE_BUSY"))

#: Read-only after a failover: 25006 of PostgreSQL, 1836 of MySQL. 1290 names the option that forbids a statement, which
#: may be another one (--secure-file-priv).
_READ_ONLY = frozenset(("25006", "1836"))
_READ_ONLY_OPTION = re.compile(r"read.only", re.IGNORECASE)

#: A statement timeout: 57014 of PostgreSQL (also for a cancelled statement), 1969 of MariaDB, 3024 of MySQL.
_TIMEOUT = frozenset(("57014", "1969", "3024"))

#: What is known of a connection that was lost while the driver did something for the user that is not seen.
_UNKNOWN = "the connection was lost past the engine, in an operation that may have committed"

#: The socket's timeout, in PyMySQL's words: the server may be gone or slow.
_NO_ANSWER = re.compile(r"\(timed out\)|\(The (?:read|write) operation timed out\)|TimeoutError\('")

#: A session idle in its transaction for too long: a bug in the task, which would happen again.
_IDLE_IN_TRANSACTION = re.compile(r"idle.in.transaction", re.IGNORECASE)

#: PgBouncer's messages for a missing server connection; it then closes the client connection.
_PGBOUNCER = re.compile(
    r"query_wait_timeout|server login has been failing|cannot connect to server|no more connections allowed"
    r"|server_login_retry|pgbouncer",
    re.IGNORECASE,
)

#: 57P03 cannot_connect_now, 53300 too_many_connections; 1040 and 1203 of MySQL.
_UNAVAILABLE = frozenset(("57P03", "53300", "1040", "1203"))


def error_code(error: BaseException | None) -> str:
    """Return the SQLSTATE of a driver's error, or the driver's own number or name; empty without one."""
    first = error.args[0] if error is not None and error.args else None
    # The MySQL drivers' errors are (number, text). Prefer the number: PyMySQL's SQLSTATE, since 1.2, is the same for
    # most errors (HY000).
    if isinstance(first, int) and not isinstance(first, bool):
        return str(first)
    for name in ("sqlstate", "pgcode", "sqlite_errorname"):
        code = getattr(error, name, None)
        if isinstance(code, str) and code:
            return code
    # Python 3.10's sqlite3 has only the text.
    return "SQLITE_BUSY" if isinstance(first, str) and first.startswith("database is locked") else ""


def is_read_only(error: BaseException, code: str) -> bool:
    """Return whether the server refused a write because it is no longer the primary: the connection is useless."""
    return code in _READ_ONLY or (code == "1290" and _READ_ONLY_OPTION.search(str(error)) is not None)


def is_outdated_plan(error: BaseException, code: str) -> bool:
    """Return whether a prepared statement returns other columns since its table was changed.

    Only a fresh connection, or another statement, is of use. 0A000 (feature_not_supported) has many other causes and
    the message is translated; the server's function is the same in all languages (PostgreSQL, plancache.c).
    """
    if type(error).__name__ == "InvalidCachedStatementError":
        # asyncpg's.
        return True
    found = getattr(getattr(error, "diag", None), "source_function", None)
    return code == "0A000" and found == "RevalidateCachedQuery"


def is_timeout(error: BaseException, code: str) -> bool:
    """Return whether a statement took longer than the server, or the driver's read_timeout, allows."""
    return code in _TIMEOUT or (code in ("2006", "2013") and _NO_ANSWER.search(str(error)) is not None)


def is_client_side(error: BaseException, code: str) -> bool:
    """Return whether a PostgreSQL driver failed without an error from the server: it has lost the connection.

    A server's error has a SQLSTATE. SQLAlchemy inspects the driver's connection and some messages, but misses others,
    such as psycopg 3's "connection socket closed".
    """
    cls = type(error)
    from_driver = cls.__module__.partition(".")[0] in ("psycopg", "psycopg2")
    return from_driver and cls.__name__ == "OperationalError" and not code


def ends_session(error: BaseException) -> bool:
    """Return whether the server ended the session with its error, which a driver may learn of only from the next one.

    The levels are FATAL and PANIC (PostgreSQL documentation, "Message Severity Levels").
    """
    severity = getattr(getattr(error, "diag", None), "severity_nonlocalized", None)
    # SQLAlchemy replaces asyncpg's errors by its own.
    return (severity or getattr(error.__cause__, "severity_en", None)) in ("FATAL", "PANIC")


def classify_connect(error: BaseException, *, resource: str) -> Failure:
    """Classify a failure to connect: nothing was sent.

    Args:
        error: The driver's exception.
        resource: The resource's name.
    """
    text, code = str(error), error_code(error)
    timed_out = "timeout" in text.lower() or "timed out" in text.lower() or isinstance(error, asyncio.TimeoutError)
    if _PERMANENT.search(text) or code in ("28000", "28P01", "3D000", "1044", "1045", "1049"):
        kind, known = FailureKind.PERMANENT, "the server rejected the credentials, the database or the encryption"
    else:
        kind, known = FailureKind.UNAVAILABLE, "the server cannot be reached or accepts no connections at the moment"
    return Failure(kind, Sent.NOTHING, resource, Phase.CONNECT, code, timed_out=timed_out, known=known)


def classify_statement(
    error: BaseException,
    *,
    resource: str,
    phase: Phase,
    disconnected: bool,
    autocommit: bool = False,
    commit_sent: bool = True,
    outcome: str = "",
) -> Failure | None:
    """Classify an error on an open connection; None if it is not a connection failure.

    Args:
        error: The driver's exception.
        resource: The resource's name.
        phase: STATEMENT, COMMIT or ROLLBACK.
        disconnected: Whether the connection was lost.
        autocommit: Whether it was in autocommit.
        commit_sent: In phase COMMIT: whether COMMIT may have been sent.
        outcome: In phase COMMIT: ``aborted`` if the server later reported that; empty if unknown.
    """
    code, text = error_code(error), str(error)
    kind, sent, timed_out = FailureKind.STALE, Sent.ALL, False
    if not disconnected:
        if is_read_only(error, code):
            known = "the server is read-only, as after a failover"
        elif code in _ABORTED:
            kind, known = FailureKind.ABORTED, f"the server rolled the transaction back ({code})"
        elif is_outdated_plan(error, code):
            kind, known = FailureKind.ABORTED, "the table of a prepared statement was changed meanwhile"
        elif code in _UNAVAILABLE:
            kind, known = FailureKind.UNAVAILABLE, "the server accepts no connections at the moment"
        else:
            return None
    elif code in ("25P03",) or _IDLE_IN_TRANSACTION.search(text):
        return None
    elif phase is Phase.COMMIT and commit_sent:
        if outcome == "aborted":
            known = "the connection was lost during COMMIT, and the server reports that it rolled back"
        else:
            kind, known = FailureKind.INDETERMINATE, "the connection was lost during COMMIT"
    elif is_timeout(error, code):
        # As with HTTP: a slow statement would be slow again, and compete with the first one's locks.
        kind, timed_out = FailureKind.INDETERMINATE, True
        known = "the driver's read_timeout expired before the server replied"
    elif phase is Phase.STATEMENT and _PGBOUNCER.search(text):
        kind, sent, known = FailureKind.UNAVAILABLE, Sent.NOTHING, "PgBouncer has no server connection available"
    elif autocommit:
        kind, sent = FailureKind.INDETERMINATE, Sent.UNKNOWN
        known = "the connection was lost during a statement in autocommit"
    else:
        sent, known = Sent.UNKNOWN, "the connection was lost and the server rolled the transaction back"
    return Failure(kind, sent, resource, phase, code, timed_out=timed_out, known=known)


def classify_unwatched(error: Any) -> Failure | None:
    """Classify a ``sqlalchemy.exc.DBAPIError`` of an engine that is not ours; None if it is not a connection failure.

    The phase is unknown, so a lost connection leaves the outcome open.

    Args:
        error: The exception.
    """
    original = error.orig
    if original is None:
        return None
    if error.statement is None and not error.connection_invalidated and not error_code(original):
        return classify_connect(original, resource="")
    found = classify_statement(
        original, resource="", phase=Phase.STATEMENT, disconnected=bool(error.connection_invalidated), autocommit=True
    )
    if found is not None and error.statement is None and found.kind is FailureKind.INDETERMINATE:
        return Failure(found.kind, found.sent, "", Phase.COMMIT, found.code, known=found.known)
    return found


#: A new exception has no notes yet, so the built-in method suffices where it exists.
if sys.version_info >= (3, 11):
    _note = BaseException.add_note
else:
    from workerpools.adapter import add_note as _note


def note_errors(
    engine: sqlalchemy.Engine,
    opening: Opening,
    *,
    recycle: Callable[[], object],
    nested: Callable[[BaseException, str, ConnectionState | None], bool] | None = None,
) -> Callable[[ConnectionState, BaseException, Any, Phase | None], None]:
    """Classify each error of ``engine`` and report it to ``opening``.

    Args:
        engine: The engine.
        opening: Its opening.
        recycle: Replaces all of its connections: idle ones now, the others on checkin.
        nested: Called with an error of a nested task, its code and its connection; returns whether it has reported it.

    Returns:
        The function that does so for errors raised past the engine: see :attr:`Flights.failed`.
    """
    resource = opening.resource
    phase_of: Callable[[str], Phase] = _phase if engine.dialect.name == "postgresql" else _phase_by_pattern
    if engine.dialect.name in ("mysql", "mariadb"):
        phase_of = partial(_phase_by_pattern, commits=COMMIT_OR_IMPLICIT)

    if engine.dialect.driver == "asyncpg":
        _note_connecting(engine.dialect, opening)

    @event.listens_for(engine, "handle_error")
    def failed(context: ExceptionContext) -> None:
        error, original, connection = context.sqlalchemy_exception, context.original_exception, context.connection
        if context.is_pre_ping and error is not None:
            opening.replaced("stale")
        state = None if connection is None else state_of(connection)
        if state is not None:
            state.waited()
        if error is None or context.is_pre_ping:
            # Not a driver's error: a time limit, the end of a greenlet, or invalid parameters.
            return
        limit = ended() if connection is None or state is None else None
        if connection is None or limit is not None:
            opening.descriptors.gave_up()
            _note(error, f"workerpools: connecting for the resource {resource!r}")
            _connecting_failed(error, original, limit, opening)
            return
        code = error_code(original)
        if is_outdated_plan(original, code):
            # The other connections have prepared the same statements.
            recycle()
        read_only = is_read_only(original, code)
        if read_only and _chose_read_only(connection):
            opening.failed(error, None, phase=Phase.STATEMENT)
            return
        if read_only or is_client_side(original, code) or ends_session(original):
            # Either the server is no longer the primary, although pings of this connection would succeed, or the driver
            # lost the connection in a way that SQLAlchemy does not recognise.
            context.is_disconnect = True
        if context.is_disconnect:
            _note(error, f"workerpools: a connection of the resource {resource!r} was lost")
        text = context.statement
        if text is None:
            phase = Phase.STATEMENT if state is None else state.phase
        else:
            phase = phase_of(text)
        lost_commit = context.is_disconnect and phase is Phase.COMMIT
        if ended_by_others(error, original, code, state, phase, lost_commit):
            return
        commit = None if state is None or text is not None or phase is not Phase.COMMIT else state.commit
        failure = classify_statement(
            original,
            resource=resource,
            phase=phase,
            disconnected=context.is_disconnect and not read_only,
            autocommit=phase is Phase.STATEMENT
            and (_in_autocommit(connection) if state is None or state.flights is None else state.alone),
            commit_sent=commit is None or commit.sent,
            outcome="" if commit is None else commit.outcome,
        )
        if commit is not None and commit.xid and not commit.outcome:
            _note(
                error,
                f"workerpools: could not find out in time whether transaction {commit.xid} was committed; "
                f"ask the database: SELECT pg_xact_status('{commit.xid}')",
            )
        opening.failed(error, failure, phase=phase)

    def ended_by_others(
        error: BaseException,
        original: BaseException,
        code: str,
        state: ConnectionState | None,
        phase: Phase,
        lost_commit: bool,
    ) -> bool:
        """Report that an enclosing task or the deadline ended a statement, if so."""
        attempt = current()
        if nested is not None and attempt is not None and attempt.parent is not None and nested(error, code, state):
            return True
        # A statement that lasts may be continued in a thread that belongs to no attempt.
        at = (deadline() if state is None or state.lasting is None else state.lasting).at
        if at is None or lost_commit:
            return False
        if not ((state is not None and state.shut_down) or _timed_out(original, code, state, at)):
            return False
        _note(error, f"workerpools: the task's deadline ended a statement of the resource {resource!r}")
        opening.failed(error, None, phase=phase, deadline=True)
        return True

    def failed_unseen(state: ConnectionState, error: BaseException, connection: Any, phase: Phase | None) -> None:
        dialect: Any = engine.dialect
        if not isinstance(error, dialect.loaded_dbapi.Error) or type(error).__name__.startswith("_"):
            # Not a driver's, or one that the driver does not show its users: the end of a wait with a timeout.
            return
        if state.born is None:
            # Nobody has been given the connection: its errors are those of connecting.
            return
        code = error_code(error)
        chosen = is_read_only(error, code) and dialect.get_readonly(connection) is True
        if is_outdated_plan(error, code) or (is_read_only(error, code) and not chosen):
            # A connection to a server that is no longer the primary is of no use, either.
            recycle()
        lost = is_client_side(error, code) or ends_session(error) or dialect.is_disconnect(error, connection, None)
        if phase is Phase.STATEMENT and state.text.may_end:
            phase = Phase.COMMIT
        unknown, lost_commit = phase is None, lost and phase is Phase.COMMIT
        if lost_commit or (lost and unknown):
            opening.effect(f"COMMIT by {resource!r}")
        phase = phase or Phase.STATEMENT
        if ended_by_others(error, error, code, state, phase, lost_commit):
            return
        failure: Failure | None
        if lost and unknown:
            failure = Failure(FailureKind.INDETERMINATE, Sent.UNKNOWN, code=code, known=_UNKNOWN)
        elif chosen:
            failure = None
        else:
            alone = phase is Phase.STATEMENT and state.alone
            failure = classify_statement(error, resource=resource, phase=phase, disconnected=lost, autocommit=alone)
        opening.failed(error, failure, phase=phase)

    return failed_unseen


def _note_connecting(dialect: Any, opening: Opening) -> None:
    """Have a driver report the errors of connecting that SQLAlchemy does not take for its own."""
    connect = dialect.connect

    def noted(*arguments: Any, **parameters: Any) -> Any:
        try:
            return connect(*arguments, **parameters)
        except (OSError, asyncio.TimeoutError) as error:
            limit = ended()
            opening.descriptors.gave_up()
            _note(error, f"workerpools: connecting for the resource {opening.resource!r}")
            _connecting_failed(error, error, limit, opening)
            raise

    dialect.connect = noted


def _connecting_failed(error: BaseException, original: BaseException, limit: Limit | None, opening: Opening) -> None:
    failure = classify_connect(original, resource=opening.resource)
    attempt = current()
    at = None if attempt is None else attempt.deadline.at
    if limit is None and failure.timed_out and at is not None and monotonic() >= at:
        # The driver's connect_timeout, which is shortened to what remains.
        limit = Limit.DEADLINE
    if limit is Limit.DEADLINE:
        _note(error, f"workerpools: the task's deadline ended connecting for the resource {opening.resource!r}")
        opening.failed(error, None, phase=Phase.CONNECT, deadline=True)
        return
    if limit is not None:
        _note(error, f"workerpools: {limit.value} ended connecting for the resource {opening.resource!r}")
        failure = replace(failure, timed_out=True)
    opening.failed(error, failure)


def _timed_out(error: BaseException, code: str, state: ConnectionState | None, at: float) -> bool:
    # The user's own timeout may have been shorter. A COMMIT that timed out in the driver may have succeeded.
    return is_timeout(error, code) and (monotonic() >= at or (state is not None and state.has_timed_out))


def _chose_read_only(connection: Connection) -> bool:
    # ``postgresql_readonly``, which another connection would not have: every server refuses the write.
    dialect: Any = connection.dialect
    try:
        return dialect.get_readonly(connection.connection.dbapi_connection) is True
    except Exception:  # another dialect, or the connection is already gone
        return False


def _phase(statement: str) -> Phase:
    """Return the phase in which a statement of PostgreSQL was lost, by its text."""
    text = read(statement)
    return Phase.COMMIT if text.may_end else Phase.ROLLBACK if text.undoes else Phase.STATEMENT


def _phase_by_pattern(statement: str, commits: re.Pattern[str] = COMMIT) -> Phase:
    if commits.search(statement):
        return Phase.COMMIT
    return Phase.ROLLBACK if statement.lstrip()[:8].upper() == "ROLLBACK" else Phase.STATEMENT


def _in_autocommit(connection: Connection) -> bool:
    try:
        return commits_each_statement(connection.connection.dbapi_connection)
    except Exception:  # the connection is already gone: assume the worse
        return True
