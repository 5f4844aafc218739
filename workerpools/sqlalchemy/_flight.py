"""Statements of PostgreSQL's drivers: what is known of their transaction, and what shares their round trip.

libpq's transaction status says before and after each statement, without a round trip, whether a transaction is open.
BEGIN, the deadline's timeout and the reset of the session travel with a transaction's first statement; so does what
proves, before COMMIT, whether it has written: its id, or the server's refusal to write.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from functools import lru_cache
from time import monotonic
from typing import Any

from workerpools.adapter import Attempt, Opening, Phase, current
from workerpools.sqlalchemy._connection import IDLE, OUTSIDE, ConnectionState, Transaction, raw
from workerpools.sqlalchemy._texts import NOTHING, Does, Text, read
from workerpools.sqlalchemy._timeouts import fitting

__all__ = ["RESETS", "Flights", "begin"]

_RESET_ALL = "RESET ALL"

#: What PostgreSQL's DISCARD ALL does and a transaction allows, without what a session that is kept profits from:
#: prepared statements, plans, sequences (PostgreSQL documentation, "DISCARD").
RESETS = (
    "RESET SESSION AUTHORIZATION",
    "RESET ROLE",
    _RESET_ALL,
    "UNLISTEN *",
    "CLOSE ALL",
    "DISCARD TEMP",
    "SELECT pg_advisory_unlock_all()",
)

#: The timeout in force, and the statements that make a session's settings again, a line each. Line breaks in a value
#: would be taken for the end.
_SETTINGS = r"""
SELECT (SELECT setting FROM pg_settings WHERE name = 'statement_timeout'), concat_ws(E'\n',
 CASE WHEN current_setting('role') <> 'none' THEN format('SET ROLE %I', current_setting('role')) END,
 (SELECT string_agg(format('SELECT set_config(%L,%L,false)', name, setting), E'\n') FROM pg_settings
  WHERE source = 'session' AND setting !~ E'\n'))
"""

_ISOLATION = {1: "READ COMMITTED", 2: "REPEATABLE READ", 3: "SERIALIZABLE", 4: "READ UNCOMMITTED"}


def begin(isolation: object, read_only: bool | None, deferrable: bool | None) -> str:
    """Return the BEGIN that a driver would send.

    Args:
        isolation: The driver's isolation level: psycopg2's number or psycopg's enumeration; None for the server's.
        read_only: Whether the transaction is READ ONLY; None for the server's default.
        deferrable: Whether it is DEFERRABLE; None for the server's default.
    """
    parts = ["BEGIN"]
    if isolation is not None:
        name = getattr(isolation, "name", None)
        parts.append(f"ISOLATION LEVEL {_ISOLATION[isolation] if name is None else name.replace('_', ' ')}")  # type: ignore[index]
    if read_only is not None:
        parts.append("READ ONLY" if read_only else "READ WRITE")
    if deferrable is not None:
        parts.append("DEFERRABLE" if deferrable else "NOT DEFERRABLE")
    return " ".join(parts)


class Flights:
    """The statements of one engine.

    Args:
        opening: The engine's opening.
        driver: The driver's part: :mod:`workerpools.sqlalchemy._psycopg2` or :mod:`workerpools.sqlalchemy._psycopg`.
        batch: Whether statements share round trips.
        resets: The statements that reset a session.
    """

    def __init__(self, opening: Opening, driver: Any, *, batch: bool, resets: tuple[str, ...]) -> None:
        self._opening = opening
        self._driver = driver
        self._fly: Callable[[ConnectionState, Any, str, Any, Text, list[str], bool], bool] | None = None
        if batch:
            self._fly = driver.fly()
        self.ask: Callable[[Any, str], tuple[Any, ...]] = driver.ask
        #: Reports an error raised past the engine, with the driver's connection and what it did; None if unknown.
        self.failed: Callable[[ConnectionState, BaseException, Any, Phase | None], object]
        # Of its own: the drivers' isolation levels are numbers of different meaning.
        self._begin = lru_cache(100)(begin)
        self._begins: Callable[[Any], bool] = driver.begins
        self._said: Callable[[Any], str | None] = driver.said
        self._is_psycopg2 = driver.__name__.endswith("2")
        self._resets = resets
        self._committed = f"COMMIT by {opening.resource!r}"
        self._ended = f"a transaction of {opening.resource!r} that ended past its engine"
        self._alone = f"a statement in autocommit by {opening.resource!r}"

    def joined(self, connection: Any, state: ConnectionState, *, direct: bool) -> None:
        """Take part in the statements of a new connection, and in those that do not come from the engine.

        Args:
            connection: The driver's connection.
            state: Its state.
            direct: Whether no PgBouncer is in between, whose server connections keep no session.
        """
        state.flights = self
        state.direct = direct
        state.resets = self._resets if direct and state.introduced else ()
        state.told = self._driver.tell(connection, state)

    def keep_settings(self, connection: Any, state: ConnectionState) -> None:
        """Have resets keep the settings that the driver, its dialect or the user made for a new connection.

        Takes one round trip.

        Raises:
            Exception: An error of the driver: the connection is lost.
        """
        if _RESET_ALL not in state.resets:
            return
        before = connection.autocommit
        # Not the body's: a connection that is lost here has done nothing.
        state.announced = connection.autocommit = True
        try:
            milliseconds, kept = self.ask(connection, _SETTINGS)
        finally:
            state.announced = False
            if not connection.closed:
                connection.autocommit = before
        state.server = state.session = int(milliseconds)
        if kept:
            at = state.resets.index(_RESET_ALL) + 1
            state.resets = (*state.resets[:at], *kept.split("\n"), *state.resets[at:])

    def execute(
        self,
        run: Callable[[], object],
        state: ConnectionState,
        connection: Any,
        cursor: Any,
        statement: Any,
        parameters: Any,
        attempt: Attempt | None,
        at: float | None,
        *,
        fits: bool,
    ) -> None:
        """Execute a statement, and note what it does to the transaction.

        Args:
            run: Executes it as the driver does.
            state: The state of its connection.
            connection: The driver's connection.
            cursor: Its cursor.
            statement: The statement.
            parameters: Its parameters.
            attempt: The attempt that executes it.
            at: The deadline; None for none.
            fits: Whether it may share a round trip.

        Raises:
            Exception: The driver's error.
        """
        state.text = text = read(statement if isinstance(statement, str) else _shown(statement, connection))
        assert state.status is not None
        first = state.status() == IDLE
        transaction = state.transaction
        if first:
            if transaction is not None:
                self.ended_unseen(state)
                transaction = None
            if not self._begins(connection):
                self._execute_alone(run, state, connection, text, attempt, at)
                return
        state.alone = False
        if transaction is None:
            transaction = state.transaction = Transaction()
            # One that is open already was begun past the engine.
            transaction.reads = first
        if text.does is Does.OTHER:
            transaction.reads = False
        ending = self._opening.effect(self._committed) if text.may_end else None
        try:
            fly = self._fly
            if (
                not fits
                or fly is None
                or not state.introduced
                or text.copies
                or (first and (text.does is Does.CONTROL or text.may_end))
            ):
                fits = False
            else:
                # Without helpers: every statement would pay for the calls.
                commands: list[str] = []
                resets = False
                if first:
                    left = state.left_by
                    # state.is_anothers(attempt), without the call.
                    if (
                        state.resets
                        and left is not None
                        and (left() is not attempt or (left is OUTSIDE) != (attempt is None))
                    ):
                        # In a transaction of their own: the next one's rollback would take them back, its BEGIN reads
                        # settings, and UNLISTEN takes effect at its end. END is not mistaken for a task's COMMIT.
                        resets = True
                        state.was_reset()
                        commands += ("BEGIN", *state.resets, "END")
                    read_only = connection.readonly if self._is_psycopg2 else connection.read_only
                    commands.append(self._begin(connection.isolation_level, read_only, connection.deferrable))
                timeout = None
                if at is not None and (state.fits != at or monotonic() > state.fits_until):
                    effective = state.session if state.local is None else state.local
                    timeout = fitting(max(0.0, at - monotonic()), effective, state.server)
                    if timeout is not None:
                        commands.append(f"SET LOCAL statement_timeout = {timeout}")
                before = state.local
                if timeout is not None:
                    # Set before, so that the statement's own error is told apart.
                    state.local = timeout
                fits = fly(state, cursor, statement, parameters, text, commands, first)
                if not fits:
                    state.local = before
                elif at is not None:
                    effective = state.session if state.local is None else state.local
                    state.fits, state.fits_until = at, at - effective / 1000
                if fits and (resets or state.left_by is None):
                    # state.used_by(attempt), without the call.
                    state.left_by = OUTSIDE if attempt is None else weakref.ref(attempt)
            if not fits:
                if first and text is not NOTHING:
                    if fly is not None:
                        self._opening.unbatched()
                    self._clean(state, connection, attempt)
                if at is not None and text is not NOTHING and (state.fits != at or monotonic() > state.fits_until):
                    state.fit(connection, at, statement)
                transaction.none = False
                run()
        except BaseException:
            if not connection.closed:
                status = state.status()
                if ending is not None and text.single and status != _ACTIVE:
                    # The server's error to a single COMMIT means that it did not commit.
                    ending.withdraw()
                if first and status == IDLE:
                    # The driver refused the statement before it began a transaction.
                    state.transaction_ends()
            raise
        if state.status() == IDLE:
            undone = text.undoes or (text.single and self._said(cursor) == "ROLLBACK")
            if undone and ending is not None:
                ending.withdraw()
            elif not undone and ending is None:
                self._opening.effect(self._ended)
            state.transaction_ends()
        elif ending is not None and text.single:
            ending.withdraw()

    def _execute_alone(
        self,
        run: Callable[[], object],
        state: ConnectionState,
        connection: Any,
        text: Text,
        attempt: Attempt | None,
        at: float | None,
    ) -> None:
        """Execute a statement that is its own transaction."""
        state.alone = True
        self._opening.effect(self._alone)
        if connection.autocommit and not self._driver.in_block(connection):
            self._clean(state, connection, attempt)
            if state.introduced and (at is not None or state.session != state.server):
                state.fit_session(connection, at)
        # Otherwise the driver believes in a transaction that the server has ended.
        run()

    def execute_unseen(self, state: ConnectionState, run: Callable[[], Any], cursor: Any, statement: Any) -> Any:
        """Execute a statement that did not come from the engine, and return the result of ``run``.

        Raises:
            Exception: The driver's error.
        """
        attempt, connection = current(), cursor.connection
        at = None if attempt is None else attempt.deadline.at
        results: list[Any] = []
        state.thread = threading.get_ident()

        def execute() -> None:
            note = results.append
            self.execute(lambda: note(run()), state, connection, cursor, statement, None, attempt, at, fits=False)

        state.past_engine(connection, execute)
        return results[0]

    def ended_unseen(self, state: ConnectionState) -> None:
        """Note that the server has no transaction although none was seen to end."""
        self._opening.effect(self._ended)
        state.transaction_ends()

    def _clean(self, state: ConnectionState, connection: Any, attempt: Attempt | None) -> None:
        """Reset the session in a round trip of its own."""
        if state.resets and state.is_anothers(attempt):
            if self._driver.in_block(connection):
                self._driver.send(connection, state.resets)
            else:
                self._driver.send_outside(connection, ";".join(state.resets))
            state.was_reset()
            state.used_by(attempt)
        elif state.left_by is None:
            state.used_by(attempt)


#: libpq's PQtransactionStatus while a statement's answer is awaited.
_ACTIVE = 1


def _shown(statement: Any, connection: Any) -> str:
    if isinstance(statement, bytes):
        return statement.decode(errors="replace")
    # Both drivers' ``sql.Composable``.
    return str(statement.as_string(raw(connection))) if hasattr(statement, "as_string") else str(statement)
