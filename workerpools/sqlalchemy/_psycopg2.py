"""psycopg2: a transaction's first statement takes BEGIN and what else is due along, in one string.

The server runs the statements of a string in one round trip, and psycopg2 keeps the last result (PostgreSQL
documentation, "Multiple Statements in a Simple Query"). The driver does not see such a BEGIN: its connection is in
autocommit until COMMIT or ROLLBACK, and :class:`FlightConnection` behaves as if the driver had begun the transaction.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from operator import attrgetter
from typing import Any

import psycopg2
from psycopg2 import extensions

from workerpools.adapter import Phase
from workerpools.sqlalchemy._connection import IDLE, ConnectionState, Transaction
from workerpools.sqlalchemy._texts import NOTHING, Does, Text
from workerpools.sqlalchemy._timeouts import send_outside

__all__ = ["FlightConnection", "ask", "begins", "fly", "flying", "in_block", "said", "send", "send_outside", "tell"]

#: The id of a transaction that may have written nothing yet costs no flush of the WAL, but uses up an id: it is asked
#: for by statements that do not plainly read. The others run in a savepoint in which the server refuses to write, with
#: a snapshot taken before: a serializable transaction that may write later must not count as READ ONLY.
_GUARD = ("SELECT", "SAVEPOINT workerpools", "SET TRANSACTION READ ONLY")
_RELEASE = "RELEASE SAVEPOINT workerpools"
_UNDO = ("ROLLBACK TO SAVEPOINT workerpools", _RELEASE)

#: SQLSTATE read_only_sql_transaction.
_REFUSED = "25006"
#: The length of the application's name before the ids: PostgreSQL keeps 63 bytes. Ids of more than 18 digits together
#: lose their full stop, and are not taken for ids.
_NAME = 38
_IDS = re.compile(r" xid=(?P<xid>\d+)/(?P<pid>\d+)\.$")
#: The most statements remembered because they write although they plainly read.
_MAX_WRITERS = 1000

#: What the driver raises for a statement and parameters that do not fit, before it sends anything.
_CLIENT_SIDE = (psycopg2.Error, IndexError, KeyError, TypeError, ValueError)

_autocommit: Any = extensions.connection.autocommit
_status: Any = extensions.connection.status


class FlightConnection(extensions.connection):  # type: ignore[misc]
    """A connection whose transactions may have been begun by a first statement's string."""

    #: Whether the open transaction was begun that way.
    begun = False
    #: Whether the user is in a ``with`` block of the connection.
    entered = False
    #: The adapter's state; None before the pool knows the connection.
    workerpools: ConnectionState | None = None

    def ends(self) -> None:
        """Leave the transactions to the driver again."""
        self.begun = False
        if not self.closed:
            _autocommit.__set__(self, False)

    def release(self) -> None:
        """Allow writing before a statement that cannot do so itself, in a round trip."""
        state = self.workerpools
        if state is not None and state.transaction is not None and state.transaction.savepoint:
            state.transaction.savepoint = state.transaction.guarded = False
            self.send(_RELEASE)

    def hand_over(self) -> None:
        """Have the driver take part in the transaction: its own BEGIN, which comes next, only causes a warning."""
        self.release()
        if self.begun:
            self.ends()

    def send(self, command: str) -> None:
        """Execute a command of the adapter's own."""
        with super().cursor(cursor_factory=extensions.cursor) as cursor:
            cursor.execute(command)

    def _refuse(self, name: str) -> None:
        if self.begun and self.get_transaction_status() != IDLE:
            raise psycopg2.ProgrammingError(f"{name} cannot be used inside a transaction")
        if self.begun:
            self.ends()

    # The driver's methods, to which the transaction is to look like the driver's own.

    def cursor(self, name: Any = None, cursor_factory: Any = None, *arguments: Any, **options: Any) -> Any:
        factory = cursor_factory or self.cursor_factory or extensions.cursor
        if isinstance(factory, type):
            factory = flying(factory, name is not None)
        else:
            self.hand_over()
        return super().cursor(name, factory, *arguments, **options)

    def __enter__(self) -> Any:
        self.entered = True
        return super().__enter__()

    def __exit__(self, *raised: Any) -> Any:
        self.entered = False
        return super().__exit__(*raised)

    def commit(self) -> None:
        if (state := self.workerpools) is not None and not state.announced:
            state.past_engine(self, self.commit, Phase.COMMIT)
            return
        if not self.begun:
            super().commit()
            return
        try:
            with super().cursor(cursor_factory=extensions.cursor) as cursor:
                cursor.execute("COMMIT")
        finally:
            self.begun = False
            if not self.closed:
                _autocommit.__set__(self, False)

    def rollback(self) -> None:
        if (state := self.workerpools) is not None and not state.announced:
            state.past_engine(self, self.rollback, Phase.ROLLBACK)
            return
        if not self.begun:
            super().rollback()
            return
        try:
            self.send("ROLLBACK")
        finally:
            self.ends()

    @property
    def autocommit(self) -> bool:
        return not self.begun and bool(_autocommit.__get__(self))

    @autocommit.setter
    def autocommit(self, value: bool) -> None:
        self._refuse("autocommit")
        _autocommit.__set__(self, value)

    @property
    def status(self) -> int:
        return extensions.STATUS_BEGIN if self.begun else int(_status.__get__(self))

    def set_session(self, *arguments: Any, **options: Any) -> None:
        self._refuse("set_session")
        super().set_session(*arguments, **options)

    def set_isolation_level(self, level: Any) -> None:
        if self.begun:
            self.rollback()
        super().set_isolation_level(level)

    def set_client_encoding(self, encoding: str) -> None:
        if self.begun:
            self.rollback()
        super().set_client_encoding(encoding)

    def reset(self) -> None:
        if self.begun:
            self.rollback()
        super().reset()

    def tpc_begin(self, xid: Any) -> None:
        self._refuse("tpc_begin")
        super().tpc_begin(xid)

    def lobject(
        self, oid: int = 0, mode: str = "", new_oid: int = 0, new_file: Any = None, lobject_factory: Any = None
    ) -> Any:
        self.hand_over()
        factory = lobject_factory or extensions.lobject
        if isinstance(factory, type):
            factory = _large_object(factory)
        made = _past_engine(self, lambda: super(FlightConnection, self).lobject(oid, mode, new_oid, new_file, factory))
        if (state := self.workerpools) is not None:
            if state.transaction is None:
                state.transaction = Transaction()
            state.transaction.reads = False
        return made


def _past_engine(connection: FlightConnection, run: Callable[[], Any], phase: Phase | None = Phase.STATEMENT) -> Any:
    state = connection.workerpools
    return run() if state is None or state.announced else state.past_engine(connection, run, phase)


def _bounded(name: str, phase: Phase | None) -> Callable[..., Any]:
    def method(self: Any, *arguments: Any) -> Any:
        return _past_engine(self, lambda: getattr(super(FlightConnection, self), name)(*arguments), phase)

    method.__name__ = method.__qualname__ = name
    return method


for _name, _phase in (
    ("tpc_prepare", Phase.COMMIT),
    ("tpc_commit", Phase.COMMIT),
    ("tpc_rollback", None),
    ("tpc_recover", Phase.STATEMENT),
):
    setattr(FlightConnection, _name, _bounded(_name, _phase))


@lru_cache(100)
def _large_object(factory: type) -> type:
    """Return the class of a large object, each of whose methods asks the server."""

    def bounded(name: str) -> Callable[..., Any]:
        def method(self: Any, *arguments: Any) -> Any:
            return _past_engine(self.workerpools, lambda: getattr(super(made, self), name)(*arguments))

        method.__name__ = method.__qualname__ = name
        return method

    def init(self: Any, connection: FlightConnection, *arguments: Any) -> None:
        super(made, self).__init__(connection, *arguments)
        self.workerpools = connection

    names = ("read", "write", "seek", "tell", "truncate", "close", "export", "unlink")
    made: Any = type(
        factory.__name__,
        (factory,),
        {
            "__module__": factory.__module__,
            "__qualname__": factory.__qualname__,
            "__init__": init,
            **{name: bounded(name) for name in names if hasattr(factory, name)},
        },
    )
    return made  # type: ignore[no-any-return]


def _refusing(name: str) -> property:
    given: Any = getattr(extensions.connection, name)

    def change(self: FlightConnection, value: Any) -> None:
        self._refuse(name)
        given.__set__(self, value)

    return property(given.__get__, change)


for _name in ("isolation_level", "readonly", "deferrable"):
    setattr(FlightConnection, _name, _refusing(_name))


class _Flying:
    """The part of a cursor that tells its connection's state of statements which did not come from the engine."""

    name: Any


def _told(name: str) -> Callable[..., Any]:
    def method(self: Any, *arguments: Any, **options: Any) -> Any:
        connection = self.connection
        state = connection.workerpools
        run = getattr(super(_Flying, self), name)
        if state is None or state.announced:
            if self.name is not None:
                self.of_engine = True
                connection.hand_over()
            return run(*arguments, **options)
        (connection.release if self.name is None else connection.hand_over)()
        statement = arguments[0] if arguments else None
        return state.flights.execute_unseen(state, lambda: run(*arguments, **options), self, statement)

    method.__name__ = method.__qualname__ = name
    return method


for _name in ("execute", "executemany", "callproc", "copy_expert", "copy_from", "copy_to"):
    setattr(_Flying, _name, _told(_name))


class _Fetching(_Flying):
    """The part of a named cursor, whose rows are fetched from the server later."""

    #: Whether the engine has executed its statement.
    of_engine = False


def _fetched(name: str) -> Callable[..., Any]:
    def method(self: Any, *arguments: Any, **options: Any) -> Any:
        run = getattr(super(_Fetching, self), name)
        state = self.connection.workerpools
        if state is None or state.announced:
            return run(*arguments, **options)
        return state.fetch(self, lambda: run(*arguments, **options))

    method.__name__ = method.__qualname__ = name
    return method


for _name in ("fetchone", "fetchmany", "fetchall", "scroll", "__next__"):
    setattr(_Fetching, _name, _fetched(_name))


@lru_cache(100)
def flying(factory: type, named: bool) -> type:
    """Return the class of a cursor or connection that takes part in flights.

    Args:
        factory: A class of the driver or the user.
        named: Whether it is that of a named cursor.
    """
    if factory is extensions.connection:
        return FlightConnection
    part: type = FlightConnection if issubclass(factory, extensions.connection) else _Fetching if named else _Flying
    if issubclass(factory, part):
        return factory
    return type(
        factory.__name__, (part, factory), {"__module__": factory.__module__, "__qualname__": factory.__qualname__}
    )


def ask(connection: Any, question: str) -> tuple[Any, ...]:
    """Return the one row of a query of the adapter's own, whatever the user's cursors are."""
    with extensions.connection.cursor(connection, cursor_factory=extensions.cursor) as cursor:
        cursor.execute(question)
        row = cursor.fetchone()
        assert row is not None
        return tuple(row)


#: What the cursors of most users are; they are executed without a call of ours.
_CURSOR = flying(extensions.cursor, False)
_execute: Any = extensions.cursor.execute


def tell(connection: Any, state: ConnectionState) -> bool:
    """Have a connection and its cursors tell ``state`` of statements which did not come from the engine.

    Returns:
        Whether they do; a connection of a user's own class does not.
    """
    if not isinstance(connection, FlightConnection):
        return False
    connection.workerpools = state
    return True


said: Callable[[Any], str | None] = attrgetter("statusmessage")


def in_block(connection: Any) -> bool:
    """Return whether the user is in a ``with`` block of the connection: psycopg2 begins a transaction in any case."""
    return isinstance(connection, FlightConnection) and connection.entered


def send(connection: Any, commands: Sequence[str]) -> None:
    """Execute commands in a transaction of their own, also in a ``with`` block."""
    connection.send(";".join(commands))
    extensions.connection.commit(connection)


def begins(connection: Any) -> bool:
    """Return whether the driver would send BEGIN before the next statement, where the server has no transaction."""
    if type(connection) is not FlightConnection:
        # A user's own may be of any class.
        return bool(not connection.autocommit and connection.status == extensions.STATUS_READY)
    return not (connection.begun or _autocommit.__get__(connection)) and bool(
        _status.__get__(connection) == extensions.STATUS_READY
    )


def fly() -> Callable[[ConnectionState, Any, str, Any, Text, list[str], bool], bool]:
    """Return the function that executes an engine's statements; see :class:`Flights`."""
    writers: set[str] = set()

    def execute(
        state: ConnectionState,
        cursor: Any,
        statement: str,
        parameters: Any,
        text: Text,
        commands: list[str],
        first: bool,
    ) -> bool:
        connection: Any = cursor.connection
        transaction = state.transaction
        if transaction is None or text is NOTHING or cursor.name is not None or not issubclass(type(cursor), _Flying):
            return False
        wants_id, before = False, None
        if state.history is not None:
            if text.does is Does.READ and statement not in writers:
                if first:
                    transaction.guarded = True
                    transaction.savepoint = connection.readonly is not True
                    commands += _GUARD if transaction.savepoint else ()
            else:
                if transaction.savepoint:
                    commands.insert(0, _RELEASE)
                transaction.savepoint = transaction.guarded = False
                wants_id = state.direct and not transaction.xid and text.does is not Does.CONTROL
                if wants_id:
                    before = connection.get_parameter_status("application_name")
                    commands.append(_asking(before))
        if first:
            # The next string begins a transaction.
            _autocommit.__set__(connection, True)
            connection.begun = True
        try:
            string = statement
            if commands:
                # _with(), without the call.
                prefix = ";".join((*commands, "\n"))
                string = (prefix.replace("%", "%%") if parameters else prefix) + statement
            if type(cursor) is _CURSOR:
                _execute(cursor, string, parameters)
            else:
                cursor.execute(string, parameters)
        except BaseException as error:
            if connection.closed:
                raise
            code = getattr(error, "pgcode", None)
            unsent = first and connection.get_transaction_status() == IDLE
            if unsent and code is not None:
                # A string with a syntax error is rejected as a whole.
                connection.send(";".join(commands))
                cursor.execute(statement, parameters)
            elif code is None and isinstance(error, _CLIENT_SIDE):
                # Nothing was sent. The driver's own error does not know of the commands.
                if unsent:
                    connection.ends()
                cursor.execute(statement, parameters)
            elif code == _REFUSED and transaction.savepoint:
                # It writes, although its text does not tell.
                if len(writers) < _MAX_WRITERS:
                    writers.add(statement)
                transaction.savepoint = transaction.guarded = transaction.reads = False
                wants_id, before = state.direct, connection.get_parameter_status("application_name")
                cursor.execute(_with([*_UNDO, _asking(before)], statement, parameters), parameters)
            else:
                if unsent:
                    connection.ends()
                raise
        if wants_id:
            after = connection.get_parameter_status("application_name")
            if after != before and (ids := _IDS.search(after or "")):
                transaction.xid, transaction.pid = ids["xid"], int(ids["pid"])
        return True

    return execute


def _with(commands: Sequence[str], statement: str, parameters: Any) -> str:
    # The statement starts a line of its own, for the server's messages.
    prefix = ";".join((*commands, "\n"))
    return (prefix.replace("%", "%%") if parameters else prefix) + statement


@lru_cache(100)
def _asking(name: str | None) -> str:
    """Return a command after which the server reports the transaction's id and process in the application's name.

    psycopg2 drops the results of all but the last statement; libpq keeps the settings that the server reports.

    Args:
        name: The application's name.
    """
    kept = "".join(c for c in _IDS.sub("", name or "")[:_NAME] if c.isalnum() or c in " ._:/=-")
    return f"SELECT set_config('application_name','{kept} xid='||pg_current_xact_id()||'/'||pg_backend_pid()||'.',true)"
