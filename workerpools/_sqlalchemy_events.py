"""Watches an engine through its public events: its connections, its commits, and what its failures prove."""

from __future__ import annotations

import re
from typing import Any

import sqlalchemy
from sqlalchemy import event
from sqlalchemy.engine import Connection, ExceptionContext
from sqlalchemy.exc import PendingRollbackError

from workerpools._core import scope
from workerpools._core.adapter import Opening
from workerpools._core.notes import add_note

__all__ = ["watch"]

_RAW = "workerpools raw connection"

#: COMMIT as text, which no event tells of; END is PostgreSQL's other word for it.
_COMMIT = re.compile(r"(?:^|;|\*/)\s*(?:commit|end|prepare\s+transaction)\b", re.IGNORECASE)


def watch(engine: sqlalchemy.Engine, opening: Opening) -> None:
    """Report the connections of ``engine`` to ``opening``, and what it does to the attempt that it does it for."""
    _watch_pool(engine, opening)
    _watch_transactions(engine, opening)
    _watch_errors(engine, opening)


def _watch_pool(engine: sqlalchemy.Engine, opening: Opening) -> None:
    # Listening on the engine, not on its pool: it survives dispose(), which makes a new pool.
    # First of all listeners, and without a result: what the user's own listeners do to the arguments counts.
    @event.listens_for(engine, "do_connect")
    def connects(dialect: object, record: object, arguments: object, parameters: dict[str, Any]) -> None:
        port = parameters.get("port")
        opening.descriptors.connecting(int(port) if port else None)

    @event.listens_for(engine, "connect")
    def connected(connection: Any, record: object) -> None:
        if hasattr(connection, "fileno"):
            opening.connected(connection)
        else:
            # A driver without sockets of its own (SQLite): kept from the child's finalizers all the same.
            opening.descriptors.gave_up()
            opening.descriptors.lend(connection, connection)

    @event.listens_for(engine, "checkout")
    def checked_out(connection: Any, record: Any, borrower: object) -> None:
        opening.descriptors.lend(record, borrower)
        if scope.current() is not None:
            # Whoever takes a connection past the engine may commit on it unseen.
            record.info[_RAW] = effect = scope.Effect(f"a raw connection of {opening.resource!r} was used")
            scope.note_effect(effect)

    @event.listens_for(engine, "engine_connect")
    def wrapped(connection: Connection) -> None:
        effect = connection.info.pop(_RAW, None)
        if effect is not None:
            scope.withdraw_effect(effect)

    @event.listens_for(engine, "close")
    def closed(connection: Any, record: object) -> None:
        opening.disconnected(connection)

    @event.listens_for(engine, "close_detached")
    def closed_detached(connection: Any) -> None:
        opening.disconnected(connection)


def _watch_transactions(engine: sqlalchemy.Engine, opening: Opening) -> None:
    committed = scope.Effect(f"COMMIT by {opening.resource!r}")
    executed = scope.Effect(f"a statement in autocommit by {opening.resource!r}")

    # These fire before the driver is called: from here on the transaction may have been committed.
    @event.listens_for(engine, "commit")
    def commits(connection: Connection) -> None:
        if scope.current() is not None and is_aborted(connection.connection.dbapi_connection):
            raise PendingRollbackError(
                f"the transaction of the resource {opening.resource!r} was aborted by an earlier error that the task "
                "caught: COMMIT would undo it in silence. Call rollback() where the error is caught, or put the "
                "statement that may fail in begin_nested()"
            )
        scope.note_effect(committed)

    @event.listens_for(engine, "prepare_twophase")
    def prepares(connection: Connection, xid: object) -> None:
        scope.note_effect(committed)

    @event.listens_for(engine, "commit_twophase")
    def commits_prepared(connection: Connection, xid: object, is_prepared: bool) -> None:
        scope.note_effect(committed)

    @event.listens_for(engine, "before_cursor_execute")
    def executes(connection: Connection, cursor: object, statement: str, *_: object) -> None:
        if _COMMIT.search(statement):
            scope.note_effect(committed)
        elif commits_each_statement(connection.connection.dbapi_connection):
            scope.note_effect(executed)


def _watch_errors(engine: sqlalchemy.Engine, opening: Opening) -> None:
    @event.listens_for(engine, "handle_error")
    def failed(context: ExceptionContext) -> None:
        error = context.sqlalchemy_exception
        if error is None or context.is_pre_ping:
            return
        if context.connection is None:
            opening.descriptors.gave_up()
            add_note(error, f"workerpools: connecting for the resource {opening.resource!r}")
        elif context.is_disconnect:
            add_note(error, f"workerpools: a connection of the resource {opening.resource!r} was lost")
            driver = type(context.original_exception).__module__.partition(".")[0]
            # Whatever the transaction did is undone by its loss. Had it been committing, or in autocommit, the attempt
            # would know of the effect.
            scope.note_stale(error, opening.resource, ("sqlalchemy", driver), opening.listeners)


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


def commits_each_statement(connection: Any) -> bool:
    """Return whether the driver's connection is in autocommit, so that a lost reply may hide a statement's success.

    SQLAlchemy's events do not tell: a connection in AUTOCOMMIT still fires begin and rollback.
    """
    autocommit = getattr(connection, "autocommit", None)
    if callable(autocommit):
        # The MySQL drivers have a method of that name to set it, and another one to ask.
        asked = getattr(connection, "get_autocommit", None)
        return bool(asked()) if asked is not None else False
    if type(connection).__module__ == "sqlite3":
        return autocommit is True or connection.isolation_level is None
    return autocommit is True
