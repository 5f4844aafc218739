"""Sends COMMIT, tracks whether it may have been applied, and has it resolved if the acknowledgement was lost."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import sqlalchemy
from sqlalchemy.exc import PendingRollbackError

from workerpools.adapter import Opening, Phase, current
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
from workerpools.sqlalchemy._resolving import Transaction, note, resolve

__all__ = ["resolve_commits"]


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
        if attempt is not None and state.status is not None and state.status() == IN_ERROR:
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
                outcome = resolve(engine, transaction, resolve_timeout)
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


def _note(proxied: Any, state: ConnectionState, history: History) -> Transaction | None:
    try:
        return note(proxied, state, history)
    except Exception:
        state.commit = CommitState(sent=False)
        raise


def _throw_away(engine: sqlalchemy.Engine, proxied: Any, state: ConnectionState) -> None:
    connection = None if state.connection is None else state.connection()
    if connection is not None:
        connection.invalidate()
    else:
        proxied.invalidate()
    # Idle connections of the same age are suspect.
    engine.dispose()
