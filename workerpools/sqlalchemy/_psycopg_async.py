"""psycopg 3 under asyncio: what :mod:`workerpools.sqlalchemy._psycopg` does, awaited.

SQLAlchemy runs its synchronous part in a greenlet, which hands to the event loop what is to be awaited. So does what is
here for statements that do not come from the engine: the rest of the adapter stays synchronous, and waits in greenlets.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from functools import lru_cache, partial
from operator import attrgetter
from time import monotonic
from typing import Any

import psycopg
from psycopg.rows import tuple_row
from sqlalchemy.util import await_only, greenlet_spawn

from workerpools.adapter import Phase, deadline
from workerpools.sqlalchemy import _psycopg
from workerpools.sqlalchemy._connection import ConnectionState, raw
from workerpools.sqlalchemy._psycopg import answered, asks, begins, lasting, telling
from workerpools.sqlalchemy._texts import Text
from workerpools.sqlalchemy._timeouts import FLOOR, GRACE, send_outside

__all__ = ["ask", "begins", "fly", "in_block", "said", "send", "send_outside", "tell"]

#: What the server has answered to a cursor's last statement.
said: Callable[[Any], str | None] = attrgetter("_cursor.statusmessage")


def in_block(connection: Any) -> bool:
    """Return whether the user is in a pipeline, in which the answers to statements are awaited later."""
    return _psycopg.in_block(raw(connection))


def send(connection: Any, commands: Sequence[str]) -> None:
    """Execute commands in a transaction of their own, also in a pipeline."""
    for command in commands:
        await_only(raw(connection).execute(command))
    connection.commit()


def ask(connection: Any, question: str) -> tuple[Any, ...]:
    """Return the one row of a query of the adapter's own, whatever the user's cursors are."""
    return await_only(_asked(raw(connection), question))


async def _asked(connection: Any, question: str) -> tuple[Any, ...]:
    async with psycopg.AsyncCursor(connection, row_factory=tuple_row) as cursor:
        await cursor.execute(question.encode())
        row = await cursor.fetchone()
        assert row is not None
        return row


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
    awaited: Any = cursor._cursor
    connection, transaction = awaited.connection, state.transaction
    # The extended protocol takes one statement at a time.
    if transaction is None or not text.single or not _fits(awaited):
        return False
    question = asks(state, transaction, connection, text, first)
    if commands or question:
        awaited.flight = flight = _Flight(commands, question)
        cursor.execute(statement, parameters)
        if flight.answer is not None:
            answered(state, transaction, flight.answer)
    else:
        cursor.execute(statement, parameters)
    return True


def _fits(cursor: Any) -> bool:
    # A cursor that a user's function has made cannot take anything along.
    return (
        isinstance(cursor, _Telling)
        and not isinstance(cursor, (psycopg.AsyncClientCursor, psycopg.AsyncServerCursor))
        and not _psycopg.in_block(cursor.connection)
    )


class _Flight:
    """What shares the round trip of a cursor's next statement.

    Attributes:
        commands: Those before it.
        question: The query after it; empty for none.
        answer: The row of that; None without one.
    """

    def __init__(self, commands: list[str], question: str) -> None:
        self.commands = commands
        self.question = question
        self.answer: tuple[Any, ...] | None = None

    async def execute(self, connection: Any, run: Callable[[], Awaitable[object]]) -> None:
        """Execute a statement, and what goes with it, in one pipeline."""
        asked: Any = None
        first_error: BaseException | None = None
        try:
            async with connection.pipeline() as pipeline:
                try:
                    for command in self.commands:
                        # As the driver queues commands of its own; it raises their errors.
                        connection.pgconn.send_query_params(command.encode(), None)
                        pipeline.result_queue.append(None)
                    await run()
                    if self.question:
                        asked = psycopg.AsyncCursor(connection, row_factory=tuple_row)
                        await asked.execute(self.question)
                except psycopg.Error as error:
                    # The driver would log the pipeline's own error, which only follows from this one.
                    first_error = error
        except psycopg.Error as error:
            if _psycopg.in_block(connection):
                # The pipeline cannot be left: its server is gone, although the connection is open.
                await connection.close()
            raise (first_error or error) from None
        if first_error is not None:
            raise first_error
        if asked is not None:
            async with asked:
                self.answer = await asked.fetchone()


class _Unseen:
    """A cursor of the driver, as :class:`Flights` sees one."""

    def __init__(self, cursor: Any) -> None:
        self._cursor = cursor
        self.connection = cursor.connection.adapted()


async def _unseen(cursor: Any, run: Callable[[], Awaitable[Any]], statement: Any) -> Any:
    """Execute a statement that did not come from the engine, and return the result of ``run``."""
    state: ConnectionState = cursor.connection.workerpools
    return await greenlet_spawn(
        state.flights.execute_unseen, state, lambda: await_only(run()), _Unseen(cursor), statement
    )


class _Telling:
    """The part of a cursor that tells its connection's state of statements which did not come from the engine."""

    connection: Any
    #: Whether the engine has executed its statement.
    of_engine = False
    #: What goes with the engine's next statement; None for nothing.
    flight: _Flight | None = None

    async def execute(self, query: Any, *arguments: Any, **options: Any) -> Any:
        run = partial(super().execute, query, *arguments, **options)  # type: ignore[misc]
        if not self.connection.workerpools.announced:
            return await _unseen(self, run, query)
        self.of_engine = True
        flight, self.flight = self.flight, None
        if flight is None:
            return await run()
        await flight.execute(self.connection, run)
        return self

    async def executemany(self, query: Any, *arguments: Any, **options: Any) -> None:
        run = partial(super().executemany, query, *arguments, **options)  # type: ignore[misc]
        if self.connection.workerpools.announced:
            self.of_engine = True
            await run()
        else:
            await _unseen(self, run, query)

    @asynccontextmanager
    async def copy(self, statement: Any, *arguments: Any, **options: Any) -> AsyncGenerator[Any, None]:
        # It begins on entering, and its rows are waited for in the block.
        copying = super().copy(statement, *arguments, **options)  # type: ignore[misc]
        with lasting(self.connection.workerpools):
            async with AsyncExitStack() as stack:
                yield await _unseen(self, lambda: stack.enter_async_context(copying), statement)

    async def stream(self, query: Any, *arguments: Any, **options: Any) -> AsyncGenerator[Any, None]:
        rows: AsyncGenerator[Any, None] = super().stream(query, *arguments, **options)  # type: ignore[misc]
        with lasting(self.connection.workerpools):
            try:
                # It begins with the first row.
                for row in await _unseen(self, lambda: _first(rows), query):
                    yield row
                async for row in rows:
                    yield row
            finally:
                await rows.aclose()


async def _first(rows: AsyncGenerator[Any, None]) -> list[Any]:
    async for row in rows:
        return [row]
    return []


class _Fetching(_Telling):
    """The part of a server-side cursor, whose rows are fetched from the server later."""


def _fetched(name: str) -> Callable[..., Any]:
    async def method(self: Any, *arguments: Any, **options: Any) -> Any:
        run = getattr(super(_Fetching, self), name)
        state = self.connection.workerpools
        return await greenlet_spawn(state.fetch, self, lambda: await_only(run(*arguments, **options)))

    method.__name__ = method.__qualname__ = name
    return method


for _name in ("fetchone", "fetchmany", "fetchall", "scroll"):
    setattr(_Fetching, _name, _fetched(_name))


@lru_cache(100)
def _bounded(given: Any) -> type:
    """Return the class of a connection whose waits past the engine end at the deadline."""

    class Bounded(given):  # type: ignore[misc]
        workerpools: ConnectionState
        #: Returns it as SQLAlchemy's dialect sees it.
        adapted: Callable[[], Any]

        async def wait(self, *arguments: Any, **options: Any) -> Any:
            # All of the driver's methods that wait for the server come here.
            state = self.workerpools
            if state.announced:
                return await super().wait(*arguments, **options)
            phase = None if state.lasting is None else Phase.STATEMENT
            return await self._past_engine(partial(super().wait, *arguments, **options), phase)

        async def commit(self) -> None:
            if self.workerpools.announced:
                await super().commit()
            else:
                await self._past_engine(super().commit, Phase.COMMIT)

        async def rollback(self) -> None:
            if self.workerpools.announced:
                await super().rollback()
            else:
                await self._past_engine(super().rollback, Phase.ROLLBACK)

        async def _past_engine(self, run: Callable[[], Awaitable[Any]], phase: Phase | None) -> Any:
            return await greenlet_spawn(self.workerpools.past_engine, self, lambda: await_only(run()), phase)

        async def cancel_safe(self, *, timeout: float = 30.0) -> None:
            # It waits on a connection of its own.
            state, now = self.workerpools, monotonic()
            at = (state.lasting or deadline()).at
            if at is None:
                # The driver would wait for the cancelled statement's answer longer than a coroutine has to clean up.
                at = now + FLOOR
                state.wait(at)
            timeout = min(timeout, (at if now < at else now + FLOOR) + GRACE - now)
            await super().cancel_safe(timeout=timeout)

    Bounded.__module__, Bounded.__name__, Bounded.__qualname__ = given.__module__, given.__name__, given.__qualname__
    return Bounded


@lru_cache(100)
def _adapted(given: Any) -> Any:
    """Return the class of what SQLAlchemy makes of a connection, with what BEGIN depends on."""

    class Adapted(given):  # type: ignore[misc]
        __slots__ = ()

        @property
        def isolation_level(self) -> Any:
            return self.driver_connection.isolation_level

    Adapted.__module__, Adapted.__name__, Adapted.__qualname__ = given.__module__, given.__name__, given.__qualname__
    return Adapted


def tell(connection: Any, state: ConnectionState) -> bool:
    """Have the cursors of a connection tell its state of statements which did not come from the engine.

    Args:
        connection: A connection of psycopg 3, as SQLAlchemy's dialect sees it.
        state: Its state.

    Returns:
        Whether they do; cursors that a function makes do not.
    """
    driver = raw(connection)
    inner: Any = type(driver)
    outer: Any = type(connection)
    connection.__class__ = _adapted(outer)
    driver.workerpools = state
    driver.adapted = lambda: connection
    driver.__class__ = _bounded(inner)
    return telling(driver, _Telling, _Fetching)
