"""The connection pool of an engine: bounds and counts its waits; checks, replaces and reports its connections."""

from __future__ import annotations

import inspect
import logging
import math
import random
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from functools import partial
from typing import Any

import sqlalchemy
from sqlalchemy import event
from sqlalchemy.exc import DisconnectionError, InvalidatePoolError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.pool import (
    ConnectionPoolEntry,
    Pool,
    PoolProxiedConnection,
    QueuePool,
    SingletonThreadPool,
    StaticPool,
)
from sqlalchemy.pool.base import _ConnectionRecord  # pyright: ignore[reportPrivateUsage]
from sqlalchemy.util import queue

from workerpools.adapter import Due, Lease, Lifetime, Opening, current, deadline, due, in_attempt
from workerpools.errors import DeadlineExceeded
from workerpools.sqlalchemy._connecting import ASKING, Limit, begin, end, finish, opened
from workerpools.sqlalchemy._connection import KEY, ConnectionState, raw
from workerpools.sqlalchemy._driver import LIBPQ_DRIVERS, STRINGS, attempts, fitted, named, ports
from workerpools.sqlalchemy._flight import Flights
from workerpools.sqlalchemy._nested import OwnLocks, exhausted, refuse_endless_wait
from workerpools.sqlalchemy._resolving import introduce
from workerpools.sqlalchemy._timeouts import FLOOR, ask

__all__ = ["DeadlineQueuePool", "PoolEvents", "counted"]

logger = logging.getLogger("workerpools")

#: The longest pause of a waiting caller before it looks again, in seconds: a wake-up may have been interrupted.
_POLL = 0.05


class _Caller(threading.local):
    """The calling thread's lease, on the way from :meth:`DeadlineQueuePool.connect` to ``_do_get()``."""

    lease: Lease | None = None


class DeadlineQueuePool(QueuePool):
    """A ``QueuePool`` whose waits also end at the task's deadline, and that loses no slot to an interruption.

    SQLAlchemy's counts its overflow and keeps its idle connections, one step after the other: a time limit between two
    steps loses a slot for good. Here a slot is its record, known from before it connects. A record is idle or belongs
    to a lease; one whose lease has ended is nobody's, and :meth:`repair` frees its slot. A lease therefore begins
    before its record is taken and ends after it was given back.

    Args:
        creator: Opens a connection.
        pool_size: As for ``QueuePool``.
        max_overflow: As for ``QueuePool``.
        timeout: As for ``QueuePool``, in seconds; a task's deadline shortens it.
        use_lifo: As for ``QueuePool``.
        options: The options of ``sqlalchemy.pool.Pool``.
    """

    #: SQLAlchemy's class in whose place it is used.
    replaces: type[Pool] = QueuePool
    #: Set by :func:`counted`.
    events: PoolEvents | None = None

    def __init__(
        self,
        creator: Any,
        pool_size: int = 5,
        max_overflow: int = 10,
        timeout: float = 30.0,
        use_lifo: bool = False,
        **options: Any,
    ) -> None:
        # SQLAlchemy's own queue stays empty; size() and recreate() ask it for the settings.
        super().__init__(creator, pool_size, max_overflow, timeout, use_lifo, **options)
        #: The maximum number of connections; None without a limit.
        self.limit = pool_size + max_overflow if pool_size > 0 and max_overflow >= 0 else None
        # In C, so that no signal handler runs between acquiring it and entering the block. Re-entrant, because the
        # garbage collector may check a connection in.
        self._lock = threading.RLock()
        #: Every record, and the lease that took it last.
        self._takers: dict[ConnectionPoolEntry, Lease | None] = {}
        self._idle: deque[ConnectionPoolEntry] = deque()
        #: For each waiting caller what is released to wake it.
        self._waiters: deque[Any] = deque()
        self._caller = _Caller()

    # Checking out.

    def connect(self) -> PoolProxiedConnection:
        """Check out a connection.

        Raises:
            DeadlineExceeded: None became free before the task's deadline.
            sqlalchemy.exc.TimeoutError: None became free within ``timeout``.
        """
        events = self.events
        if events is None or ASKING.get():
            self._caller.lease = None
            return QueuePool.connect(self)
        lease = self._caller.lease = events.opening.wait()
        try:
            lease.reclaim = partial(self.reclaim, lease)
            connection = QueuePool.connect(self)
            state: ConnectionState = connection.info[KEY]
            took, state.took = state.took, None
            state.lease = lease
            lease.acquired(creating=took or 0.0, reused=took is None, reclaim=lease.reclaim)
            if lease.attempt is not None and lease.attempt.parent is not None and events.own_locks is not None:
                events.own_locks.watch(connection, lease)
            return connection
        except BaseException as error:
            events.gave_up(lease, error)
            self.repair()
            self._close_surplus()
            raise

    def _do_get(self) -> ConnectionPoolEntry:
        lease, idle = self._caller.lease, self._idle
        until: float | None = None
        while True:
            with self._lock:
                if idle:
                    record = idle.pop() if self._pool.use_lifo else idle.popleft()
                    self._takers[record] = lease
                    break
                if self.limit is None or len(self._takers) < self.limit:
                    # It connects at the checkout, as one whose connection was lost.
                    record = _ConnectionRecord(self, connect=False)
                    self._takers[record] = lease
                    break
                waiter = self._waiter()
                self._waiters.append(waiter)
            try:
                if until is None:
                    # In this order: where the deadline is what ends the wait, it has passed then.
                    longest = self._longest_wait()
                    until = time.monotonic() + longest
                    if self.repair():
                        continue
                    if self.events is not None:
                        refuse_endless_wait(self.events.opening)
                remaining = until - time.monotonic()
                if remaining <= 0:
                    raise self._exhausted()
                self._wait(waiter, min(remaining, _POLL))
            finally:
                with suppress(ValueError):
                    self._waiters.remove(waiter)
        if lease is not None:
            lease.held = record
        return record

    def _waiter(self) -> Any:
        waiter = threading.Lock()
        waiter.acquire()
        return waiter

    def _wait(self, waiter: Any, seconds: float) -> None:
        waiter.acquire(timeout=seconds)

    def _longest_wait(self) -> float:
        remaining = deadline().remaining()
        return self.timeout() if remaining is None else min(self.timeout(), remaining)

    def _exhausted(self) -> Exception:
        if deadline().remaining() == 0.0:
            return DeadlineExceeded(
                f"none of the connection pool's {self.limit} connections became free before the task's deadline"
            )
        told = f"QueuePool limit of size {self.size()} overflow {self.overflow()} reached, connection timed out, "
        told += f"timeout {self.timeout():0.2f}"
        if (events := self.events) is not None:
            size, overflow = events.sizes
            told += f"; all connections of the resource {events.opening.resource!r} are in use: raise its {overflow} "
            told += f"or {size}, or have them given back sooner"
        return PoolTimeoutError(told, code="3o7r")

    # Checking in.

    def _do_return_conn(self, record: ConnectionPoolEntry) -> None:
        lease = self._takers.get(record)
        try:
            if (events := self.events) is not None:
                if events.since:
                    events.retire(record)
                state: ConnectionState | None = record.info.get(KEY)
                if state is not None:
                    state.lease = None
                    if (unseen := state.unseen) is not None:
                        state.unseen = None
                        if state.transaction is None and (state.told or state.connection is not None):
                            # Withdrawn, without the call.
                            unseen.unless = _nothing
                        else:
                            unseen.settle()
                    state.used = time.monotonic()
        finally:
            with self._lock:
                size = self._pool.maxsize
                kept = record.dbapi_connection is not None and (
                    # A caller that was woken has yet to take its own: the next one's need not be opened anew.
                    size <= 0 or len(self._idle) < size or bool(self._waiters)
                )
                if kept and record in self._takers and record not in self._idle:
                    self._idle.append(record)
            if not kept:
                self._remove(record)
            if lease is not None:
                lease.returned()
            if self._waiters:
                self._wake()

    def _close_surplus(self) -> None:
        """Close what was kept for a caller that has given up."""
        while True:
            with self._lock:
                if self._waiters or not 0 < self._pool.maxsize < len(self._idle):
                    return
                record = self._idle.pop()
            self._remove(record)

    def _remove(self, record: ConnectionPoolEntry) -> None:
        try:
            record.close()
        finally:
            with self._lock:
                self._takers.pop(record, None)

    def _wake(self) -> None:
        with suppress(IndexError, RuntimeError):
            self._waiters.popleft().release()

    def retire_idle(self, retire: Callable[[ConnectionPoolEntry], None]) -> None:
        """Call ``retire`` with every idle record, which may close its connection."""
        with self._lock:
            for record in tuple(self._idle):
                retire(record)

    # After an interruption.

    def repair(self) -> bool:
        """Free the slots whose leases have ended; return whether there were any."""
        with self._lock:
            lost = [
                record
                for record, lease in self._takers.items()
                if lease is not None and not lease.is_active and record not in self._idle
            ]
            for record in lost:
                # Without its connection, which may be in any state.
                self._takers.pop(record, None)
        for record in lost:
            record.close()
            if self._waiters:
                self._wake()
        return bool(lost)

    def reclaim(self, lease: Lease) -> bool:
        """Take back the connection of a lease whose attempt has ended, in the attempt's thread.

        Returns:
            Whether it was in use. If not, an interruption had kept its lease from ending.

        Raises:
            Exception: Checking in failed; the connection is closed.
        """
        record: Any = lease.held
        state: ConnectionState | None = None
        if record is not None and self._takers.get(record) is lease and record not in self._idle:
            state = record.info.get(KEY)
        if state is not None and state.thread not in (0, threading.get_ident()):
            # Another thread used it last and may still do so.
            return False
        try:
            return state is not None and state.reclaim()
        finally:
            lease.gave_up()
            lease.returned()
            self.repair()

    # SQLAlchemy's figures.

    def dispose(self) -> None:
        """Close the idle connections."""
        while True:
            with self._lock:
                if not self._idle:
                    break
                record = self._idle.pop()
            self._remove(record)
        self.logger.info("Pool disposed. %s", self.status())

    def checkedin(self) -> int:
        """Return the number of idle connections."""
        return len(self._idle)

    def checkedout(self) -> int:
        """Return the number of connections in use."""
        return len(self._takers) - len(self._idle)

    def overflow(self) -> int:
        """Return the number of connections beyond ``pool_size``; negative if there are fewer."""
        return len(self._takers) - self.size() if self.size() else 0


def _nothing() -> bool:
    return True


class _Retired(DisconnectionError):
    """Makes the pool replace a live connection."""

    def __init__(self, reason: str) -> None:
        super().__init__("this connection will be replaced")
        self.reason = reason


def counted(pool_class: type[Pool], events: PoolEvents) -> type[Pool]:
    """Return a subclass of ``pool_class`` that counts waits: events fire only after a wait, and not on a timeout.

    It closes a connection to be recycled on checkin, after all listeners have run.
    """
    # SQLAlchemy's loggers, whose levels are set by name, and repr show the original name.
    original = pool_class.replaces if issubclass(pool_class, DeadlineQueuePool) else pool_class
    attributes = {"__module__": original.__module__, "__qualname__": original.__qualname__, _COUNTED: True}
    if issubclass(pool_class, DeadlineQueuePool):
        return type(original.__name__, (pool_class,), {**attributes, "events": events})
    opening = events.opening

    def give_back(pool: Any, record: Any) -> None:
        try:
            if events.since:
                events.retire(record)
        finally:
            pool_class._do_return_conn(pool, record)

    def connect(pool: Any) -> Any:
        if ASKING.get():
            return pool_class.connect(pool)
        lease = opening.wait()
        try:
            connection = pool_class.connect(pool)
            state: ConnectionState = connection.info[KEY]
            took, state.took = state.took, None
            state.lease = lease
            lease.acquired(creating=took or 0.0, reused=took is None, reclaim=state.reclaim)
            return connection
        except BaseException as error:
            events.gave_up(lease, error)
            raise

    # _do_return_conn is implemented by every pool class of SQLAlchemy.
    return type(pool_class.__name__, (pool_class,), {**attributes, "connect": connect, "_do_return_conn": give_back})


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
        sizes: What the user knows ``pool_size`` and ``max_overflow`` by.

    Attributes:
        since: Connections begun before this :func:`time.monotonic` time will be replaced; 0 for none.
    """

    def __init__(
        self,
        opening: Opening,
        lifetime: Lifetime,
        *,
        resolves: bool,
        connect_timeout: float,
        session_settings: bool,
        sizes: tuple[str, str],
    ) -> None:
        self.opening = opening
        self.sizes = sizes
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
        self._libpq = engine.dialect.driver in LIBPQ_DRIVERS
        self._speaks_postgresql = self._libpq or engine.dialect.driver == "asyncpg"
        self._speaks_mysql = engine.dialect.name in ("mysql", "mariadb")
        if self._speaks_postgresql and self._session_settings and not engine.dialect.is_async:
            # PgBouncer hides the ids of sessions. The thread that looks on cannot use the event loop's connections.
            self.own_locks = OwnLocks(engine, self.opening, self._states)
        # A pool instance passed by the user does not count.
        self._counted = hasattr(engine.pool, _COUNTED)
        # A lease of our own pool ends after its record was given back.
        self._ends_leases = self._counted and isinstance(engine.pool, DeadlineQueuePool)
        # Others end their leases themselves, after the connection was given back.
        checks_in = not (self._counted and isinstance(engine.pool, DeadlineQueuePool))
        # On the engine, not its pool: dispose() creates a new pool.
        for name, listener in (
            ("do_connect", self._connects),
            ("connect", self._connected),
            ("checkout", self._checked_out),
            *((("checkin", self._checked_in),) if checks_in else ()),
            ("detach", self._detached),
            ("invalidate", self._invalidated),
            ("close", self._closed),
            ("close_detached", self._closed_detached),
        ):
            event.listen(engine, name, listener)

    def gave_up(self, lease: Lease, error: BaseException) -> None:
        """Note that a checkout failed or was interrupted, at any point."""
        opening = self.opening
        lease.gave_up(timed_out=isinstance(error, (PoolTimeoutError, DeadlineExceeded)))
        lease.returned()
        # A time limit or the end of a greenlet may have interrupted connecting.
        finish()
        opening.descriptors.gave_up()
        if isinstance(error, PoolTimeoutError):
            opening.failed(error, exhausted(opening))

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
        if self._libpq:
            given = named(dialect.loaded_dbapi, parameters)
            if STRINGS[dialect.driver] in parameters:
                # For a URL without parts SQLAlchemy passes an empty connection string by position.
                arguments.clear()
        elif self._speaks_mysql and "unix_socket" not in parameters:
            given = {"port": 3306, **parameters}
        self.opening.descriptors.connecting(*ports(given))
        # The driver's own timeout is for sockets that the watchdog does not find.
        remaining, timeout = begin(), given.get("connect_timeout")
        if remaining is not None and self._speaks_postgresql and not self._libpq:
            # Any number of seconds, for all servers.
            parameters["timeout"] = min(parameters.get("timeout") or FLOOR, remaining if remaining > 0.0 else FLOOR)
        elif remaining is not None and (self._libpq or isinstance(timeout, (int, float))):
            fits = fitted(timeout, remaining, attempts(given) if self._libpq else 1)
            if fits is not timeout:
                parameters["connect_timeout"] = fits

    def _connected(self, connection: Any, record: Any) -> None:
        opening = self.opening
        state = self._known(connection, record)
        driver = raw(connection)
        if hasattr(driver, "fileno"):
            opening.connected(driver, _purpose())
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
                if ASKING.get() in (None, math.inf):
                    # A connection that resolves a COMMIT has connect_timeout until its last answer.
                    finish()
        except BaseException:
            finish()
            # SQLAlchemy then drops the connection without an event.
            state.closed()
            connection.close()
            opening.disconnected(driver, _purpose())
            raise
        state.took = time.monotonic() - state.begun
        opening.created(state.took)

    def _known(self, connection: Any, record: Any) -> ConnectionState:
        # A user's pool connects without an event, and may already have connections.
        state: ConnectionState = record.info.setdefault(KEY, ConnectionState())
        state.lives = self._lifetime.drawn(random.random())
        state.opened(raw(connection), None)
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
            self.opening.notice()
            now = time.monotonic()
            if (
                state.born is None
                or state.used is None
                or state.begun < self.since
                or now - state.used >= self._trusted
                or (state.lives is not None and now - state.born >= state.lives)
                or self._speaks_mysql
            ):
                self._examine(connection, state, now)
        state.borrower = weakref.ref(borrower)
        state.connection, state.thread, state.transaction = None, 0, None
        if ASKING.get():
            return
        if not self._counted:
            state.lease = self.opening.lease(state.reclaim)
        if current() is not None or in_attempt():
            # A connection taken past the engine may be committed on unseen, also in a thread of the body.
            state.unseen = self.opening.effect(self._raw, state.nothing_unseen)

    def _examine(self, connection: Any, state: ConnectionState, now: float) -> None:
        """Check a connection and fit its timeout.

        Raises:
            DisconnectionError: The connection must be replaced.
        """
        opening = self.opening
        if state.born is None:
            # A connection opened for this checkout is used even if a recycle came in between, since SQLAlchemy gives up
            # after a few attempts. It is replaced on checkin.
            state.born = now
            if self.flights is not None:
                state.wait(time.monotonic() + self._connect_timeout)
                try:
                    self.flights.keep_settings(connection, state)
                finally:
                    state.waited()
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

    # Checking in.

    def _checked_in(self, connection: Any, record: Any) -> None:
        state: ConnectionState | None = record.info.get(KEY)
        if state is None:
            return
        if (lease := state.lease) is not None and not self._ends_leases:
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
        if state is not None and state.lease is not None and not self._ends_leases:
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
        self.opening.disconnected(raw(connection), _purpose(), reason, age)

    def _closed_detached(self, connection: Any) -> None:
        self.opening.disconnected(raw(connection))

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
        if isinstance(pool, DeadlineQueuePool):
            pool.retire_idle(self.retire)
            return
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
