"""Watches an engine's connection pool: which sockets it owns, who holds them, and whether they are still alive."""

from __future__ import annotations

import logging
import random
import time
from typing import Any

import sqlalchemy
from sqlalchemy import event
from sqlalchemy.engine import Connection
from sqlalchemy.exc import DisconnectionError, InvalidatePoolError

from workerpools._core import scope
from workerpools._core.adapter import Opening
from workerpools._core.effects import Effect, note_effect, withdraw_effect
from workerpools._core.lifetime import Due, Lifetime, due
from workerpools._sqlalchemy_commit import ASKING, introduce
from workerpools._sqlalchemy_timeouts import Timeouts

__all__ = ["watch_pool"]

logger = logging.getLogger("workerpools")

_RAW = "workerpools raw connection"
_BORN = "workerpools born"
_LIVES = "workerpools lives"
_USED = "workerpools used"


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
    speaks_postgresql = engine.dialect.driver in ("psycopg2", "psycopg")
    speaks_mysql = engine.dialect.name in ("mysql", "mariadb")

    # Listening on the engine, not on its pool: it survives dispose(), which makes a new pool.
    # First of all listeners, and without a result: what the user's own listeners do to the arguments counts.
    @event.listens_for(engine, "do_connect")
    def connects(dialect: object, record: object, arguments: object, parameters: dict[str, Any]) -> None:
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
            if speaks_postgresql and not ASKING.get():
                introduce(connection, record.info, timeouts, resolves=resolves)
        elif speaks_mysql:
            # PyMySQL does not tell its socket.
            timeouts.see(connection, opening.descriptors.look(connection))
            opening.connected(connection, _purpose())
        else:
            # A driver without sockets of its own (SQLite): kept from the child's finalizers all the same.
            opening.descriptors.gave_up()
            opening.descriptors.lend(connection, connection)
        if speaks_mysql:
            try:
                timeouts.ask(connection, record.info)
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
        needs = due(lifetime, age=now - born, idle=now - record.info.get(_USED, now), lives=record.info[_LIVES])
        if needs is Due.RETIREMENT:
            raise DisconnectionError("this connection has reached its age")
        try:
            if not timeouts.at_checkout(connection, record.info) and needs is Due.CHECK:
                with timeouts.watched(connection):
                    engine.dialect.do_ping(connection)
        except engine.dialect.loaded_dbapi.Error as error:
            # Its idle siblings are of the same age.
            raise InvalidatePoolError("this connection does not answer") from error

    @event.listens_for(engine, "checkin")
    def checked_in(connection: Any, record: Any) -> None:
        if connection is not None:
            record.info[_USED] = time.monotonic()

    @event.listens_for(engine, "checkout")
    def checked_out(connection: Any, record: Any, borrower: object) -> None:
        opening.descriptors.lend(record, borrower)
        if scope.current() is not None and not ASKING.get():
            # Whoever takes a connection past the engine may commit on it unseen.
            record.info[_RAW] = effect = Effect(f"a raw connection of {opening.resource!r}")
            note_effect(effect)

    @event.listens_for(engine, "engine_connect")
    def wrapped(connection: Connection) -> None:
        effect = connection.info.pop(_RAW, None)
        if effect is not None:
            withdraw_effect(effect)

    @event.listens_for(engine, "close")
    def closed(connection: Any, record: object) -> None:
        opening.disconnected(connection, _purpose())

    @event.listens_for(engine, "close_detached")
    def closed_detached(connection: Any) -> None:
        opening.disconnected(connection)


def _purpose() -> str:
    return "purpose=resolve" if ASKING.get() else ""
