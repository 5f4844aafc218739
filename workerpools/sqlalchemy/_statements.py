"""The statements of an engine: what each does to its transaction, and how long it may take."""

from __future__ import annotations

import re
import threading
import weakref
from collections.abc import Callable
from functools import partial
from time import monotonic
from typing import Any

import sqlalchemy
from sqlalchemy.engine import Connection

from workerpools.adapter import Opening, Phase, current
from workerpools.sqlalchemy._connection import (
    IN_ERROR,
    KEY,
    ConnectionState,
    commits_each_statement,
    state_of,
    watched,
)
from workerpools.sqlalchemy._errors import COMMIT, COMMIT_OR_IMPLICIT
from workerpools.sqlalchemy._flight import Flights

__all__ = ["watch_statements"]

#: Statements that revoke a transaction's READ ONLY; PostgreSQL refuses them after the first query.
_READ_WRITE = re.compile(r"\bread\s+write\b|_read_only\b", re.IGNORECASE)


def watch_statements(engine: sqlalchemy.Engine, opening: Opening, flights: Flights | None) -> None:
    """Have ``engine`` note its statements, and keep them within the task's deadline.

    Args:
        engine: The engine, not yet used; its dialect's methods that execute are replaced.
        opening: The engine's opening.
        flights: The statements of a PostgreSQL driver; None for other drivers.
    """
    dialect: Any = engine.dialect
    executes = _Plain(engine, opening).execute if flights is None else flights.execute

    execute, execute_many, execute_bare = dialect.do_execute, dialect.do_executemany, dialect.do_execute_no_params

    def do_execute(
        cursor: Any, statement: str, parameters: Any, context: Any = None, run: Callable[[], object] | None = None
    ) -> None:
        fits = run is None
        run = run or partial(execute, cursor, statement, parameters, context)
        try:
            connection = context.root_connection
            proxied = connection.connection
            state: ConnectionState = proxied.info[KEY]
        except (AttributeError, KeyError, NotImplementedError):
            # SQLAlchemy's initial queries to a server.
            with watched(getattr(cursor, "connection", None)):
                run()
            return
        if state.connection is None:
            state.connection = weakref.ref(connection)
        state.thread = threading.get_ident()
        state.phase = Phase.STATEMENT
        if _READ_WRITE.search(statement):
            state.read_write = True
        attempt = current()
        at = None if attempt is None else attempt.deadline.at
        if at is not None:
            if state.kind is None or (state.status is not None and state.status() == IN_ERROR):
                at = None
            else:
                state.wait(at)
                state.started = monotonic()
        elif state.waiting:
            state.waited()
        driver = proxied.dbapi_connection
        state.announced = True
        try:
            executes(run, state, driver, cursor, statement, parameters, attempt, at, fits=fits)
        finally:
            state.announced = False
        if state.waiting and state.watch is not None:
            # state.waited() without its result: the statement has ended, so a shutdown no longer matters.
            state.waiting = False
            try:
                state.watch.waiting.pop()
            except IndexError:
                state.taken()

    def do_executemany(cursor: Any, statement: str, parameters: Any, context: Any = None) -> None:
        do_execute(cursor, statement, None, context, partial(execute_many, cursor, statement, parameters, context))

    def do_execute_no_params(cursor: Any, statement: str, context: Any = None) -> None:
        do_execute(cursor, statement, None, context, partial(execute_bare, cursor, statement, context))

    dialect.do_execute = do_execute
    dialect.do_executemany = do_executemany
    dialect.do_execute_no_params = do_execute_no_params
    _watch_transactions(dialect, opening)


class _Plain:
    """The statements of drivers that do not tell whether a transaction is open."""

    def __init__(self, engine: sqlalchemy.Engine, opening: Opening) -> None:
        self._opening = opening
        self._commits = COMMIT_OR_IMPLICIT if engine.dialect.name in ("mysql", "mariadb") else COMMIT
        self._committed = f"COMMIT by {opening.resource!r}"
        self._executed = f"a statement in autocommit by {opening.resource!r}"

    def execute(
        self,
        run: Callable[[], object],
        state: ConnectionState,
        driver: Any,
        cursor: object,
        statement: str,
        parameters: object,
        attempt: object,
        at: float | None,
        *,
        fits: bool,
    ) -> None:
        if self._commits.search(statement):
            self._opening.effect(self._committed)
        elif getattr(driver, "autocommit", None) is not False and commits_each_statement(driver):
            self._opening.effect(self._executed)
        if at is not None and (state.fits != at or monotonic() > state.fits_until):
            # After starting the watchdog: the server may never answer this statement either.
            state.fit(driver, at, statement)
        run()


def _watch_transactions(dialect: Any, opening: Opening) -> None:
    # The dialect's methods: with a listener of its own, an engine would fire every other event of a connection, too.
    committed = f"COMMIT by {opening.resource!r}"
    prepared = f"PREPARE TRANSACTION by {opening.resource!r}"

    def noted(name: str, phase: Phase | None, effect: str = "") -> None:
        method = getattr(dialect, name)

        def call(connection: Connection, *arguments: Any, **options: Any) -> Any:
            state = state_of(connection)
            if state is not None and phase is None:
                # Settings made since the savepoint are undone too.
                state.savepoint_undone()
            elif state is not None and phase is not None:
                state.phase = phase
                state.transaction_ends(undone=False)
            if effect:
                opening.effect(effect)
            return method(connection, *arguments, **options)

        setattr(dialect, name, call)

    noted("do_rollback_to_savepoint", None)
    noted("do_prepare_twophase", Phase.COMMIT, prepared)
    noted("do_commit_twophase", Phase.COMMIT, committed)
    noted("do_rollback_twophase", Phase.ROLLBACK)
