"""Tracks an engine's statements and transactions, and keeps statements within the task's deadline."""

from __future__ import annotations

import re
import threading
from time import monotonic

import sqlalchemy
from sqlalchemy import event
from sqlalchemy.engine import Connection

from workerpools.adapter import Opening, Phase, current
from workerpools.sqlalchemy._connection import IN_ERROR, KEY, ConnectionState, commits_each_statement, state_of
from workerpools.sqlalchemy._errors import COMMIT, COMMIT_OR_IMPLICIT

__all__ = ["note_statements"]

#: Statements that revoke a transaction's READ ONLY; PostgreSQL refuses them after the first query.
_READ_WRITE = re.compile(r"\bread\s+write\b|_read_only\b", re.IGNORECASE)


def note_statements(engine: sqlalchemy.Engine, opening: Opening) -> None:
    """Listen to the statements and transactions of ``engine``."""
    committed = f"COMMIT by {opening.resource!r}"
    executed = f"a statement in autocommit by {opening.resource!r}"
    commits = COMMIT_OR_IMPLICIT if engine.dialect.name in ("mysql", "mariadb") else COMMIT

    @event.listens_for(engine, "before_cursor_execute")
    def executes(connection: Connection, cursor: object, statement: str, *_: object) -> None:
        proxied = connection.connection
        driver = proxied.dbapi_connection
        if commits.search(statement):
            opening.effect(committed)
        elif getattr(driver, "autocommit", None) is not False and commits_each_statement(driver):
            opening.effect(executed)
        state: ConnectionState | None = proxied.info.get(KEY)
        if state is None:
            return
        state.thread = threading.get_ident()
        state.phase = Phase.STATEMENT
        if _READ_WRITE.search(statement):
            state.read_write = True
        attempt = current()
        at = None if attempt is None else attempt.deadline.at
        if state.kind is None or (state.status is not None and state.status() == IN_ERROR):
            at = None
        state.wait(at)
        if at is not None:
            state.started = now = monotonic()
            # After arming the watchdog: the server may never answer this statement either.
            if state.fits != at or now > state.fits_until:
                state.fit(driver, at, statement)

    @event.listens_for(engine, "after_cursor_execute")
    def executed_it(connection: Connection, *_: object) -> None:
        state: ConnectionState | None = connection.info.get(KEY)
        if state is not None and state.waiting and state.watch is not None:
            # state.waited() without its result: the statement has ended, so a shutdown no longer matters.
            state.waiting = False
            try:
                state.watch.waiting.pop()
            except IndexError:
                state.taken()

    @event.listens_for(engine, "rollback_savepoint")
    def rolls_back_partly(connection: Connection, name: object, context: object) -> None:
        # Settings made since the savepoint are undone too.
        state = state_of(connection)
        if state is not None:
            state.transaction_ends()

    def noted(connection: Connection, phase: Phase) -> None:
        state = state_of(connection)
        if state is not None:
            state.phase = phase
            state.transaction_ends()

    # Two-phase events fire before the driver is called.
    @event.listens_for(engine, "prepare_twophase")
    def prepares(connection: Connection, xid: object) -> None:
        noted(connection, Phase.COMMIT)
        opening.effect(f"PREPARE TRANSACTION by {opening.resource!r}")

    @event.listens_for(engine, "commit_twophase")
    def commits_prepared(connection: Connection, xid: object, is_prepared: bool) -> None:
        noted(connection, Phase.COMMIT)
        opening.effect(committed)

    @event.listens_for(engine, "rollback_twophase")
    def rolls_back_prepared(connection: Connection, xid: object, is_prepared: bool) -> None:
        noted(connection, Phase.ROLLBACK)
