"""The connection pool of an engine: bounds and counts its waits; checks, replaces and reports its connections."""

from __future__ import annotations

import inspect
import logging
import math
import random
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from typing import Any

import sqlalchemy
from sqlalchemy import event
from sqlalchemy.engine import Connection
from sqlalchemy.exc import DisconnectionError, InvalidatePoolError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.pool import Pool, PoolProxiedConnection, QueuePool, SingletonThreadPool, StaticPool
from sqlalchemy.util import queue

from workerpools.adapter import Due, Lifetime, Opening, current, deadline, due, in_attempt
from workerpools.errors import DeadlineExceeded
from workerpools.sqlalchemy._connecting import ASKING, Limit, begin, end, finish, opened
from workerpools.sqlalchemy._connection import KEY, ConnectionState
from workerpools.sqlalchemy._driver import STRINGS, attempts, fitted, named, ports
from workerpools.sqlalchemy._flight import Flights
from workerpools.sqlalchemy._nested import OwnLocks, exhausted, refuse_endless_wait
from workerpools.sqlalchemy._resolving import introduce
from workerpools.sqlalchemy._timeouts import ask

__all__ = ["DeadlineQueuePool", "PoolEvents", "counted"]

logger = logging.getLogger("workerpools")

_POLL = 0.005


class DeadlineQueuePool(QueuePool):
    """SQLAlchemy's ``QueuePool``, whose waits also end at the task's deadline.

    SQLAlchemy has one timeout for all waiters. A task with less time than that waits here until a connection is free,
    then takes it. If a task without a deadline takes it first, the wait goes on, bounded by ``timeout`` as usual.

    Args:
        creator: Opens a connection.
        pool_size: As for ``QueuePool``.
        max_overflow: As for ``QueuePool``.
        timeout: As for ``QueuePool``, in seconds.
        use_lifo: As for ``QueuePool``.
        options: The options of ``sqlalchemy.pool.Pool``.
    """

    def __init__(
        self,
        creator: Any,
        pool_size: int = 5,
        max_overflow: int = 10,
        timeout: float = 30.0,
        use_lifo: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(creator, pool_size, max_overflow, timeout, use_lifo, **options)
        #: The maximum number of connections; None without a limit.
        self.limit = pool_size + max_overflow if pool_size > 0 and max_overflow >= 0 else None
        self._turn = threading.Lock()

    def connect_in_turn(self, limit: int) -> PoolProxiedConnection:
        """Wait for a connection of an exhausted pool, one waiter with a deadline at a time.

        Raises:
            DeadlineExceeded: None became free before the task's deadline.
            sqlalchemy.exc.TimeoutError: None became free within ``timeout``.
        """
        remaining = deadline().remaining()
        if remaining is None or remaining > self.timeout():
            return QueuePool.connect(self)
        until = time.monotonic() + remaining
        # One at a time, so that no two waiters see the same free connection.
        if self._turn.acquire(timeout=remaining):
            try:
                while self.checkedout() >= limit and time.monotonic() < until:
                    time.sleep(_POLL)
                if self.checkedout() < limit:
                    return QueuePool.connect(self)
            finally:
                self._turn.release()
        raise DeadlineExceeded(
            f"none of the connection pool's {limit} connections became free before the task's deadline"
        )


class _Retired(DisconnectionError):
    """Makes the pool replace a live connection."""

    def __init__(self, reason: str) -> None:
        super().__init__("this connection will be replaced")
        self.reason = reason


def counted(pool_class: type[Pool], events: PoolEvents) -> type[Pool]:
    """Return a subclass of ``pool_class`` that counts waits: events fire only after a wait, and not on a timeout.

    It closes a connection to be recycled on checkin, after all listeners have run.
    """
    opening = events.opening

    def give_back(pool: Any, record: Any) -> None:
        try:
            if events.since:
                events.retire(record)
        finally:
            pool_class._do_return_conn(pool, record)

    bounded = issubclass(pool_class, DeadlineQueuePool)

    def connect(pool: Any) -> Any:
        if ASKING.get():
            return pool_class.connect(pool)
        lease = opening.wait()
        try:
            if bounded and pool.limit is not None and pool.checkedout() >= pool.limit:
                refuse_endless_wait(opening)
                connection = pool.connect_in_turn(pool.limit)
            else:
                connection = pool_class.connect(pool)
        except BaseException as error:
            lease.gave_up(timed_out=isinstance(error, (PoolTimeoutError, DeadlineExceeded)))
            # A time limit or the end of a greenlet may have interrupted connecting.
            finish()
            opening.descriptors.gave_up()
            if isinstance(error, PoolTimeoutError):
                opening.failed(error, exhausted(opening))
            raise
        state: ConnectionState = connection.info[KEY]
        took, state.took = state.took, None
        state.lease = lease
        lease.acquired(creating=took or 0.0, reused=took is None, reclaim=state.reclaim)
        if events.own_locks is not None and lease.attempt is not None and lease.attempt.parent is not None:
            events.own_locks.watch(connection, lease)
        return connection

    # SQLAlchemy's loggers and repr show the original name.
    attributes = {
        "__module__": pool_class.__module__,
        "__qualname__": pool_class.__qualname__,
        "connect": connect,
        # Implemented by every pool class of SQLAlchemy.
        "_do_return_conn": give_back,
        _COUNTED: True,
    }
    return type(pool_class.__name__, (pool_class,), attributes)


_COUNTED = "workerpools_counted"


class PoolEvents:
    """Reports, checks and replaces the connections of one engine.

    The engine's ``dispose()`` is not used for recycling: it forgets connections in use, which then close unreported,
    and allows others beyond the pool's limit.

    Args:
        opening: The engine's opening.
        lifetime: How long connections are kept and trusted.
        resolves: Whether lost COMMITs are resolved.
        connect_timeout: Time limit of the first questions on a connection, in seconds.
        session_settings: Whether session settings stay with their connection; they do not behind PgBouncer.

    Attributes:
        since: Connections begun before this :func:`time.monotonic` time will be replaced; 0 for none.
    """

    def __init__(
        self, opening: Opening, lifetime: Lifetime, *, resolves: bool, connect_timeout: float, session_settings: bool
    ) -> None:
        self.opening = opening
        self.since = 0.0
        self._lifetime = lifetime
        self._resolves = resolves
        self._connect_timeout = connect_timeout
        self._session_settings = session_settings
        #: Idle time below which only a connection's age needs checking, in seconds.
        self._trusted = min(
            math.inf if lifetime.check_after is None else lifetime.check_after,
            math.inf if lifetime.max_idle is None else lifetime.max_idle,
        )
        #: Connections opened before this time are suspect, because one of them was found dead.
        self._suspect = 0.0
        self._states: weakref.WeakSet[ConnectionState] = weakref.WeakSet()
        #: Ends waits of nested runs for themselves; None where the server does not tell them.
        self.own_locks: OwnLocks | None = None
        #: The statements of a PostgreSQL driver; None for other drivers.
        self.flights: Flights | None = None
        self._raw = f"a raw connection of {opening.resource!r}"
        opening.descriptors.hold(self._borrowers)

    def watch(self, engine: sqlalchemy.Engine) -> None:
        """Listen to ``engine``, which has not been used yet."""
        self._engine = engine
        self._speaks_postgresql = engine.dialect.driver in ("psycopg2", "psycopg")
        self._speaks_mysql = engine.dialect.name in ("mysql", "mariadb")
        if self._speaks_postgresql and self._session_settings:
            # PgBouncer hides the ids of sessions.
            self.own_locks = OwnLocks(engine, self.opening, self._states)
        # A pool instance passed by the user does not count.
        self._counted = hasattr(engine.pool, _COUNTED)
        # On the engine, not its pool: dispose() creates a new pool.
        for name, listener in (
            ("do_connect", self._connects),
            ("connect", self._connected),
            ("checkout", self._checked_out),
            ("engine_connect", self._wrapped),
            ("checkin", self._checked_in),
            ("detach", self._detached),
            ("invalidate", self._invalidated),
            ("close", self._closed),
            ("close_detached", self._closed_detached),
        ):
            event.listen(engine, name, listener)

    def _borrowers(self) -> Iterable[object]:
        refs = [state.borrower for state in list(self._states)]
        return [held for ref in refs if ref is not None and (held := ref()) is not None]

    # Opening.

    def creating(self, creator: Callable[..., Any]) -> Callable[[Any], Any]:
        """Return a ``creator`` that reports a user's, for which SQLAlchemy has no event."""
        takes_record = _takes_record(creator)

        def create(record: Any) -> Any:
            record.info[KEY] = ConnectionState()
            self.opening.descriptors.connecting()
            return creator(record) if takes_record else creator()

        return create

    def _connects(self, dialect: Any, record: Any, arguments: list[Any], parameters: dict[str, Any]) -> None:
        # The first listener, without a result, so that the user's listeners can change the arguments. It runs before
        # any other work for the connection, such as fetching credentials.
        if record is not None:
            record.info[KEY] = ConnectionState()
        given: Mapping[str, Any] = parameters
        if self._speaks_postgresql:
            given = named(dialect.loaded_dbapi, parameters)
            if STRINGS[dialect.driver] in parameters:
                # For a URL without parts SQLAlchemy passes an empty connection string by position.
                arguments.clear()
        elif self._speaks_mysql and "unix_socket" not in parameters:
            given = {"port": 3306, **parameters}
        self.opening.descriptors.connecting(*ports(given))
        # The driver's own timeout is for sockets that the watchdog does not find.
        remaining, timeout = begin(), given.get("connect_timeout")
        if remaining is not None and (self._speaks_postgresql or isinstance(timeout, (int, float))):
            fits = fitted(timeout, remaining, attempts(given) if self._speaks_postgresql else 1)
            if fits is not timeout:
                parameters["connect_timeout"] = fits

    def _connected(self, connection: Any, record: Any) -> None:
        opening = self.opening
        state = self._known(connection, record)
        if hasattr(connection, "fileno"):
            opening.connected(connection, _purpose())
        elif self._speaks_mysql:
            # PyMySQL does not expose its socket.
            state.opened(connection, opening.descriptors.look(connection))
            opening.connected(connection, _purpose())
        else:
            # A driver without sockets (SQLite): still protected from the child's finalizers.
            opening.descriptors.gave_up()
            opening.descriptors.lend(connection, connection)
            opening.opened(_purpose())
        try:
            opened(None if state.watch is None else state.watch.socket, self._connect_timeout)
            try:
                self._ask(connection, state)
            finally:
                if not ASKING.get():
                    finish()
        except BaseException:
            finish()
            # SQLAlchemy then drops the connection without an event.
            state.closed()
            connection.close()
            opening.disconnected(connection, _purpose())
            raise
        state.took = time.monotonic() - state.begun
        opening.created(state.took)

    def _known(self, connection: Any, record: Any) -> ConnectionState:
        # A user's pool connects without an event, and may already have connections.
        state: ConnectionState = record.info.setdefault(KEY, ConnectionState())
        state.lives = self._lifetime.drawn(random.random())
        state.opened(connection, None)
        self._states.add(state)
        return state

    def _ask(self, connection: Any, state: ConnectionState) -> None:
        if self._speaks_postgresql and not ASKING.get():
            introduce(connection, state, resolves=self._resolves)
            if self.flights is not None:
                self.flights.joined(connection, state, direct=self._session_settings)
        elif self._speaks_mysql and self._session_settings:
            try:
                found = ask(connection)
            except self._engine.dialect.loaded_dbapi.Error as error:
                if self._engine.dialect.is_disconnect(error, connection, None):
                    raise
                logger.debug("could not query the server's statement timeout: %s", type(error).__name__)
            else:
                if found is not None:
                    state.kind, state.server = found
                    state.session = state.server

    # Checking out.

    def _checked_out(self, connection: Any, record: Any, borrower: Any) -> None:
        state: ConnectionState = record.info.get(KEY) or self._known(connection, record)
        if not ASKING.get():
            self._examine(connection, state)
        state.borrower = weakref.ref(borrower)
        state.connection, state.thread, state.transaction = None, 0, None
        if ASKING.get():
            return
        if not self._counted:
            state.lease = self.opening.lease(state.reclaim)
        if current() is not None or in_attempt():
            # A connection taken past the engine may be committed on unseen, also in a thread of the body.
            state.unseen = self.opening.effect(self._raw, state.nothing_unseen)

    def _examine(self, connection: Any, state: ConnectionState) -> None:
        """Check a connection and fit its timeout.

        Raises:
            DisconnectionError: The connection must be replaced.
        """
        opening = self.opening
        opening.notice()
        now = time.monotonic()
        if state.born is None:
            # A connection opened for this checkout is used even if a recycle came in between, since SQLAlchemy gives up
            # after a few attempts. It is replaced on checkin.
            state.born = now
            if self.flights is not None:
                self.flights.keep_settings(connection, state)
        elif state.begun < self.since:
            raise _Retired("recycled")
        age, idle = now - state.born, 0.0 if state.used is None else now - state.used
        needs = Due.NOTHING
        if idle >= self._trusted or (state.lives is not None and age >= state.lives):
            needs = due(self._lifetime, age=age, idle=idle, lives=state.lives)
        if needs is Due.RETIREMENT:
            retired = _Retired("lifetime" if state.lives is not None and age >= state.lives else "idle")
            opening.replaced(retired.reason)
            raise retired
        attempt = current()
        at = None if attempt is None else attempt.deadline.at
        try:
            # PostgreSQL's timeout travels with the first statement.
            asked = self._speaks_mysql and state.kind is not None and state.fit_session(connection, at)
            if not asked and needs is Due.CHECK:
                asked = state.announced = True
                state.wait(at)
                try:
                    self._engine.dialect.do_ping(connection)
                finally:
                    state.announced = False
                    state.waited()
            if asked:
                opening.checked(alive=True)
        except self._engine.dialect.loaded_dbapi.Error as error:
            opening.checked(alive=False)
            opening.replaced("stale")
            if at is not None and now < at <= time.monotonic():
                # Connecting again would wait for the same server.
                end(Limit.DEADLINE)
                raise
            # Idle connections of the same age are suspect.
            raise InvalidatePoolError("this connection is dead") from error

    def _wrapped(self, connection: Connection) -> None:
        state: ConnectionState | None = connection.info.get(KEY)
        if state is None:
            return
        state.connection = weakref.ref(connection)

    # Checking in.

    def _checked_in(self, connection: Any, record: Any) -> None:
        state: ConnectionState | None = record.info.get(KEY)
        if state is None:
            return
        if (lease := state.lease) is not None:
            state.lease = None
            lease.returned()
        if (unseen := state.unseen) is not None:
            state.unseen = None
            unseen.settle()
        if connection is not None:
            state.used = time.monotonic()

    def _detached(self, connection: Any, record: Any) -> None:
        # The pool opens another one in its place; only "close_detached" reports its end.
        state: ConnectionState | None = record.info.get(KEY)
        if state is not None and state.lease is not None:
            lease, state.lease = state.lease, None
            lease.returned()

    # Closing.

    def _invalidated(self, connection: Any, record: Any, error: BaseException | None) -> None:
        state: ConnectionState | None = record.info.get(KEY)
        if state is None or error is None:
            return
        if isinstance(error, _Retired):
            state.reason = error.reason
        else:
            state.reason = "stale"
            self._suspect = time.monotonic()

    def _closed(self, connection: Any, record: Any) -> None:
        state: ConnectionState | None = record.info.get(KEY)
        reason, age = "", None
        if state is not None:
            state.closed()
            reason, state.reason = state.reason, ""
            if state.born is not None:
                age = time.monotonic() - state.born
                if not reason and state.born < self._suspect:
                    reason = "stale"
        self.opening.disconnected(connection, _purpose(), reason, age)

    def _closed_detached(self, connection: Any) -> None:
        self.opening.disconnected(connection)

    # Recycling.

    def recycle(self, pool: Pool, since: float) -> None:
        """Replace every connection begun before ``since``: idle ones now, the others on checkin.

        Args:
            pool: The engine's pool.
            since: A time of :func:`time.monotonic`.
        """
        if isinstance(pool, (SingletonThreadPool, StaticPool)):
            # SQLite in memory: closing the connection would delete the database.
            return
        self.since = since
        # No public method takes an idle connection without waiting or opening one. Without these two, an old connection
        # is replaced on its next checkout.
        take = getattr(getattr(pool, "_pool", None), "get", None)
        give_back = getattr(pool, "_do_return_conn", None)
        if not isinstance(pool, QueuePool) or take is None or give_back is None:
            return
        taken: list[Any] = []
        try:
            # Connections checked in meanwhile are examined on checkin.
            with suppress(queue.Empty):
                for _ in range(pool.checkedin()):
                    taken.append(take(False))
            for record in taken:
                self.retire(record)
        finally:
            for record in reversed(taken):
                give_back(record)

    def retire(self, record: Any) -> None:
        """Close the connection of an idle record if it was begun before ``since``."""
        state: ConnectionState | None = record.info.get(KEY)
        if record.dbapi_connection is not None and state is not None and state.begun < self.since:
            record.invalidate(_Retired("recycled"))


def _takes_record(creator: Callable[..., Any]) -> bool:
    """Return whether SQLAlchemy would pass its record to ``creator``: if it requires one argument."""
    try:
        accepted = [
            one
            for one in inspect.signature(creator).parameters.values()
            if one.kind in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD)
        ]
    except (TypeError, ValueError):
        # A builtin without a signature.
        return False
    if [(one.name, one.default) for one in accepted] == [("connection_record", None)]:
        return True
    return sum(one.default is one.empty for one in accepted) == 1


def _purpose() -> str:
    return "purpose=resolve" if ASKING.get() else ""
