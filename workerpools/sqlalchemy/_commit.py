"""Sends COMMIT, tracks whether it may have been applied, and asks PostgreSQL if the acknowledgement was lost.

The transaction's id is noted before COMMIT; after a loss, a fresh connection queries ``pg_xact_status`` (PostgreSQL
documentation, "Transaction ID and Snapshot Information Functions"; version 13 and later).
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, NamedTuple

import sqlalchemy
from sqlalchemy.exc import PendingRollbackError

from workerpools.adapter import FailureKind, Opening, Phase, current, deadline
from workerpools.sqlalchemy._connection import (
    IDLE,
    IN_ERROR,
    KEY,
    CommitState,
    ConnectionState,
    History,
    commits_each_statement,
    watched,
)
from workerpools.sqlalchemy._errors import classify_connect, error_code
from workerpools.sqlalchemy._timeouts import POSTGRESQL

__all__ = ["ASKING", "introduce", "resolve_commits"]

logger = logging.getLogger("workerpools")

#: How long a transaction in progress may take to end by itself, in seconds. Then its session is terminated: it is ours,
#: and nothing reads its reply.
GRACE = 1.0

_NOTE = "SELECT pg_current_xact_id_if_assigned()::text, pg_backend_pid()"
_STATUS = "SELECT pg_xact_status(CAST(CAST(%(xid)s AS text) AS xid8))"
_END = (
    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
    " WHERE pid = %(pid)s AND backend_xid = xid(CAST(CAST(%(xid)s AS text) AS xid8))"
)
# The first eight digits of a WAL file's name are the timeline; a standby writes no WAL.
# Statistics are reset by crash recovery and survive an orderly restart.
_HISTORY = (
    "CASE WHEN pg_is_in_recovery() THEN '' ELSE substr(pg_walfile_name(pg_current_wal_insert_lsn()), 1, 8) END,"
    " (SELECT stats_reset::text FROM pg_stat_bgwriter)"
)
_TIMELINE = f"SELECT {_HISTORY}"
_TIMEOUT = "SELECT setting FROM pg_settings WHERE name = 'statement_timeout'"
_INTRODUCTION = f"SELECT setting, {_HISTORY} FROM pg_settings WHERE name = 'statement_timeout'"

#: Set while a connection is opened only to resolve a COMMIT: it belongs to no attempt.
ASKING: ContextVar[bool] = ContextVar("workerpools_asking", default=False)


class _Transaction(NamedTuple):
    xid: str
    pid: int
    history: History


def resolve_commits(engine: sqlalchemy.Engine, opening: Opening, resolve_timeout: float) -> None:
    """Declare each COMMIT of ``engine`` as an effect, and resolve those whose acknowledgement was lost.

    Args:
        engine: The engine; its dialect's ``do_commit`` and ``do_rollback`` are replaced.
        opening: The engine's opening.
        resolve_timeout: Time limit for finding out the outcome, in seconds.
    """
    dialect: Any = engine.dialect
    commit: Callable[[Any], None] = dialect.do_commit
    rollback: Callable[[Any], None] = dialect.do_rollback
    committed = f"COMMIT by {opening.resource!r}"

    def do_rollback(proxied: Any) -> None:
        try:
            state: ConnectionState = proxied.info[KEY]
        except (AttributeError, KeyError, NotImplementedError):
            # SQLAlchemy's initial queries to a server.
            with watched(getattr(proxied, "dbapi_connection", proxied)):
                rollback(proxied)
            return
        state.phase = Phase.ROLLBACK
        if state.status is not None and state.status() == IDLE:
            # Checked in after COMMIT: the driver sends nothing.
            rollback(proxied)
            return
        attempt = current()
        state.wait(None if attempt is None else attempt.deadline.at)
        try:
            rollback(proxied)
        finally:
            state.waited()
            if state.read_write or state.local is not None:
                state.transaction_ends()

    def do_commit(proxied: Any) -> None:
        try:
            state: ConnectionState = proxied.info[KEY]
        except (AttributeError, KeyError, NotImplementedError):
            with watched(getattr(proxied, "dbapi_connection", proxied)):
                commit(proxied)
            return
        state.phase, state.commit = Phase.COMMIT, None
        attempt = current()
        if state.status is not None and state.status() == IN_ERROR:
            if attempt is None:
                # As SQLAlchemy does. Asking for the transaction's id would fail.
                commit(proxied)
                return
            # For SQLAlchemy the transaction has ended: it does not roll back when the connection is checked in.
            do_rollback(proxied)
            raise PendingRollbackError(
                f"the transaction of the resource {opening.resource!r} was aborted by an earlier error that the task "
                "caught: COMMIT would silently roll it back. Call rollback() where the error is caught, or run the "
                "statement that may fail in begin_nested()"
            )
        at = None if attempt is None else attempt.deadline.at
        state.wait(at)
        try:
            connection = proxied.dbapi_connection
            if getattr(connection, "autocommit", None) is not False and commits_each_statement(connection):
                commit(proxied)
                return
            transaction = None
            if state.history is not None:
                # A transaction begun as READ ONLY cannot have written: no need to ask the server.
                if state.read_write or dialect.get_readonly(connection) is not True:
                    transaction = _note(proxied, state, state.history)
                if transaction is None:
                    _commit_nothing(dialect, commit, proxied, state)
                    return
                if at is not None and time.monotonic() >= at:
                    # COMMIT gets its own time after the deadline, like every statement.
                    state.wait(at)
            effect = opening.effect(committed)
            try:
                commit(proxied)
            except dialect.loaded_dbapi.Error as error:
                # Any other exception, such as a time limit, interrupted the COMMIT. It may have succeeded: the effect
                # stays.
                if not dialect.is_disconnect(error, proxied, None):
                    # The server replied that it did not commit.
                    effect.withdraw()
                    raise
                state.waited()
                if transaction is None:
                    state.commit = CommitState(sent=True)
                    raise
                outcome = _resolve(engine, transaction, deadline().clamp(resolve_timeout) or 0.0)
                if outcome:
                    opening.resolved(outcome)
                if outcome == "committed":
                    with opening.closing("stale"):
                        _throw_away(engine, proxied, state)
                    return
                if outcome == "aborted":
                    effect.withdraw()
                state.commit = CommitState(True, outcome, transaction.xid)
                raise
        finally:
            state.waited()
            if state.read_write or state.local is not None:
                state.transaction_ends()

    dialect.do_commit = do_commit
    dialect.do_rollback = do_rollback


def _commit_nothing(dialect: Any, commit: Callable[[Any], None], proxied: Any, state: ConnectionState) -> None:
    # A transaction without writes loses nothing: its reads were complete before COMMIT.
    try:
        commit(proxied)
    except Exception as error:
        if not dialect.is_disconnect(error, proxied, None):
            raise
        connection = None if state.connection is None else state.connection()
        if connection is None:
            state.commit = CommitState(sent=False)
            raise
        connection.invalidate(error)


def _note(proxied: Any, state: ConnectionState, history: History) -> _Transaction | None:
    cursor = proxied.cursor()
    try:
        cursor.execute(_NOTE)
        xid, pid = cursor.fetchone()
    except Exception:
        state.commit = CommitState(sent=False)
        raise
    finally:
        with contextlib.suppress(Exception):
            cursor.close()
    return None if xid is None else _Transaction(xid, pid, history)


def _throw_away(engine: sqlalchemy.Engine, proxied: Any, state: ConnectionState) -> None:
    connection = None if state.connection is None else state.connection()
    if connection is not None:
        connection.invalidate()
    else:
        proxied.invalidate()
    # Idle connections of the same age are suspect.
    engine.dispose()


def _resolve(engine: sqlalchemy.Engine, transaction: _Transaction, timeout: float) -> str:
    """Return ``committed``, ``aborted``, or an empty text if the outcome is still unknown after ``timeout`` seconds."""
    started = time.monotonic()
    pause = 0.02
    # A separate connection pool: the engine's may be exhausted.
    pool = engine.pool.recreate()
    token = ASKING.set(True)
    try:
        while True:
            answer = _ask(engine, pool, transaction, end=time.monotonic() - started > GRACE)
            if answer != "":
                return "" if answer == "unknown" else answer
            if time.monotonic() + pause - started > timeout:
                return ""
            time.sleep(pause)
            pause = min(1.0, pause * 2)
    finally:
        ASKING.reset(token)
        _quietly(pool.dispose)


def _ask(engine: sqlalchemy.Engine, pool: Any, transaction: _Transaction, *, end: bool) -> str:
    """Return the outcome, ``unknown`` if it can never be known, or an empty text if asking again may help."""
    try:
        connection = pool.connect()
    except Exception as error:
        permanent = classify_connect(error, resource="").kind is FailureKind.PERMANENT
        return "unknown" if permanent else ""
    parameters = {"xid": transaction.xid, "pid": transaction.pid}
    try:
        cursor = connection.cursor()
        cursor.execute(_TIMELINE)
        timeline, life = cursor.fetchone()
        if timeline != transaction.history.timeline:
            # A standby learns of a COMMIT later than its primary: ask again. On another timeline the id may belong to
            # another transaction.
            return "unknown" if timeline else ""
        if life != transaction.history.life:
            # The server crashed, and reuses ids that had not reached the disk. The transaction is then lost, whatever
            # the outcome of the other one; but a COMMIT may belong to either.
            try:
                cursor.execute(_STATUS, parameters)
            except Exception as error:
                if error_code(error) != "22023":
                    raise
                return "aborted"
            (status,) = cursor.fetchone()
            if status == "in progress":
                # Another transaction's, or ours if the statistics were reset by hand.
                return ""
            return "aborted" if status == "aborted" else "unknown"
        cursor.execute(_STATUS, parameters)
        (status,) = cursor.fetchone()
        if status == "in progress":
            if end:
                cursor.execute(_END, parameters)
            return ""
        # None: too old to be known.
        return str(status) if status in ("committed", "aborted") else "unknown"
    except Exception as error:
        logger.debug("could not query the outcome of a COMMIT: %s", type(error).__name__, exc_info=True)
        return ""
    finally:
        _quietly(connection.invalidate)


def introduce(connection: Any, state: ConnectionState, *, resolves: bool) -> None:
    """Query a new connection's history and timeout; takes one round trip, or two if the server refuses the first query.

    Args:
        connection: The driver's connection, not yet used.
        state: The connection's state. Without a history, no COMMIT over the connection is resolved.
        resolves: Whether to query the history.
    """
    before = connection.autocommit
    try:
        if not (resolves and _introduced(connection, state, _INTRODUCTION)):
            # Deadlines need no history. Some servers with PostgreSQL's protocol have none, and some hide it from some
            # roles.
            _introduced(connection, state, _TIMEOUT)
    finally:
        _quietly(lambda: setattr(connection, "autocommit", before))


def _introduced(connection: Any, state: ConnectionState, question: str) -> bool:
    try:
        # Outside a transaction, which an error would abort.
        connection.autocommit = True
        cursor = connection.cursor()
        cursor.execute(question)
        milliseconds, *history = cursor.fetchone()
        cursor.close()
        state.kind, state.server = POSTGRESQL, int(milliseconds)
        state.session = state.server
        if history and history[0]:
            state.history = History(*history)
        return True
    except Exception as error:
        if connection.closed:
            # Lost while it was being opened.
            raise
        logger.debug("could not query the server's history or timeout: %s", type(error).__name__)
        return False


def _quietly(step: Callable[[], object]) -> None:
    try:
        step()
    except Exception as error:
        logger.debug("clean-up failed: %s", type(error).__name__)
