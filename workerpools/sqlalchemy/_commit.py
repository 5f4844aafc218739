"""Sends COMMIT, tracks whether it may have been applied, and has it resolved if the acknowledgement was lost."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import sqlalchemy
from sqlalchemy.exc import PendingRollbackError

from workerpools.adapter import Opening, Phase, current
from workerpools.sqlalchemy._connection import (
    COMMITTED,
    IDLE,
    IN_ERROR,
    KEY,
    CommitState,
    ConnectionState,
    History,
    commits_each_statement,
    watched,
)
from workerpools.sqlalchemy._flight import Flights
from workerpools.sqlalchemy._resolving import Noted, note, resolve
from workerpools.sqlalchemy._texts import NOTHING

__all__ = ["resolve_commits"]


def resolve_commits(
    engine: sqlalchemy.Engine,
    opening: Opening,
    resolve_timeout: float,
    flights: Flights | None,
) -> None:
    """Declare each COMMIT of ``engine`` as an effect, and resolve those whose acknowledgement was lost.

    Args:
        engine: The engine; its dialect's ``do_commit`` and ``do_rollback`` are replaced.
        opening: The engine's opening.
        resolve_timeout: Time limit for finding out the outcome, in seconds.
        flights: The engine's statements; None for drivers other than PostgreSQL's.
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
        if state.commit is COMMITTED and state.transaction is None and state.status is not None:
            # Checked in after COMMIT: the driver would send nothing.
            state.commit = None
            if state.status() == IDLE:
                return
        state.phase = Phase.ROLLBACK
        if state.status is not None and state.status() == IDLE:
            # Checked in after COMMIT: the driver sends nothing.
            if state.transaction is not None and flights is not None:
                flights.ended_unseen(state)
            rollback(proxied)
            return
        try:
            state.bounded(partial(rollback, proxied))
        finally:
            state.transaction_ends(undone=True)

    def do_commit(proxied: Any) -> None:
        try:
            state: ConnectionState = proxied.info[KEY]
        except (AttributeError, KeyError, NotImplementedError):
            with watched(getattr(proxied, "dbapi_connection", proxied)):
                commit(proxied)
            return
        state.phase, state.commit, state.text = Phase.COMMIT, None, NOTHING
        attempt = current()
        status = None if state.status is None else state.status()
        if status == IN_ERROR:
            if attempt is None:
                # As SQLAlchemy does. Asking for the transaction's id would fail.
                try:
                    commit(proxied)
                finally:
                    state.transaction_ends(undone=True)
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
        state.announced = True
        undone = False
        try:
            connection = proxied.dbapi_connection
            if status == IDLE:
                # Nothing to commit any more, or nothing yet.
                if state.transaction is not None and flights is not None:
                    flights.ended_unseen(state)
                commit(proxied)
                return
            if flights is None and commits_each_statement(connection):
                commit(proxied)
                return
            known, transaction = state.transaction, None
            if known is not None and known.xid and state.history is not None:
                transaction = Noted(known.xid, known.pid, state.history)
            elif flights is not None and state.history is not None:
                if _did_nothing(dialect, connection, state):
                    _commit_nothing(dialect, commit, proxied, state)
                    return
                transaction = _noted(flights, connection, state, state.history)
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
                    undone = True
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
            state.commit = COMMITTED
        finally:
            state.announced = False
            if state.waiting and state.watch is not None:
                # state.waited(), without the call.
                state.waiting = False
                try:
                    state.watch.waiting.pop()
                except IndexError:
                    state.taken()
            state.transaction_ends(undone=undone)

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


def _did_nothing(dialect: Any, connection: Any, state: ConnectionState) -> bool:
    """Return whether the open transaction is proven to have done nothing, without asking the server."""
    transaction = state.transaction
    if transaction is None or not transaction.reads:
        return False
    # What began as READ ONLY cannot have written, and only statements that plainly read cannot have notified.
    return transaction.did_nothing or (not state.read_write and dialect.get_readonly(connection) is True)


def _noted(flights: Flights, connection: Any, state: ConnectionState, history: History) -> Noted | None:
    """Return the open transaction, with its id; None if it has none, because it has only read."""
    transaction = state.transaction
    # Without an id before COMMIT a transaction may still notify, or write to a foreign table.
    reads = transaction is not None and transaction.reads
    try:
        return note(partial(flights.ask, connection), state, history, assign=not reads)
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
