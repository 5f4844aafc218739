"""psycopg 3: a transaction's first statement takes BEGIN and what else is due along, in one pipeline.

Commands sent in pipeline mode share a round trip (libpq documentation, "Pipeline Mode"). The driver would wait for the
answer to its own BEGIN; one that is already under way it neither repeats nor waits for.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, closing, contextmanager
from functools import lru_cache
from itertools import islice
from operator import attrgetter
from time import monotonic
from typing import Any

import psycopg
from psycopg import pq
from psycopg.rows import tuple_row

from workerpools.adapter import Phase, deadline
from workerpools.sqlalchemy._connection import ConnectionState, Transaction
from workerpools.sqlalchemy._resolving import ASSIGNED, IF_ASSIGNED
from workerpools.sqlalchemy._texts import Does, Text
from workerpools.sqlalchemy._timeouts import FLOOR, GRACE, send_outside

__all__ = [
    "answered",
    "ask",
    "asks",
    "begins",
    "fly",
    "in_block",
    "lasting",
    "said",
    "send",
    "send_outside",
    "tell",
    "telling",
]

#: What the server has answered to a cursor's last statement.
said: Callable[[Any], str | None] = attrgetter("statusmessage")


def in_block(connection: Any) -> bool:
    """Return whether the user is in a pipeline, in which the answers to statements are awaited later."""
    return bool(connection.pgconn.pipeline_status != pq.PipelineStatus.OFF)


def send(connection: Any, commands: Sequence[str]) -> None:
    """Execute commands in a transaction of their own, also in a pipeline."""
    for command in commands:
        connection.execute(command)
    connection.commit()


def begins(connection: Any) -> bool:
    """Return whether the driver would send BEGIN before the next statement, where the server has no transaction."""
    return not connection.autocommit


def ask(connection: Any, question: str) -> tuple[Any, ...]:
    """Return the one row of a query of the adapter's own, whatever the user's cursors are."""
    cursor: Any = psycopg.Cursor(connection, row_factory=tuple_row)
    with cursor:
        row: tuple[Any, ...] = cursor.execute(question).fetchone()
        return row


def asks(state: ConnectionState, transaction: Transaction, connection: Any, text: Text, first: bool) -> str:
    """Return the question about the transaction's id that follows a statement; empty for none.

    Args:
        state: The state of its connection.
        transaction: The transaction.
        connection: The driver's connection.
        text: What the statement's text says.
        first: Whether it is the transaction's first one.
    """
    if first and connection.read_only is True:
        transaction.guarded = True
    if not transaction.reads:
        transaction.guarded = False
    if state.history is None or transaction.xid or transaction.guarded or text.does is Does.CONTROL:
        return ""
    # After a statement that plainly reads, an id that is not assigned shows that it wrote nothing.
    return IF_ASSIGNED if transaction.reads else ASSIGNED


def answered(state: ConnectionState, transaction: Transaction, answer: tuple[Any, ...]) -> None:
    """Note the answer to such a question."""
    xid, pid, start = answer
    transaction.none = xid is None
    if xid is not None and state.history is not None and start == state.history.start:
        transaction.xid, transaction.pid = xid, pid


def fly() -> Callable[[ConnectionState, Any, str, Any, Text, list[str], bool], bool]:
    """Return the function that executes an engine's statements; see :class:`Flights`."""
    return _execute


def _execute(
    state: ConnectionState,
    cursor: Any,
    statement: str,
    parameters: Any,
    text: Text,
    commands: list[str],
    first: bool,
) -> bool:
    connection, transaction = cursor.connection, state.transaction
    # The extended protocol takes one statement at a time.
    if transaction is None or not text.single or not _fits(cursor):
        return False
    question = asks(state, transaction, connection, text, first)
    if not commands and not question:
        cursor.execute(statement, parameters)
        return True
    asked: Any = None
    first_error: BaseException | None = None
    try:
        with connection.pipeline() as pipeline:
            try:
                for command in commands:
                    # As the driver queues commands of its own; it raises their errors.
                    connection.pgconn.send_query_params(command.encode(), None)
                    pipeline.result_queue.append(None)
                cursor.execute(statement, parameters)
                if question:
                    asked = psycopg.Cursor(connection, row_factory=tuple_row)
                    asked.execute(question)
            except psycopg.Error as error:
                # The driver would log the pipeline's own error, which only follows from this one.
                first_error = error
    except psycopg.Error as error:
        if in_block(connection):
            # The pipeline cannot be left: its server is gone, although the connection is open.
            connection.close()
        raise (first_error or error) from None
    if first_error is not None:
        raise first_error
    if asked is not None:
        with asked:
            answered(state, transaction, asked.fetchone())
    return True


def _fits(cursor: Any) -> bool:
    return (
        isinstance(cursor, psycopg.Cursor)
        and not isinstance(cursor, (psycopg.ClientCursor, psycopg.ServerCursor))
        and not in_block(cursor.connection)
    )


class _Telling:
    """The part of a cursor that tells its connection's state of statements which did not come from the engine."""

    connection: Any
    #: Whether the engine has executed its statement.
    of_engine = False

    @contextmanager
    def copy(self, statement: Any, *arguments: Any, **options: Any) -> Generator[Any, None, None]:
        connection: Any = self.connection
        state: ConnectionState = connection.workerpools
        # It begins on entering, and its rows are waited for in the block.
        copying = super().copy(statement, *arguments, **options)  # type: ignore[misc]
        with ExitStack() as stack:
            stack.enter_context(lasting(state))
            yield state.flights.execute_unseen(state, lambda: stack.enter_context(copying), self, statement)

    def stream(self, query: Any, *arguments: Any, **options: Any) -> Generator[Any, None, None]:
        connection: Any = self.connection
        state: ConnectionState = connection.workerpools
        with lasting(state), closing(super().stream(query, *arguments, **options)) as rows:  # type: ignore[misc]
            # It begins with the first row.
            first = state.flights.execute_unseen(state, lambda: list(islice(rows, 1)), self, query)
            yield from first
            yield from rows


@contextmanager
def lasting(state: ConnectionState) -> Generator[None, None, None]:
    """A statement past the engine goes on in the block: its waits have the deadline of its beginning."""
    before, state.lasting = state.lasting, deadline()
    try:
        yield
    finally:
        state.lasting = before


@lru_cache(100)
def _bounded(given: Any) -> type:
    """Return the class of a connection whose waits past the engine end at the deadline."""

    class Bounded(given):  # type: ignore[misc]
        workerpools: ConnectionState

        def wait(self, *arguments: Any, **options: Any) -> Any:
            # All of the driver's methods that wait for the server come here.
            state, wait = self.workerpools, super().wait
            if state.announced:
                return wait(*arguments, **options)
            phase = None if state.lasting is None else Phase.STATEMENT
            return state.past_engine(self, lambda: wait(*arguments, **options), phase)

        def commit(self) -> None:
            state, commit = self.workerpools, super().commit
            if state.announced:
                commit()
            else:
                state.past_engine(self, commit, Phase.COMMIT)

        def rollback(self) -> None:
            state, rollback = self.workerpools, super().rollback
            if state.announced:
                rollback()
            else:
                state.past_engine(self, rollback, Phase.ROLLBACK)

        def cancel_safe(self, *, timeout: float = 30.0) -> None:
            # It waits on a connection of its own.
            at = (self.workerpools.lasting or deadline()).at
            if at is not None:
                now = monotonic()
                timeout = min(timeout, (at if now < at else now + FLOOR) + GRACE - now)
            super().cancel_safe(timeout=timeout)

    Bounded.__module__, Bounded.__name__, Bounded.__qualname__ = given.__module__, given.__name__, given.__qualname__
    return Bounded


def _told(name: str) -> Callable[..., Any]:
    def method(self: Any, *arguments: Any, **options: Any) -> Any:
        state = self.connection.workerpools
        run = getattr(super(_Telling, self), name)
        if state.announced:
            self.of_engine = True
            return run(*arguments, **options)
        statement = arguments[0] if arguments else options.get("query")
        return state.flights.execute_unseen(state, lambda: run(*arguments, **options), self, statement)

    method.__name__ = method.__qualname__ = name
    return method


for _name in ("execute", "executemany"):
    setattr(_Telling, _name, _told(_name))


class _Fetching(_Telling):
    """The part of a server-side cursor, whose rows are fetched from the server later."""


def _fetched(name: str) -> Callable[..., Any]:
    def method(self: Any, *arguments: Any, **options: Any) -> Any:
        run = getattr(super(_Fetching, self), name)
        state = self.connection.workerpools
        return state.fetch(self, lambda: run(*arguments, **options))

    method.__name__ = method.__qualname__ = name
    return method


for _name in ("fetchone", "fetchmany", "fetchall", "scroll"):
    setattr(_Fetching, _name, _fetched(_name))


@lru_cache(100)
def _telling(factory: type, part: type) -> type:
    if issubclass(factory, part):
        return factory
    return type(
        factory.__name__, (part, factory), {"__module__": factory.__module__, "__qualname__": factory.__qualname__}
    )


def telling(connection: Any, part: type, fetching: type) -> bool:
    """Have a connection make cursors with these parts; return whether it does: cursors that a function makes do not.

    Args:
        connection: A connection of psycopg 3.
        part: The part of a cursor.
        fetching: The part of a server-side cursor.
    """
    told = True
    for name, each in (("cursor_factory", part), ("server_cursor_factory", fetching)):
        factory = getattr(connection, name)
        if isinstance(factory, type):
            setattr(connection, name, _telling(factory, each))
        else:
            told = False
    return told


def tell(connection: Any, state: ConnectionState) -> bool:
    """Have the cursors of a connection tell its state of statements which did not come from the engine.

    Args:
        connection: A connection of psycopg 3.
        state: Its state.

    Returns:
        Whether they do; cursors that a function makes do not.
    """
    connection.workerpools = state
    given: Any = type(connection)
    connection.__class__ = _bounded(given)
    return telling(connection, _Telling, _Fetching)
