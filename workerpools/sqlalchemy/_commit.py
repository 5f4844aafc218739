"""Sends COMMIT, knows whether it may have been applied, and asks PostgreSQL when the acknowledgement was lost.

Before COMMIT the transaction's id is noted; afterwards a fresh connection asks ``pg_xact_status`` (PostgreSQL
documentation, "Transaction ID and Snapshot Information Functions"; version 13 and later).
"""

from __future__ import annotations

import logging
import time
import weakref
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import sqlalchemy
from sqlalchemy.engine import Connection

from workerpools.adapter import FailureKind, Opening, deadline
from workerpools.sqlalchemy._errors import classify_connect, error_code
from workerpools.sqlalchemy._timeouts import POSTGRESQL, Timeouts

__all__ = [
    "ASKING",
    "COMMIT_STATE",
    "CONNECTION",
    "READ_WRITE",
    "CommitState",
    "commits_each_statement",
    "introduce",
    "watch_commits",
]

logger = logging.getLogger("workerpools")

#: Keys of a driver connection's ``info``.
CONNECTION = "workerpools connection"
TIMELINE = "workerpools timeline"
READ_WRITE = "workerpools read write"

#: What the driver's exception carries out of ``do_commit``.
COMMIT_STATE = "__workerpools_commit__"

#: How long a transaction that is still in progress is left to end by itself, in seconds. Its session is ended then:
#: it is ours, and nobody reads its answer.
GRACE = 1.0

_NOTE = "SELECT pg_current_xact_id_if_assigned()::text, pg_backend_pid()"
_STATUS = "SELECT pg_xact_status(CAST(CAST(%(xid)s AS text) AS xid8))"
_END = (
    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
    " WHERE pid = %(pid)s AND backend_xid = xid(CAST(CAST(%(xid)s AS text) AS xid8))"
)
# The first eight digits of a WAL file's name are those of the timeline; a standby has none to write to.
# The statistics begin anew with every recovery from a crash, and are kept over an orderly restart.
_HISTORY = (
    "CASE WHEN pg_is_in_recovery() THEN '' ELSE substr(pg_walfile_name(pg_current_wal_insert_lsn()), 1, 8) END,"
    " (SELECT stats_reset::text FROM pg_stat_bgwriter)"
)
_TIMELINE = f"SELECT {_HISTORY}"
_TIMEOUT = "SELECT setting FROM pg_settings WHERE name = 'statement_timeout'"
_INTRODUCTION = f"SELECT setting, {_HISTORY} FROM pg_settings WHERE name = 'statement_timeout'"

#: Set where a connection is made for no other purpose than to ask: it belongs to no attempt.
ASKING: ContextVar[bool] = ContextVar("workerpools_asking", default=False)


@dataclass(frozen=True)
class CommitState:
    """What is known of a COMMIT that failed.

    Attributes:
        sent: Whether it may have left.
        outcome: ``aborted``, or empty where it is not known.
        xid: The transaction's id, where it was noted.
    """

    sent: bool
    outcome: str = ""
    xid: str = ""


@dataclass(frozen=True)
class _Transaction:
    xid: str
    pid: int
    timeline: str
    #: Since when the server has statistics: since it was made, or since its last crash.
    life: str | None


def watch_commits(engine: sqlalchemy.Engine, opening: Opening, resolve_timeout: float, timeouts: Timeouts) -> None:
    """Note each COMMIT of ``engine`` as an effect, and resolve those whose acknowledgement was lost.

    Args:
        engine: The engine; its dialect's ``do_commit`` is replaced.
        opening: Whose engine it is.
        resolve_timeout: How long to ask for the outcome, in seconds.
        timeouts: Has COMMIT and ROLLBACK watched.
    """
    dialect: Any = engine.dialect
    commit: Callable[[Any], None] = dialect.do_commit
    rollback: Callable[[Any], None] = dialect.do_rollback

    def original(proxied: Any) -> None:
        with timeouts.watched(proxied.dbapi_connection):
            commit(proxied)

    def do_rollback(proxied: Any) -> None:
        with timeouts.watched(getattr(proxied, "dbapi_connection", proxied)):
            rollback(proxied)

    def do_commit(proxied: Any) -> None:
        if commits_each_statement(proxied.dbapi_connection):
            original(proxied)
            return
        transaction = None
        if TIMELINE in proxied.info:
            if not _only_reads(dialect, proxied):
                with timeouts.watched(proxied.dbapi_connection):
                    transaction = _note(proxied, proxied.info[TIMELINE])
            if transaction is None:
                _commit_nothing(dialect, original, proxied)
                return
        effect = opening.effect(f"COMMIT by {opening.resource!r}")
        try:
            original(proxied)
        except dialect.loaded_dbapi.Error as error:
            # Anything else has struck meanwhile, as a time limit does, and the server may have done it: it stays noted.
            if not dialect.is_disconnect(error, proxied, None):
                # The server has answered: it was not committed.
                effect.withdraw()
                raise
            within = deadline().clamp(resolve_timeout) or 0.0
            outcome = _resolve(engine, transaction, within) if transaction else ""
            if outcome == "committed":
                opening.resolved("committed")
                with opening.closing("stale"):
                    _throw_away(engine, proxied)
                return
            if outcome == "aborted":
                opening.resolved("aborted")
                effect.withdraw()
            xid = transaction.xid if transaction is not None else ""
            setattr(error, COMMIT_STATE, CommitState(True, outcome, xid))
            raise

    dialect.do_commit = do_commit
    dialect.do_rollback = do_rollback


def _only_reads(dialect: Any, proxied: Any) -> bool:
    # The server refuses to write in a transaction that was begun as READ ONLY: no need to ask it.
    return dialect.get_readonly(proxied.dbapi_connection) is True and READ_WRITE not in proxied.info


def _commit_nothing(dialect: Any, original: Callable[[Any], None], proxied: Any) -> None:
    # A transaction that wrote nothing has nothing to lose: its reads were complete before COMMIT.
    try:
        original(proxied)
    except Exception as error:
        if not dialect.is_disconnect(error, proxied, None):
            raise
        connection = _connection(proxied)
        if connection is None:
            setattr(error, COMMIT_STATE, CommitState(False))
            raise
        connection.invalidate(error)


def _note(proxied: Any, timeline: Any) -> _Transaction | None:
    cursor = proxied.cursor()
    try:
        cursor.execute(_NOTE)
        xid, pid = cursor.fetchone()
    except Exception as error:
        setattr(error, COMMIT_STATE, CommitState(False))
        raise
    finally:
        _quietly(cursor.close)
    return None if xid is None else _Transaction(xid, pid, *timeline)


def _connection(proxied: Any) -> Connection | None:
    ref: weakref.ref[Connection] | None = proxied.info.get(CONNECTION)
    return None if ref is None else ref()


def _throw_away(engine: sqlalchemy.Engine, proxied: Any) -> None:
    connection = _connection(proxied)
    if connection is not None:
        connection.invalidate()
    else:
        proxied.invalidate()
    # Its idle siblings are of the same age.
    engine.dispose()


def _resolve(engine: sqlalchemy.Engine, transaction: _Transaction, timeout: float) -> str:
    """Return ``committed``, ``aborted``, or an empty text if it could not be found out within ``timeout``."""
    started = time.monotonic()
    pause = 0.02
    # A connection pool of its own: the engine's may have no room for one connection more.
    pool = engine.pool.recreate()
    token = ASKING.set(True)
    try:
        while True:
            answer = _ask(engine, pool, transaction, end=time.monotonic() - started > GRACE)
            if answer != "":
                return "" if answer == "unknown" else answer
            if time.monotonic() + pause - started > timeout:
                return ""
            time.sleep(pause)
            pause = min(1.0, pause * 2)
    finally:
        ASKING.reset(token)
        _quietly(pool.dispose)


def _ask(engine: sqlalchemy.Engine, pool: Any, transaction: _Transaction, *, end: bool) -> str:
    """Return the outcome, ``unknown`` if it never will be known, or an empty text if it is worth to ask again."""
    try:
        connection = pool.connect()
    except Exception as error:
        permanent = classify_connect(error, resource="").kind is FailureKind.PERMANENT
        return "unknown" if permanent else ""
    parameters = {"xid": transaction.xid, "pid": transaction.pid}
    try:
        cursor = connection.cursor()
        cursor.execute(_TIMELINE)
        timeline, life = cursor.fetchone()
        if timeline != transaction.timeline:
            # A standby may know of a COMMIT later than its primary: worth asking again. On another timeline the id may
            # have been given to another transaction.
            return "unknown" if timeline else ""
        if life != transaction.life:
            # It has crashed: an id of which nothing had reached the disk is given away again. Then the transaction
            # was lost, whatever became of the other one; but a COMMIT may be either's.
            try:
                cursor.execute(_STATUS, parameters)
            except Exception as error:
                if error_code(error) != "22023":
                    raise
                return "aborted"
            (status,) = cursor.fetchone()
            if status == "in progress":
                # Another one's, if it is not ours after somebody has reset the statistics.
                return ""
            return "aborted" if status == "aborted" else "unknown"
        cursor.execute(_STATUS, parameters)
        (status,) = cursor.fetchone()
        if status == "in progress":
            if end:
                cursor.execute(_END, parameters)
            return ""
        # None: too long ago to be known.
        return str(status) if status in ("committed", "aborted") else "unknown"
    except Exception as error:
        logger.debug("asking for the outcome of a COMMIT failed: %s", type(error).__name__, exc_info=True)
        return ""
    finally:
        _quietly(connection.invalidate)


def introduce(connection: Any, info: dict[str, Any], timeouts: Timeouts, *, resolves: bool) -> None:
    """Ask a new connection which history its server writes, and which timeout is in force; costs one round trip.

    A second one where the server does not tell the first.

    Args:
        connection: The driver's connection, not yet used.
        info: The connection's ``info``. Without a timeline in it, no COMMIT over the connection is resolved.
        timeouts: Told of the timeout.
        resolves: Whether the timeline is wanted.
    """
    before = connection.autocommit
    try:
        if not (resolves and _introduced(connection, info, timeouts, _INTRODUCTION)):
            # Deadlines need no history, which some servers that speak PostgreSQL's protocol do not know, and others
            # do not tell every role.
            _introduced(connection, info, timeouts, _TIMEOUT)
    finally:
        _quietly(lambda: setattr(connection, "autocommit", before))


def _introduced(connection: Any, info: dict[str, Any], timeouts: Timeouts, question: str) -> bool:
    try:
        # Outside of a transaction: an error would abort it.
        connection.autocommit = True
        cursor = connection.cursor()
        cursor.execute(question)
        milliseconds, *history = cursor.fetchone()
        cursor.close()
        timeouts.opened(info, POSTGRESQL, int(milliseconds))
        if history and history[0]:
            info[TIMELINE] = tuple(history)
        return True
    except Exception as error:
        if connection.closed:
            # Lost while it was opened.
            raise
        logger.debug("the server does not say what it is: %s", type(error).__name__)
        return False


def _quietly(step: Callable[[], object]) -> None:
    try:
        step()
    except Exception as error:
        logger.debug("clean-up failed: %s", type(error).__name__)


def commits_each_statement(connection: Any) -> bool:
    """Return whether the driver's connection is in autocommit, so that a lost reply may hide a statement's success.

    SQLAlchemy's events do not tell: a connection in AUTOCOMMIT still fires begin and rollback.
    """
    autocommit = getattr(connection, "autocommit", None)
    if callable(autocommit):
        # The MySQL drivers have a method of that name to set it, and another one to ask.
        asked = getattr(connection, "get_autocommit", None)
        return bool(asked()) if asked is not None else False
    if type(connection).__module__ == "sqlite3":
        return autocommit is True or connection.isolation_level is None
    return autocommit is True
