"""Watches an engine's connection pool: which sockets it owns, who holds them, and whether they are still alive."""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any

import sqlalchemy
from sqlalchemy import event
from sqlalchemy.engine import Connection
from sqlalchemy.exc import DisconnectionError, InvalidatePoolError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.pool import Pool, QueuePool, SingletonThreadPool, StaticPool
from sqlalchemy.util import queue

from workerpools.adapter import Due, Lease, Lifetime, Opening, deadline, due, in_attempt
from workerpools.errors import DeadlineExceeded
from workerpools.sqlalchemy._commit import ASKING, introduce
from workerpools.sqlalchemy._errors import POOL_EXHAUSTED
from workerpools.sqlalchemy._lent import LENT, Lent, reclaim
from workerpools.sqlalchemy._timeouts import Timeouts

__all__ = ["Clock", "Recycled", "timed", "watch_pool"]

logger = logging.getLogger("workerpools")

_RAW = "workerpools raw connection"
_BEGUN = "workerpools begun"
_BORN = "workerpools born"
_LIVES = "workerpools lives"
_USED = "workerpools used"
_REASON = "workerpools reason"
_COUNTED = "workerpools_counted"
_LEASE = "workerpools lease"


class Clock:
    """How long each thread takes to open a connection, with everything that is asked on it."""

    def __init__(self) -> None:
        self._begun: dict[int, float] = {}
        self._took: dict[int, float] = {}

    def begins(self) -> None:
        """Note that the calling thread begins to open a connection."""
        self._begun[threading.get_ident()] = time.monotonic()

    def ends(self) -> float:
        """Return how long the calling thread took to open the connection, in seconds."""
        thread = threading.get_ident()
        seconds = time.monotonic() - self._begun.pop(thread, time.monotonic())
        self._took[thread] = self._took.get(thread, 0.0) + seconds
        return seconds

    def took(self) -> float | None:
        """Return the seconds that the calling thread has spent opening since it asked last; None for nothing."""
        thread = threading.get_ident()
        self._begun.pop(thread, None)
        return self._took.pop(thread, None)


class _Retired(DisconnectionError):
    """Has the pool replace a connection that is not dead."""

    def __init__(self, reason: str) -> None:
        super().__init__("this connection is to be replaced")
        self.reason = reason


class Recycled:
    """Since when the connections of an engine are replaced that were begun before.

    Not by the engine's ``dispose()``: that forgets the connections that are in use, which then close unseen, and opens
    others beyond the pool's limit.
    """

    def __init__(self) -> None:
        self._since = 0.0

    def watch(self, engine: sqlalchemy.Engine) -> None:
        """Note when each connection is begun: before anything else is done for it, such as asking for credentials."""

        @event.listens_for(engine, "do_connect")
        def begins(dialect: object, record: Any, *_: object) -> None:
            if record is not None:
                record.info[_BEGUN] = time.monotonic()

    def recycle(self, pool: Pool, since: float) -> None:
        """Replace every connection that was begun before: idle ones at once, the others when they are given back.

        Args:
            pool: The engine's.
            since: On the clock of :func:`time.monotonic`.
        """
        if isinstance(pool, (SingletonThreadPool, StaticPool)):
            # SQLite in memory: with its connection the database would go.
            return
        self._since = since
        # There is nothing public that takes an idle connection and never waits or opens one. Without these two an old
        # connection is replaced all the same, when it is taken from the pool.
        take = getattr(getattr(pool, "_pool", None), "get", None)
        give_back = getattr(pool, "_do_return_conn", None)
        if not isinstance(pool, QueuePool) or take is None or give_back is None:
            return
        taken: list[Any] = []
        try:
            # Others come and go meanwhile; what they give back is looked at then.
            with suppress(queue.Empty):
                for _ in range(pool.checkedin()):
                    taken.append(take(False))
            for record in taken:
                self.retire(record)
        finally:
            for record in reversed(taken):
                give_back(record)

    def concerns(self, info: Mapping[Any, Any]) -> bool:
        """Return whether the connection of this ``info`` is to be replaced."""
        begun: float = info.get(_BEGUN, info.get(_BORN, self._since))
        return begun < self._since

    def retire(self, record: Any) -> None:
        """Close the connection of a pool's entry that nobody uses, if it is to be replaced."""
        if self._since and record.dbapi_connection is not None and self.concerns(record.info):
            record.invalidate(_Retired("recycled"))


def timed(pool_class: type[Pool], opening: Opening, recycled: Recycled, clock: Clock) -> type[Pool]:
    """Return a ``pool_class`` whose waits are counted: its events fire after them, and tell of no time-out.

    A connection that is to be recycled is closed as it comes back: after every listener has seen that.
    """

    def give_back(pool: Any, record: Any) -> None:
        try:
            recycled.retire(record)
        finally:
            pool_class._do_return_conn(pool, record)

    def connect(pool: Pool) -> Any:
        if ASKING.get():
            connection = pool_class.connect(pool)
            clock.took()
            return connection
        lease = opening.wait()
        try:
            connection = pool_class.connect(pool)
        except BaseException as error:
            lease.gave_up(timed_out=isinstance(error, (PoolTimeoutError, DeadlineExceeded)))
            clock.took()
            # A time limit or the end of a greenlet may have struck while a connection was made.
            opening.descriptors.gave_up()
            if isinstance(error, PoolTimeoutError):
                failure = replace(POOL_EXHAUSTED, resource=opening.resource)
                opening.failed(error, failure)
            raise
        took = clock.took()
        # Its record's dictionary, by which the events know it, too.
        info = connection.info
        info[_LEASE] = lease
        lease.acquired(creating=took or 0.0, reused=took is None, reclaim=lambda: reclaim(info))
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


def watch_pool(
    engine: sqlalchemy.Engine,
    opening: Opening,
    lifetime: Lifetime,
    timeouts: Timeouts,
    recycled: Recycled,
    clock: Clock,
    *,
    resolves: bool,
) -> None:
    """Report the connections of ``engine`` to ``opening``; check and replace them as ``lifetime`` says.

    Args:
        engine: The engine, not yet used.
        opening: What the adapter was told.
        lifetime: How long connections are kept and trusted.
        timeouts: The engine's.
        recycled: The engine's, too.
        resolves: Whether lost COMMITs are resolved.
    """
    # A pool that the user has made is of a class that counts nothing.
    counted = hasattr(engine.pool, _COUNTED)
    speaks_postgresql = engine.dialect.driver in ("psycopg2", "psycopg")
    speaks_mysql = engine.dialect.name in ("mysql", "mariadb")

    # Listening on the engine, not on its pool: it survives dispose(), which makes a new pool.
    # First of all listeners, and without a result: what the user's own listeners do to the arguments counts.
    @event.listens_for(engine, "do_connect")
    def connects(dialect: object, record: object, arguments: object, parameters: dict[str, Any]) -> None:
        clock.begins()
        port = parameters.get("port") or (3306 if speaks_mysql and "unix_socket" not in parameters else None)
        opening.descriptors.connecting(int(port) if port else None)
        remaining = deadline().remaining()
        if remaining is not None and "connect_timeout" in parameters:
            # libpq counts in whole seconds, and in no fewer than 2.
            parameters["connect_timeout"] = min(parameters["connect_timeout"], max(2, round(remaining)))

    @event.listens_for(engine, "connect")
    def connected(connection: Any, record: Any) -> None:
        if hasattr(connection, "fileno"):
            opening.connected(connection, _purpose())
        elif speaks_mysql:
            # PyMySQL does not tell its socket.
            timeouts.see(connection, opening.descriptors.look(connection))
            opening.connected(connection, _purpose())
        else:
            # A driver without sockets of its own (SQLite): kept from the child's finalizers all the same.
            opening.descriptors.gave_up()
            opening.descriptors.lend(connection, connection)
            opening.opened(_purpose())
        try:
            ask(connection, record.info)
        except BaseException:
            # SQLAlchemy forgets the connection then, and tells nobody.
            connection.close()
            opening.disconnected(connection, _purpose())
            raise
        opening.created(clock.ends())

    def ask(connection: Any, info: dict[str, Any]) -> None:
        if speaks_postgresql and not ASKING.get():
            introduce(connection, info, timeouts, resolves=resolves)
        elif speaks_mysql:
            try:
                timeouts.ask(connection, info)
            except engine.dialect.loaded_dbapi.Error as error:
                if engine.dialect.is_disconnect(error, connection, None):
                    raise
                logger.debug("the server does not say which timeout is in force: %s", type(error).__name__)

    # Before whatever else looks at a checkout: it may get another connection.
    @event.listens_for(engine, "checkout")
    def examined(connection: Any, record: Any, borrower: object) -> None:
        if ASKING.get():
            return
        opening.notice()
        now = time.monotonic()
        # One that was made for this very checkout is used, whatever came meanwhile: SQLAlchemy tries no more than
        # twice. It is replaced when it comes back.
        if _BORN in record.info and recycled.concerns(record.info):
            raise _Retired("recycled")
        born = record.info.setdefault(_BORN, now)
        if _LIVES not in record.info:
            record.info[_LIVES] = lifetime.drawn(random.random())
        age, lives = now - born, record.info[_LIVES]
        needs = due(lifetime, age=age, idle=now - record.info.get(_USED, now), lives=lives)
        if needs is Due.RETIREMENT:
            retired = _Retired("lifetime" if lives is not None and age >= lives else "idle")
            opening.replaced(retired.reason)
            raise retired
        try:
            asked = timeouts.at_checkout(connection, record.info)
            if not asked and needs is Due.CHECK:
                asked = True
                with timeouts.watched(connection):
                    engine.dialect.do_ping(connection)
            if asked:
                opening.checked(alive=True)
        except engine.dialect.loaded_dbapi.Error as error:
            opening.checked(alive=False)
            opening.replaced("stale")
            # Its idle siblings are of the same age.
            raise InvalidatePoolError("this connection does not answer") from error

    @event.listens_for(engine, "checkin")
    def checked_in(connection: Any, record: Any) -> None:
        _returned(record.info)
        if connection is not None:
            record.info[_USED] = time.monotonic()

    @event.listens_for(engine, "checkout")
    def checked_out(connection: Any, record: Any, borrower: object) -> None:
        opening.descriptors.lend(record, borrower)
        if ASKING.get():
            return
        if not counted:
            info = record.info
            info[_LEASE] = opening.lease(lambda: reclaim(info))
        if in_attempt():
            record.info[LENT] = Lent(borrower)
            # Whoever takes a connection past the engine may commit on it unseen, a thread of the body's, too.
            record.info[_RAW] = opening.effect(f"a raw connection of {opening.resource!r}")

    @event.listens_for(engine, "engine_connect")
    def wrapped(connection: Connection) -> None:
        info = connection.info
        effect = info.pop(_RAW, None)
        if effect is not None:
            info[LENT].wrapped(connection)
            effect.withdraw()

    @event.listens_for(engine, "detach")
    def detached(connection: Any, record: Any) -> None:
        # Its pool opens another one in its place; nobody tells of its end but "close_detached".
        _returned(record.info)

    #: Connections that were opened before are suspect: since one of them was found to be dead.
    suspect = 0.0

    @event.listens_for(engine, "invalidate")
    def invalidated(connection: Any, record: Any, error: BaseException | None) -> None:
        nonlocal suspect
        if isinstance(error, _Retired):
            record.info[_REASON] = error.reason
        elif error is not None:
            record.info[_REASON] = "stale"
            suspect = time.monotonic()

    @event.listens_for(engine, "close")
    def closed(connection: Any, record: Any) -> None:
        # Its number is given away from here on.
        timeouts.after_statement(record.info)
        reason = record.info.pop(_REASON, "")
        born = record.info.get(_BORN)
        if not reason and born is not None and born < suspect:
            reason = "stale"
        age = None if born is None else time.monotonic() - born
        opening.disconnected(connection, _purpose(), reason, age)

    @event.listens_for(engine, "close_detached")
    def closed_detached(connection: Any) -> None:
        opening.disconnected(connection)


def _returned(info: dict[Any, Any]) -> None:
    lease: Lease | None = info.pop(_LEASE, None)
    if lease is not None:
        lease.returned()


def _purpose() -> str:
    return "purpose=resolve" if ASKING.get() else ""
