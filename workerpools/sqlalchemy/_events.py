"""Watches an engine through its public events: its connections, its commits, and what its failures prove."""

from __future__ import annotations

import re
import threading
import weakref
from typing import Any

import sqlalchemy
from sqlalchemy import event
from sqlalchemy.engine import Connection, ExceptionContext
from sqlalchemy.exc import PendingRollbackError

from workerpools.adapter import Lifetime, Opening, Phase, add_note, in_own_attempt
from workerpools.adapter import deadline as current_deadline
from workerpools.sqlalchemy._commit import (
    COMMIT_STATE,
    CONNECTION,
    READ_WRITE,
    CommitState,
    commits_each_statement,
    watch_commits,
)
from workerpools.sqlalchemy._errors import (
    classify_connect,
    classify_statement,
    is_client_side,
    is_read_only,
    is_timeout,
)
from workerpools.sqlalchemy._lent import LENT
from workerpools.sqlalchemy._pool import Clock, Recycled, watch_pool
from workerpools.sqlalchemy._timeouts import Timeouts

__all__ = ["watch"]

#: COMMIT as text, which no event tells of; END is PostgreSQL's other word for it.
_COMMIT = re.compile(r"(?:^|;|\*/)\s*(?:commit|end|prepare\s+transaction)\b", re.IGNORECASE)

#: What commits on MySQL and MariaDB without the word ("Statements That Cause an Implicit Commit" in both manuals).
_COMMITS_IMPLICITLY = re.compile(
    r"(?:^|;|\*/)\s*(?:alter|analyze|begin|cache|change|check|create(?!(?:\s+or\s+replace)?\s+temporary\b)"
    r"|drop(?!\s+temporary\b)|flush|grant|install|load\s+index|lock|optimize|rename|repair|reset|revoke|set\s+password"
    r"|start|stop|truncate|uninstall|unlock)\b",
    re.IGNORECASE,
)

#: What takes a transaction's READ ONLY back; PostgreSQL refuses that after the first query.
_READ_WRITE = re.compile(r"\bread\s+write\b|_read_only\b", re.IGNORECASE)


def watch(
    engine: sqlalchemy.Engine,
    opening: Opening,
    recycled: Recycled,
    clock: Clock,
    *,
    resolve_timeout: float,
    lifetime: Lifetime,
    session_settings: bool,
) -> None:
    """Report the connections of ``engine`` to ``opening``, and what it does to the attempt that it does it for.

    Args:
        engine: The engine, not yet used.
        opening: What the adapter was told.
        recycled: Which connections are to be replaced.
        clock: The pool's.
        resolve_timeout: How long to ask for the outcome of a lost COMMIT, in seconds; 0 for not at all.
        lifetime: How long connections are kept and trusted.
        session_settings: Whether a session's settings stay with its connection.
    """
    timeouts = Timeouts(session=session_settings)
    watch_pool(engine, opening, lifetime, timeouts, recycled, clock, resolves=resolve_timeout > 0)
    watch_commits(engine, opening, resolve_timeout, timeouts)
    _watch_transactions(engine, opening, timeouts)
    _watch_errors(engine, opening, timeouts)


def _watch_transactions(engine: sqlalchemy.Engine, opening: Opening, timeouts: Timeouts) -> None:
    @event.listens_for(engine, "begin")
    def begins(connection: Connection) -> None:
        _phases[connection] = Phase.STATEMENT
        info = _info(connection)
        info.pop(READ_WRITE, None)
        timeouts.transaction_ends(info)

    # The next ones fire before the driver is called.
    @event.listens_for(engine, "commit")
    def commits(connection: Connection) -> None:
        _phases[connection] = Phase.COMMIT
        if in_own_attempt() and is_aborted(connection.connection.dbapi_connection):
            raise PendingRollbackError(
                f"the transaction of the resource {opening.resource!r} was aborted by an earlier error that the task "
                "caught: COMMIT would undo it in silence. Call rollback() where the error is caught, or put the "
                "statement that may fail in begin_nested()"
            )
        connection.info[CONNECTION] = weakref.ref(connection)

    @event.listens_for(engine, "rollback_savepoint")
    def rolls_back_partly(connection: Connection, name: object, context: object) -> None:
        # What was set since the savepoint is undone, too.
        timeouts.transaction_ends(_info(connection))

    @event.listens_for(engine, "rollback")
    def rolls_back(connection: Connection) -> None:
        _phases[connection] = Phase.ROLLBACK

    @event.listens_for(engine, "prepare_twophase")
    def prepares(connection: Connection, xid: object) -> None:
        _phases[connection] = Phase.COMMIT
        opening.effect(f"PREPARE TRANSACTION by {opening.resource!r}")

    @event.listens_for(engine, "commit_twophase")
    def commits_prepared(connection: Connection, xid: object, is_prepared: bool) -> None:
        _phases[connection] = Phase.COMMIT
        opening.effect(f"COMMIT by {opening.resource!r}")

    @event.listens_for(engine, "rollback_twophase")
    def rolls_back_prepared(connection: Connection, xid: object, is_prepared: bool) -> None:
        _phases[connection] = Phase.ROLLBACK

    committed = f"COMMIT by {opening.resource!r}"
    executed = f"a statement in autocommit by {opening.resource!r}"

    @event.listens_for(engine, "before_cursor_execute")
    def executes(connection: Connection, cursor: object, statement: str, *_: object) -> None:
        if _commits(connection, statement):
            opening.effect(committed)
        elif commits_each_statement(connection.connection.dbapi_connection):
            opening.effect(executed)
        info = connection.info
        if (lent := info.get(LENT)) is not None:
            lent.thread = threading.get_ident()
        if _READ_WRITE.search(statement):
            info[READ_WRITE] = True
        if not is_aborted(connection.connection.dbapi_connection):
            timeouts.before_statement(connection.connection.dbapi_connection, info, statement)

    @event.listens_for(engine, "after_cursor_execute")
    def executed_it(connection: Connection, *_: object) -> None:
        timeouts.after_statement(_info(connection))


#: What each connection is doing; no entry means statements.
_phases: weakref.WeakKeyDictionary[Connection, Phase] = weakref.WeakKeyDictionary()


def _watch_errors(engine: sqlalchemy.Engine, opening: Opening, timeouts: Timeouts) -> None:
    resource = opening.resource

    @event.listens_for(engine, "handle_error")
    def failed(context: ExceptionContext) -> None:
        error, original, connection = context.sqlalchemy_exception, context.original_exception, context.connection
        if error is not None and context.is_pre_ping:
            opening.replaced("stale")
        if error is None or context.is_pre_ping:
            # No error of the driver's: a time limit, the end of a greenlet, or parameters that do not fit.
            if connection is not None:
                timeouts.after_statement(_info(connection))
            return
        if connection is None:
            opening.descriptors.gave_up()
            add_note(error, f"workerpools: connecting for the resource {resource!r}")
            opening.failed(error, classify_connect(original, resource=resource))
            return
        if is_read_only(original) or is_client_side(original):
            # The server is no primary any more, and every ping of this connection would succeed for ever; or the driver
            # has lost the connection in a way that SQLAlchemy does not know.
            context.is_disconnect = True
        if context.is_disconnect:
            add_note(error, f"workerpools: a connection of the resource {resource!r} was lost")
        phase = _phase(connection, context.statement)
        if _ended_by_deadline(connection, original, timeouts, lost=context.is_disconnect and phase is Phase.COMMIT):
            add_note(error, f"workerpools: the task's deadline ended a statement of the resource {resource!r}")
            opening.failed(error, None, phase=phase, deadline=True)
            return
        state: CommitState | None = getattr(original, COMMIT_STATE, None)
        failure = classify_statement(
            original,
            resource=resource,
            phase=phase,
            disconnected=context.is_disconnect and not is_read_only(original),
            autocommit=phase is Phase.STATEMENT and _in_autocommit(connection),
            commit_sent=state is None or state.sent,
            outcome="" if state is None else state.outcome,
        )
        if state is not None and state.xid and not state.outcome:
            add_note(
                error,
                f"workerpools: whether transaction {state.xid} was committed could not be found out in time; "
                f"ask the database: SELECT pg_xact_status('{state.xid}')",
            )
        opening.failed(error, failure, phase=phase)


def _info(connection: Connection) -> dict[Any, Any]:
    # One that was invalidated or closed has none, nor has that of SQLAlchemy's first questions to a server; each raises
    # an error of its own, which would mask the real one.
    if connection.closed or connection.invalidated:
        return {}
    try:
        return connection.info
    except NotImplementedError:
        return {}


def _ended_by_deadline(connection: Connection, error: BaseException, timeouts: Timeouts, *, lost: bool) -> bool:
    info = _info(connection)
    shut_down = timeouts.after_statement(info)
    remaining = current_deadline().remaining()
    if remaining is None:
        return False
    # The user's own timeout may have been shorter. A COMMIT that the driver gave up waiting for may have been done.
    return shut_down or (not lost and is_timeout(error) and (remaining == 0.0 or timeouts.has_ended(info)))


def _phase(connection: Connection, statement: str | None) -> Phase:
    if statement is None:
        return _phases.get(connection, Phase.STATEMENT)
    if _commits(connection, statement):
        return Phase.COMMIT
    return Phase.ROLLBACK if statement.lstrip()[:8].upper() == "ROLLBACK" else Phase.STATEMENT


def _commits(connection: Connection, statement: str) -> bool:
    if _COMMIT.search(statement):
        return True
    return connection.dialect.name in ("mysql", "mariadb") and bool(_COMMITS_IMPLICITLY.search(statement))


def _in_autocommit(connection: Connection) -> bool:
    try:
        return commits_each_statement(connection.connection.dbapi_connection)
    except Exception:  # the connection is gone already: what is not known counts as the worse
        return True


#: libpq's PQtransactionStatus of a transaction in which a statement failed.
_IN_ERROR = 3


def is_aborted(connection: Any) -> bool:
    """Return whether the driver's connection is in a transaction that PostgreSQL will only roll back.

    It answers COMMIT with ROLLBACK then, and no error (PostgreSQL documentation, "COMMIT"). Costs no round trip.
    """
    ask = getattr(connection, "get_transaction_status", None)
    if ask is not None:
        return bool(ask() == _IN_ERROR)
    return getattr(getattr(connection, "info", None), "transaction_status", None) == _IN_ERROR
