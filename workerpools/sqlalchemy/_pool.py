"""The connection pool of an engine: its waits are bounded and counted, its connections checked, replaced, reported."""

from __future__ import annotations

import logging
import math
import random
import threading
import time
import weakref
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import replace
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
from workerpools.sqlalchemy._commit import ASKING, introduce
from workerpools.sqlalchemy._connection import KEY, ConnectionState
from workerpools.sqlalchemy._errors import POOL_EXHAUSTED
from workerpools.sqlalchemy._timeouts import ask

__all__ = ["DeadlineQueuePool", "PoolEvents", "counted"]

logger = logging.getLogger("workerpools")

_POLL = 0.005


class DeadlineQueuePool(QueuePool):
    """SQLAlchemy's ``QueuePool``, with the task's deadline as a second bound of its waiting.

    SQLAlchemy knows one time-out for all who wait. A task with less time waits here until a connection is free, and
    then takes it. One without a deadline may be quicker; then ``timeout`` is the bound, as it always was.

    Args:
        creator: Opens a connection.
        pool_size: As for ``QueuePool``.
        max_overflow: As for ``QueuePool``.
        timeout: As for ``QueuePool``, in seconds.
        use_lifo: As for ``QueuePool``.
        options: Those of every pool.
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
        #: How many there may be; None without a limit.
        self.limit = pool_size + max_overflow if pool_size > 0 and max_overflow >= 0 else None
        self._turn = threading.Lock()

    def connect_in_turn(self, limit: int) -> PoolProxiedConnection:
        """Return a connection of a pool that has none to spare, once there is one.

        Raises:
            DeadlineExceeded: None came free before the task's deadline.
            sqlalchemy.exc.TimeoutError: None came free within ``timeout``.
        """
        remaining = deadline().remaining()
        if remaining is None or remaining > self.timeout():
            return QueuePool.connect(self)
        until = time.monotonic() + remaining
        # One at a time, so that no two of them see the same free connection.
        if self._turn.acquire(timeout=remaining):
            try:
                while self.checkedout() >= limit and time.monotonic() < until:
                    time.sleep(_POLL)
                if self.checkedout() < limit:
                    return QueuePool.connect(self)
            finally:
                self._turn.release()
        raise DeadlineExceeded(
            f"none of the connection pool's {limit} connections came free: the task's deadline has come"
        )


class _Retired(DisconnectionError):
    """Has the pool replace a connection that is not dead."""

    def __init__(self, reason: str) -> None:
        super().__init__("this connection is to be replaced")
        self.reason = reason


def counted(pool_class: type[Pool], events: PoolEvents) -> type[Pool]:
    """Return a ``pool_class`` whose waits are counted: its events fire after them, and tell of no time-out.

    A connection that is to be recycled is closed as it comes back: after every listener has seen that.
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
                connection = pool.connect_in_turn(pool.limit)
            else:
                connection = pool_class.connect(pool)
        except BaseException as error:
            lease.gave_up(timed_out=isinstance(error, (PoolTimeoutError, DeadlineExceeded)))
            # A time limit or the end of a greenlet may have struck while a connection was made.
            opening.descriptors.gave_up()
            if isinstance(error, PoolTimeoutError):
                failure = replace(POOL_EXHAUSTED, resource=opening.resource)
                opening.failed(error, failure)
            raise
        state: ConnectionState = connection.info[KEY]
        took, state.took = state.took, None
        state.lease = lease
        lease.acquired(creating=took or 0.0, reused=took is None, reclaim=state.reclaim)
        return connection

    # Under the name that SQLAlchemy's loggers and a repr show.
    attributes = {
        "__module__": pool_class.__module__,
        "__qualname__": pool_class.__qualname__,
        "connect": connect,
        # What every pool class of SQLAlchemy's implements.
        "_do_return_conn": give_back,
        _COUNTED: True,
    }
    return type(pool_class.__name__, (pool_class,), attributes)


_COUNTED = "workerpools_counted"


class PoolEvents:
    """Reports the connections of one engine; checks and replaces them.

    Connections are not replaced by the engine's ``dispose()``: that forgets those that are in use, which then close
    unseen, and opens others beyond the pool's limit.

    Args:
        opening: What the adapter was told.
        lifetime: How long connections are kept and trusted.
        resolves: Whether lost COMMITs are resolved.
        session_settings: Whether a session's settings stay with its connection; not so behind PgBouncer.

    Attributes:
        since: Connections that were begun before are to be replaced, on the clock of :func:`time.monotonic`; 0 for
            none.
    """

    def __init__(self, opening: Opening, lifetime: Lifetime, *, resolves: bool, session_settings: bool) -> None:
        self.opening = opening
        self.since = 0.0
        self._lifetime = lifetime
        self._resolves = resolves
        self._session_settings = session_settings
        #: A connection that was used less than this ago needs nothing but its age looked at.
        self._trusted = min(
            math.inf if lifetime.check_after is None else lifetime.check_after,
            math.inf if lifetime.max_idle is None else lifetime.max_idle,
        )
        #: Connections that were opened before are suspect: since one of them was found to be dead.
        self._suspect = 0.0
        self._states: weakref.WeakSet[ConnectionState] = weakref.WeakSet()
        self._raw = f"a raw connection of {opening.resource!r}"
        opening.descriptors.hold(self._borrowers)

    def watch(self, engine: sqlalchemy.Engine) -> None:
        """Listen to ``engine``, which was not yet used."""
        self._engine = engine
        self._speaks_postgresql = engine.dialect.driver in ("psycopg2", "psycopg")
        self._speaks_mysql = engine.dialect.name in ("mysql", "mariadb")
        # A pool that the user has made is of a class that counts nothing.
        self._counted = hasattr(engine.pool, _COUNTED)
        # On the engine, not on its pool: it survives dispose(), which makes a new pool.
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

    def _connects(self, dialect: object, record: Any, arguments: object, parameters: dict[str, Any]) -> None:
        # First of all listeners, and without a result: what the user's own listeners do to the arguments counts. Before
        # anything else is done for a connection, such as asking for credentials.
        if record is not None:
            record.info[KEY] = ConnectionState()
        port = parameters.get("port") or (3306 if self._speaks_mysql and "unix_socket" not in parameters else None)
        self.opening.descriptors.connecting(int(port) if port else None)
        remaining = deadline().remaining()
        if remaining is not None and "connect_timeout" in parameters:
            # libpq counts in whole seconds, and in no fewer than 2.
            parameters["connect_timeout"] = min(parameters["connect_timeout"], max(2, round(remaining)))

    def _connected(self, connection: Any, record: Any) -> None:
        opening = self.opening
        state = self._known(connection, record)
        if hasattr(connection, "fileno"):
            opening.connected(connection, _purpose())
        elif self._speaks_mysql:
            # PyMySQL does not tell its socket.
            state.opened(connection, opening.descriptors.look(connection))
            opening.connected(connection, _purpose())
        else:
            # A driver without sockets of its own (SQLite): kept from the child's finalizers all the same.
            opening.descriptors.gave_up()
            opening.descriptors.lend(connection, connection)
            opening.opened(_purpose())
        try:
            self._ask(connection, state)
        except BaseException:
            # SQLAlchemy forgets the connection then, and tells nobody.
            state.closed()
            connection.close()
            opening.disconnected(connection, _purpose())
            raise
        state.took = time.monotonic() - state.begun
        opening.created(state.took)

    def _known(self, connection: Any, record: Any) -> ConnectionState:
        # A creator of the user's connects without an event, and a pool of the user's may have connected before.
        state: ConnectionState = record.info.setdefault(KEY, ConnectionState())
        state.lives = self._lifetime.drawn(random.random())
        state.opened(connection, None)
        self._states.add(state)
        return state

    def _ask(self, connection: Any, state: ConnectionState) -> None:
        if self._speaks_postgresql and not ASKING.get():
            introduce(connection, state, resolves=self._resolves)
        elif self._speaks_mysql and self._session_settings:
            try:
                found = ask(connection)
            except self._engine.dialect.loaded_dbapi.Error as error:
                if self._engine.dialect.is_disconnect(error, connection, None):
                    raise
                logger.debug("the server does not say which timeout is in force: %s", type(error).__name__)
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
        state.connection, state.thread = None, 0
        if ASKING.get():
            return
        if not self._counted:
            state.lease = self.opening.lease(state.reclaim)
        if current() is not None or in_attempt():
            # Whoever takes a connection past the engine may commit on it unseen, a thread of the body's, too.
            state.raw = self.opening.effect(self._raw)

    def _examine(self, connection: Any, state: ConnectionState) -> None:
        """Check a connection, and make its timeout fit.

        Raises:
            DisconnectionError: It is to be replaced.
        """
        opening = self.opening
        opening.notice()
        now = time.monotonic()
        if state.born is None:
            # One that was made for this very checkout is used, whatever came meanwhile: SQLAlchemy tries no more than
            # twice. It is replaced when it comes back.
            state.born = now
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
            asked = self._session_settings and state.kind is not None and state.fit_session(connection, at)
            if not asked and needs is Due.CHECK:
                asked = True
                state.wait(at)
                try:
                    self._engine.dialect.do_ping(connection)
                finally:
                    state.waited()
            if asked:
                opening.checked(alive=True)
        except self._engine.dialect.loaded_dbapi.Error as error:
            opening.checked(alive=False)
            opening.replaced("stale")
            # Its idle siblings are of the same age.
            raise InvalidatePoolError("this connection does not answer") from error

    def _wrapped(self, connection: Connection) -> None:
        state: ConnectionState | None = connection.info.get(KEY)
        if state is None:
            return
        state.connection = weakref.ref(connection)
        if (raw := state.raw) is not None:
            state.raw = None
            raw.withdrawn = True

    # Checking in.

    def _checked_in(self, connection: Any, record: Any) -> None:
        state: ConnectionState | None = record.info.get(KEY)
        if state is None:
            return
        if (lease := state.lease) is not None:
            state.lease = None
            lease.returned()
        state.raw = None
        if connection is not None:
            state.used = time.monotonic()

    def _detached(self, connection: Any, record: Any) -> None:
        # Its pool opens another one in its place; nobody tells of its end but "close_detached".
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
        """Replace every connection that was begun before: idle ones at once, the others when they are checked in.

        Args:
            pool: The engine's.
            since: On the clock of :func:`time.monotonic`.
        """
        if isinstance(pool, (SingletonThreadPool, StaticPool)):
            # SQLite in memory: with its connection the database would go.
            return
        self.since = since
        # There is nothing public that takes an idle connection and never waits or opens one. Without these two an old
        # connection is replaced all the same, when it is checked out.
        take = getattr(getattr(pool, "_pool", None), "get", None)
        give_back = getattr(pool, "_do_return_conn", None)
        if not isinstance(pool, QueuePool) or take is None or give_back is None:
            return
        taken: list[Any] = []
        try:
            # Others come and go meanwhile; what they check in is looked at then.
            with suppress(queue.Empty):
                for _ in range(pool.checkedin()):
                    taken.append(take(False))
            for record in taken:
                self.retire(record)
        finally:
            for record in reversed(taken):
                give_back(record)

    def retire(self, record: Any) -> None:
        """Close the connection of an idle record, if it is to be replaced."""
        state: ConnectionState | None = record.info.get(KEY)
        if record.dbapi_connection is not None and state is not None and state.begun < self.since:
            record.invalidate(_Retired("recycled"))


def _purpose() -> str:
    return "purpose=resolve" if ASKING.get() else ""
