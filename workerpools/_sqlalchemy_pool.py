"""Watches an engine's connection pool: which sockets it owns, who holds them, and whether they are still alive."""

from __future__ import annotations

import logging
import random
import time
from dataclasses import replace
from typing import Any

import sqlalchemy
from sqlalchemy import event
from sqlalchemy.engine import Connection
from sqlalchemy.exc import DisconnectionError, InvalidatePoolError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.pool import Pool

from workerpools._core import scope
from workerpools._core.adapter import Opening
from workerpools._core.effects import Effect, note_effect, withdraw_effect
from workerpools._core.failure import Noted
from workerpools._core.lifetime import Due, Lifetime, due
from workerpools._sqlalchemy_classify import POOL_EXHAUSTED
from workerpools._sqlalchemy_commit import ASKING, introduce
from workerpools._sqlalchemy_timeouts import Timeouts
from workerpools.errors import DeadlineExceeded

__all__ = ["timed", "watch_pool"]

logger = logging.getLogger("workerpools")

_RAW = "workerpools raw connection"
_BORN = "workerpools born"
_LIVES = "workerpools lives"
_USED = "workerpools used"
_REASON = "workerpools reason"
_COUNTED = "workerpools_counted"


class _Retired(DisconnectionError):
    """Has the pool replace a connection that is not dead."""

    def __init__(self, reason: str) -> None:
        super().__init__("this connection has reached its age")
        self.reason = reason


def timed(pool_class: type[Pool], opening: Opening) -> type[Pool]:
    """Return a ``pool_class`` whose waits are counted: its events fire after them, and tell of no time-out."""
    meter = opening.meter

    def connect(pool: Pool) -> Any:
        if ASKING.get():
            connection = pool_class.connect(pool)
            meter.took()
            return connection
        since = meter.waiting()
        try:
            connection = pool_class.connect(pool)
        except BaseException as error:
            meter.gave_up(since, timed_out=isinstance(error, (PoolTimeoutError, DeadlineExceeded)))
            # A time limit or the end of a greenlet may have struck while a connection was made.
            opening.descriptors.gave_up()
            if isinstance(error, PoolTimeoutError):
                failure = replace(POOL_EXHAUSTED, resource=opening.resource)
                scope.note_failure(error, Noted(failure, failure.phase, opening))
            raise
        took = meter.took()
        # Its record's dictionary, by which the events know it, too.
        key = id(connection.info)
        meter.acquired(since, key, scope.current(), creating=took or 0.0, reused=took is None)
        return connection

    # Under the name that SQLAlchemy's loggers and a repr show.
    attributes = {
        "__module__": pool_class.__module__,
        "__qualname__": pool_class.__qualname__,
        "connect": connect,
        _COUNTED: True,
    }
    return type(pool_class.__name__, (pool_class,), attributes)


def watch_pool(
    engine: sqlalchemy.Engine, opening: Opening, lifetime: Lifetime, timeouts: Timeouts, *, resolves: bool
) -> None:
    """Report the connections of ``engine`` to ``opening``; check and replace them as ``lifetime`` says.

    Args:
        engine: The engine, not yet used.
        opening: What the adapter was told.
        lifetime: How long connections are kept and trusted.
        timeouts: The engine's.
        resolves: Whether lost COMMITs are resolved.
    """
    meter = opening.meter
    # A pool that the user has made is of a class that counts nothing.
    counted = hasattr(engine.pool, _COUNTED)
    speaks_postgresql = engine.dialect.driver in ("psycopg2", "psycopg")
    speaks_mysql = engine.dialect.name in ("mysql", "mariadb")

    # Listening on the engine, not on its pool: it survives dispose(), which makes a new pool.
    # First of all listeners, and without a result: what the user's own listeners do to the arguments counts.
    @event.listens_for(engine, "do_connect")
    def connects(dialect: object, record: object, arguments: object, parameters: dict[str, Any]) -> None:
        opening.meter.creating()
        port = parameters.get("port") or (3306 if speaks_mysql and "unix_socket" not in parameters else None)
        opening.descriptors.connecting(int(port) if port else None)
        remaining = scope.deadline().remaining()
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
            opening.meter.opened()
        try:
            ask(connection, record.info)
        except BaseException:
            # SQLAlchemy forgets the connection then, and tells nobody.
            connection.close()
            opening.disconnected(connection, _purpose())
            raise
        opening.meter.made()

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
        now = time.monotonic()
        born = record.info.setdefault(_BORN, now)
        if _LIVES not in record.info:
            record.info[_LIVES] = lifetime.drawn(random.random())
        age, lives = now - born, record.info[_LIVES]
        needs = due(lifetime, age=age, idle=now - record.info.get(_USED, now), lives=lives)
        if needs is Due.RETIREMENT:
            raise _Retired("lifetime" if lives is not None and age >= lives else "idle")
        try:
            asked = timeouts.at_checkout(connection, record.info)
            if not asked and needs is Due.CHECK:
                asked = True
                with timeouts.watched(connection):
                    engine.dialect.do_ping(connection)
            if asked:
                meter.checked(alive=True)
        except engine.dialect.loaded_dbapi.Error as error:
            meter.checked(alive=False)
            # Its idle siblings are of the same age.
            raise InvalidatePoolError("this connection does not answer") from error

    @event.listens_for(engine, "checkin")
    def checked_in(connection: Any, record: Any) -> None:
        meter.returned(id(record.info))
        if connection is not None:
            record.info[_USED] = time.monotonic()

    @event.listens_for(engine, "checkout")
    def checked_out(connection: Any, record: Any, borrower: object) -> None:
        opening.descriptors.lend(record, borrower)
        if ASKING.get():
            return
        attempt = scope.current()
        if not counted:
            meter.taken(id(record.info), attempt)
        if attempt is not None:
            # Whoever takes a connection past the engine may commit on it unseen.
            record.info[_RAW] = effect = Effect(f"a raw connection of {opening.resource!r}")
            note_effect(effect)

    @event.listens_for(engine, "engine_connect")
    def wrapped(connection: Connection) -> None:
        effect = connection.info.pop(_RAW, None)
        if effect is not None:
            withdraw_effect(effect)

    @event.listens_for(engine, "detach")
    def detached(connection: Any, record: Any) -> None:
        # Its pool opens another one in its place; nobody tells of its end but "close_detached".
        meter.returned(id(record.info))

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
        if not reason and record.info.get(_BORN, suspect) < suspect:
            reason = "stale"
        opening.disconnected(connection, _purpose(), reason)

    @event.listens_for(engine, "close_detached")
    def closed_detached(connection: Any) -> None:
        opening.disconnected(connection)


def _purpose() -> str:
    return "purpose=resolve" if ASKING.get() else ""
