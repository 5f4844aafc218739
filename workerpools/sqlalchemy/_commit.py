"""Sends COMMIT, knows whether it may have been applied, and asks PostgreSQL when the acknowledgement was lost.

Before COMMIT the transaction's id is noted; afterwards a fresh connection asks ``pg_xact_status`` (PostgreSQL
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

#: How long a transaction that is still in progress is left to end by itself, in seconds. Its session is ended then:
#: it is ours, and nobody reads its answer.
GRACE = 1.0

_NOTE = "SELECT pg_current_xact_id_if_assigned()::text, pg_backend_pid()"
_STATUS = "SELECT pg_xact_status(CAST(CAST(%(xid)s AS text) AS xid8))"
_END = (
    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
    " WHERE pid = %(pid)s AND backend_xid = xid(CAST(CAST(%(xid)s AS text) AS xid8))"
)
# The first eight digits of a WAL file's name are those of the timeline; a standby has none to write to.
# The statistics begin anew with every recovery from a crash, and are kept over an orderly restart.
_HISTORY = (
    "CASE WHEN pg_is_in_recovery() THEN '' ELSE substr(pg_walfile_name(pg_current_wal_insert_lsn()), 1, 8) END,"
    " (SELECT stats_reset::text FROM pg_stat_bgwriter)"
)
_TIMELINE = f"SELECT {_HISTORY}"
_TIMEOUT = "SELECT setting FROM pg_settings WHERE name = 'statement_timeout'"
_INTRODUCTION = f"SELECT setting, {_HISTORY} FROM pg_settings WHERE name = 'statement_timeout'"

#: Set where a connection is made for no other purpose than to ask: it belongs to no attempt.
ASKING: ContextVar[bool] = ContextVar("workerpools_asking", default=False)


class _Transaction(NamedTuple):
    xid: str
    pid: int
    history: History


def resolve_commits(engine: sqlalchemy.Engine, opening: Opening, resolve_timeout: float) -> None:
    """Note each COMMIT of ``engine`` as an effect, and resolve those whose acknowledgement was lost.

    Args:
        engine: The engine; its dialect's ``do_commit`` and ``do_rollback`` are replaced.
        opening: Whose engine it is.
        resolve_timeout: How long to ask for the outcome, in seconds.
    """
    dialect: Any = engine.dialect
    commit: Callable[[Any], None] = dialect.do_commit
    rollback: Callable[[Any], None] = dialect.do_rollback
    committed = f"COMMIT by {opening.resource!r}"

    def do_rollback(proxied: Any) -> None:
        try:
            state: ConnectionState = proxied.info[KEY]
        except (AttributeError, KeyError, NotImplementedError):
            # SQLAlchemy's first questions to a server.
            with watched(getattr(proxied, "dbapi_connection", proxied)):
                rollback(proxied)
            return
        state.phase = Phase.ROLLBACK
        if state.status is not None and state.status() == IDLE:
            # The driver sends nothing: a connection that is checked in after COMMIT.
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
        if attempt is not None and state.status is not None and state.status() == IN_ERROR:
            raise PendingRollbackError(
                f"the transaction of the resource {opening.resource!r} was aborted by an earlier error that the task "
                "caught: COMMIT would undo it in silence. Call rollback() where the error is caught, or put the "
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
                # The server refuses to write in a transaction that was begun as READ ONLY: no need to ask it.
                if state.read_write or dialect.get_readonly(connection) is not True:
                    transaction = _note(proxied, state, state.history)
                if transaction is None:
                    _commit_nothing(dialect, commit, proxied, state)
                    return
                if at is not None and time.monotonic() >= at:
                    # COMMIT has a time of its own, as every statement after the deadline.
                    state.wait(at)
            effect = opening.effect(committed)
            try:
                commit(proxied)
            except dialect.loaded_dbapi.Error as error:
                # Anything else has struck meanwhile, as a time limit does, and the server may have done it: it stays
                # noted.
                if not dialect.is_disconnect(error, proxied, None):
                    # The server has answered: it was not committed.
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
    # A transaction that wrote nothing has nothing to lose: its reads were complete before COMMIT.
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
    # Its idle siblings are of the same age.
    engine.dispose()


def _resolve(engine: sqlalchemy.Engine, transaction: _Transaction, timeout: float) -> str:
    """Return ``committed``, ``aborted``, or an empty text if it could not be found out within ``timeout``."""
    started = time.monotonic()
    pause = 0.02
    # A connection pool of its own: the engine's may have no room for one connection more.
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
    """Return the outcome, ``unknown`` if it never will be known, or an empty text if it is worth to ask again."""
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
            # A standby may know of a COMMIT later than its primary: worth asking again. On another timeline the id may
            # have been given to another transaction.
            return "unknown" if timeline else ""
        if life != transaction.history.life:
            # It has crashed: an id of which nothing had reached the disk is given away again. Then the transaction
            # was lost, whatever became of the other one; but a COMMIT may be either's.
            try:
                cursor.execute(_STATUS, parameters)
            except Exception as error:
                if error_code(error) != "22023":
                    raise
                return "aborted"
            (status,) = cursor.fetchone()
            if status == "in progress":
                # Another one's, if it is not ours after somebody has reset the statistics.
                return ""
            return "aborted" if status == "aborted" else "unknown"
        cursor.execute(_STATUS, parameters)
        (status,) = cursor.fetchone()
        if status == "in progress":
            if end:
                cursor.execute(_END, parameters)
            return ""
        # None: too long ago to be known.
        return str(status) if status in ("committed", "aborted") else "unknown"
    except Exception as error:
        logger.debug("asking for the outcome of a COMMIT failed: %s", type(error).__name__, exc_info=True)
        return ""
    finally:
        _quietly(connection.invalidate)


def introduce(connection: Any, state: ConnectionState, *, resolves: bool) -> None:
    """Ask a new connection which history its server writes, and which timeout is in force; costs one round trip.

    A second one where the server does not tell the first.

    Args:
        connection: The driver's connection, not yet used.
        state: What is known of it. Without a history in it, no COMMIT over the connection is resolved.
        resolves: Whether the history is wanted.
    """
    before = connection.autocommit
    try:
        if not (resolves and _introduced(connection, state, _INTRODUCTION)):
            # Deadlines need no history, which some servers that speak PostgreSQL's protocol do not know, and others
            # do not tell every role.
            _introduced(connection, state, _TIMEOUT)
    finally:
        _quietly(lambda: setattr(connection, "autocommit", before))


def _introduced(connection: Any, state: ConnectionState, question: str) -> bool:
    try:
        # Outside of a transaction: an error would abort it.
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
            # Lost while it was opened.
            raise
        logger.debug("the server does not say what it is: %s", type(error).__name__)
        return False


def _quietly(step: Callable[[], object]) -> None:
    try:
        step()
    except Exception as error:
        logger.debug("clean-up failed: %s", type(error).__name__)
