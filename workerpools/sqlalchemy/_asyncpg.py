"""asyncpg: what is known of a transaction without libpq, and of the driver's own connection.

It has no pipeline that is open to others: what :mod:`workerpools.sqlalchemy._psycopg_async` sends along with a
statement takes round trips of its own here.
"""

from __future__ import annotations

import os
import socket
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from contextvars import Context
from functools import lru_cache, partial
from typing import Any

import asyncpg
import sqlalchemy
from asyncpg import connect_utils
from sqlalchemy import event
from sqlalchemy.util import await_only

from workerpools.adapter import Opening
from workerpools.sqlalchemy._connection import IDLE, IN_ERROR, ConnectionState, raw
from workerpools.sqlalchemy._timeouts import FLOOR

__all__ = [
    "DEFAULT",
    "ask",
    "begins",
    "connection_class",
    "fly",
    "in_block",
    "observe",
    "said",
    "send",
    "send_outside",
    "tell",
]

#: The driver's own class of connections.
DEFAULT: Any = asyncpg.Connection

#: libpq's PQtransactionStatus of an open transaction, and of a closed connection.
_IN_TRANSACTION, _UNKNOWN = 2, 4

#: As for libpq's drivers; ``TCP_USER_TIMEOUT`` in milliseconds, the others in seconds.
_SOCKET_OPTIONS = (
    (socket.SOL_SOCKET, "SO_KEEPALIVE", 1),
    (socket.IPPROTO_TCP, "TCP_KEEPIDLE", 10),
    (socket.IPPROTO_TCP, "TCP_KEEPINTVL", 5),
    (socket.IPPROTO_TCP, "TCP_KEEPCNT", 3),
    (socket.IPPROTO_TCP, "TCP_USER_TIMEOUT", 25_000),
)


class _Status:
    """Returns a connection's PQtransactionStatus, without a round trip.

    asyncpg tells whether a transaction is open, but not whether it can only be rolled back: that is so from a
    statement's error until a statement, ROLLBACK TO, succeeds.
    """

    def __init__(self, connection: Any) -> None:
        self._connection = weakref.ref(connection)
        self.failed = False

    def __call__(self) -> int:
        connection = self._connection()
        if connection is None or connection.is_closed():
            return _UNKNOWN
        if not connection.is_in_transaction():
            self.failed = False
            return IDLE
        return IN_ERROR if self.failed else _IN_TRANSACTION


#: By the driver's connection.
_states: weakref.WeakKeyDictionary[Any, ConnectionState] = weakref.WeakKeyDictionary()


def in_block(connection: Any) -> bool:
    """Return whether the answers to statements are awaited later: never."""
    return False


def said(cursor: Any) -> str | None:
    """Return the server's answer to a cursor's last statement: SQLAlchemy does not keep it."""
    return None


def begins(connection: Any) -> bool:
    """Return whether SQLAlchemy would send BEGIN before the next statement, where there is no transaction."""
    return not connection.autocommit


def ask(connection: Any, question: str) -> tuple[Any, ...]:
    """Return the one row of a query of the adapter's own; its errors are SQLAlchemy's, as for any statement."""
    try:
        return tuple(await_only(raw(connection).fetchrow(question)))
    except Exception as error:
        # It raises.
        if connection is not raw(connection):
            connection._handle_exception(error)
        raise


def send(connection: Any, commands: Sequence[str]) -> None:
    """Execute commands in a transaction of their own."""
    send_outside(connection, ";".join(commands))


def send_outside(connection: Any, statements: str) -> None:
    """Execute statements where no transaction is open, as one transaction."""
    connection.plain(statements, begin=False)


def fly() -> None:
    """Return no function: statements do not share round trips."""
    return


@lru_cache(100)
def connection_class(given: Any) -> type:
    """Return the class of the driver's connection, with its socket's descriptor; ``given`` is the user's."""

    class Connection(given):  # type: ignore[misc]
        __slots__ = ()

        def fileno(self) -> int:
            return int(self._transport.get_extra_info("socket").fileno())

        def _cancel_current_command(self, *arguments: Any) -> None:
            # The request to cancel a statement is a task of its own. It belongs to no body, whose end would end it.
            Context().run(super()._cancel_current_command, *arguments)

    return _named(Connection, given)


@lru_cache(100)
def _adapted(given: Any) -> type:
    """Return the class of what SQLAlchemy makes of a connection."""

    class Adapted(given):  # type: ignore[misc]
        __slots__ = ()

        @property
        def closed(self) -> bool:
            return bool(self.driver_connection.is_closed())

        def cursor(self, *arguments: Any, **options: Any) -> Any:
            cursor = super().cursor(*arguments, **options)
            own: Any = type(cursor)
            cursor.__class__ = _telling(own)
            return cursor

        async def _terminate_graceful_close(self) -> None:
            # What is cancelled has a bound for its clean-up; SQLAlchemy's own limit is two seconds.
            await self.driver_connection.close(timeout=FLOOR)
            adapted: Any = self
            adapted._transaction = None

        def plain(self, statement: str, begin: bool = True) -> None:
            """Execute statements that no prepared statement is to be kept for."""
            try:
                if begin and self._transaction is None:
                    await_only(self._start_transaction())
                await_only(self.driver_connection.execute(statement))
            except Exception as error:
                self._handle_exception(error)

    return _named(Adapted, given)


@lru_cache(100)
def _telling(given: Any) -> type:
    """Return the class of a cursor that tells of statements which did not come from the engine."""

    class Telling(given):  # type: ignore[misc]
        __slots__ = ()

        @property
        def connection(self) -> Any:
            return self._adapt_connection

        def execute(self, operation: Any, parameters: Any = None) -> Any:
            return _told(self, partial(super().execute, operation, parameters), operation)

        def executemany(self, operation: Any, seq_of_parameters: Any) -> Any:
            return _told(self, partial(super().executemany, operation, seq_of_parameters), operation)

    return _named(Telling, given)


def _named(made: type, given: Any) -> type:
    made.__module__, made.__name__, made.__qualname__ = given.__module__, given.__name__, given.__qualname__
    return made


def _told(cursor: Any, run: Callable[[], Any], statement: Any) -> Any:
    state = _states.get(raw(cursor.connection))
    if state is None or state.announced:
        return run()
    return state.flights.execute_unseen(state, run, cursor, statement)


def tell(connection: Any, state: ConnectionState) -> bool:
    """Have the cursors of a connection tell its state of statements which did not come from the engine.

    Args:
        connection: A connection of asyncpg, as SQLAlchemy's dialect sees it.
        state: Its state.

    Returns:
        True. The driver's own connection tells nothing: see :func:`observe`.
    """
    _states[raw(connection)] = state
    state.status = _Status(raw(connection))
    return True


def observe(engine: sqlalchemy.Engine, opening: Opening) -> None:
    """Have an engine's connections tell what libpq's do. Call it before the engine's other listeners are attached.

    Args:
        engine: The engine, not yet used.
        opening: Its opening.
    """
    dialect: Any = engine.dialect

    @event.listens_for(engine, "connect")
    def made(connection: Any, record: object) -> None:
        driver = raw(connection)
        inner: Any = type(driver)
        outer: Any = type(connection)
        if not hasattr(driver, "fileno"):
            # Opened by the user.
            driver.__class__ = connection_class(inner)
        connection.__class__ = _adapted(outer)
        _set_options(driver.fileno())

    _retrieve_errors_of_upgrades()

    for name in ("do_execute", "do_executemany", "do_execute_no_params"):
        setattr(dialect, name, _noting(getattr(dialect, name), dialect))

    hand_out = dialect.get_driver_connection

    def get_driver_connection(connection: Any) -> Any:
        # What is done with it is not seen.
        opening.effect(f"a raw connection of {opening.resource!r}")
        return hand_out(connection)

    dialect.get_driver_connection = get_driver_connection


def _retrieve_errors_of_upgrades() -> None:
    """Have a connect that is cancelled leave no error to the event loop. Idempotent.

    The protocol that waits for the answer to the request for TLS exists before asyncpg awaits it.
    """
    given: Any = getattr(connect_utils, "TLSUpgradeProto", None)
    if given is None or hasattr(given, _RETRIEVES):
        return

    class Upgrade(given):  # type: ignore[misc]
        def connection_lost(self, exc: Exception | None) -> None:
            super().connection_lost(exc)
            if not self.on_data.cancelled():
                # Whoever awaits it is told all the same.
                self.on_data.exception()

    setattr(Upgrade, _RETRIEVES, True)
    connect_utils.TLSUpgradeProto = _named(Upgrade, given)


_RETRIEVES = "__workerpools__"


def _noting(execute: Callable[..., Any], dialect: Any) -> Callable[..., Any]:
    def noted(cursor: Any, *arguments: Any, **options: Any) -> Any:
        state = _states.get(raw(cursor._adapt_connection))
        status: Any = None if state is None else state.status
        try:
            result = execute(cursor, *arguments, **options)
        except dialect.loaded_dbapi.Error:
            if status is not None:
                status.failed = True
            raise
        if status is not None:
            status.failed = False
        return result

    return noted


def _set_options(number: int) -> None:
    with suppress(OSError), socket.socket(fileno=os.dup(number)) as duplicate:
        if duplicate.family == socket.AF_UNIX:
            return
        for level, name, value in _SOCKET_OPTIONS:
            if (option := getattr(socket, name, None)) is not None:
                duplicate.setsockopt(level, option, value)
