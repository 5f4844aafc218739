"""Finds out whether a COMMIT succeeded when its acknowledgement was lost.

A new connection learns which server it leads to. The transaction's id is noted before COMMIT; after a loss, a fresh
connection queries ``pg_xact_status`` (PostgreSQL documentation, "Transaction ID and Snapshot Information Functions";
version 13 and later). The id is the cluster's, so that the database does not matter. It means something only to the
server that gave it: another cluster, or a copy of this one, has its own transaction with that number.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import sqlalchemy
from sqlalchemy.util import await_only

from workerpools.adapter import FailureKind, deadline, on_loop
from workerpools.sqlalchemy._connecting import ASKING, ended, finish
from workerpools.sqlalchemy._connection import KEY, ConnectionState, History
from workerpools.sqlalchemy._errors import classify_connect, error_code
from workerpools.sqlalchemy._timeouts import POSTGRESQL

__all__ = ["Noted", "Origin", "introduce", "note", "origin", "resolve"]

logger = logging.getLogger("workerpools")

#: How long a transaction in progress may take to end by itself, in seconds. Then its session is terminated: it is ours,
#: and nothing reads its reply.
GRACE = 1.0

_START = "extract(epoch FROM pg_postmaster_start_time())::text"
_BORN = "extract(epoch FROM clock_timestamp() - pg_postmaster_start_time())::float8"
# Every role may call these functions by default. The first eight digits of a WAL file's name are the timeline; a
# standby writes no WAL. Statistics are reset by crash recovery and survive an orderly restart.
_HISTORY = (
    "(SELECT system_identifier::text FROM pg_control_system()),"
    " CASE WHEN pg_is_in_recovery() THEN '' ELSE substr(pg_walfile_name(pg_current_wal_insert_lsn()), 1, 8) END,"
    f" {_START},"
    " (SELECT extract(epoch FROM stats_reset)::text FROM pg_stat_bgwriter),"
    " CASE WHEN pg_is_in_recovery() THEN 0 ELSE (pg_current_wal_flush_lsn() - '0/0'::pg_lsn)::bigint END"
)
_AGES = f"{_BORN}, (SELECT extract(epoch FROM clock_timestamp() - stats_reset)::float8 FROM pg_stat_bgwriter)"
_TIMEOUT = "SELECT setting FROM pg_settings WHERE name = 'statement_timeout'"
_INTRODUCTION = f"SELECT setting, {_HISTORY} FROM pg_settings WHERE name = 'statement_timeout'"
#: The transaction's id, which may not be assigned; and the same with an assignment.
IF_ASSIGNED = f"SELECT pg_current_xact_id_if_assigned()::text, pg_backend_pid(), {_START}"
ASSIGNED = f"SELECT pg_current_xact_id()::text, pg_backend_pid(), {_START}"
_SERVER = f"SELECT current_setting('synchronous_standby_names') <> '', {_AGES}, {_HISTORY}"
_STATUS = "SELECT pg_xact_status(CAST(CAST(%(xid)s AS text) AS xid8))"
# Terminating a session that waits for synchronous replication ends only the wait: the transaction is then committed
# without it ("synchronous_commit"). Where there are synchronous standbys, a session that is executing its COMMIT may
# begin that wait at any moment.
_END = (
    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
    " WHERE pid = %(pid)s AND backend_xid = xid(CAST(CAST(%(xid)s AS text) AS xid8))"
    " AND wait_event IS DISTINCT FROM 'SyncRep'"
    " AND (state = 'idle in transaction' OR current_setting('synchronous_standby_names') = '')"
)
# A later COMMIT that waits for the standbys has waited for the earlier one, too. Only a transaction that has written
# WAL waits; this message is the least that writes some.
_REPLICATED = (
    "SELECT set_config('synchronous_commit', CASE current_setting('synchronous_commit')"
    " WHEN 'remote_apply' THEN 'remote_apply' ELSE 'on' END, true),"
    " pg_logical_emit_message(true, 'workerpools', ''::text)"
)


@dataclass(frozen=True)
class Noted:
    """A transaction that may have to be resolved.

    Attributes:
        xid: Its id.
        pid: The process id of its session on the server.
        history: The history of the server that gave the id.
        noted: The time when the server gave the id, on the clock of :func:`time.monotonic`.
    """

    xid: str
    pid: int
    history: History
    noted: float = field(default_factory=time.monotonic)


def note(
    ask: Callable[[str], tuple[Any, ...]], state: ConnectionState, history: History, *, assign: bool
) -> Noted | None:
    """Query the current transaction's id; takes one round trip. None if it has none.

    Args:
        ask: Returns the one row of a query on the connection.
        state: Its state.
        history: The history of its server, as last seen.
        assign: Whether a transaction without an id is given one.

    Raises:
        Exception: Any error of the driver.
    """
    xid, pid, start = ask(ASSIGNED if assign else IF_ASSIGNED)
    if xid is None:
        return None
    if start != history.start:
        # A proxy leads the connection to another server than at its opening.
        state.history = history = History(*ask(f"SELECT {_HISTORY}"))
    return Noted(xid, pid, history)


# Which server answers.


class Origin(Enum):
    """The relation of the server that answers to the one that gave the id."""

    SAME = "it has been running since"
    RESTARTED = "it was shut down in order, and started again"
    CRASHED = "it crashed and recovered"
    STANDBY = "a standby of it, which may be promoted or replaced"
    FOREIGN = "another server, or none that can be told from one"


def origin(
    transaction: Noted, now: History, *, uptime: float, life: float | None, elapsed: float | None = None
) -> Origin:
    """Decide whether the server that answers gave the transaction its id.

    One server process is recognised by its time of start. A restarted server cannot be told from a copy of its files by
    any identifier; but a server that was running already while the transaction was is another one, and so is one that
    has written less WAL.

    Args:
        transaction: The transaction.
        now: The history of the server that answers.
        uptime: The time since its start, in seconds on its own clock.
        life: The time since its statistics were reset, in seconds on its own clock; None if unknown.
        elapsed: The time since the id was given, in seconds; by default until now.
    """
    then = transaction.history
    if elapsed is None:
        elapsed = time.monotonic() - transaction.noted
    if not now.identifier or now.identifier != then.identifier:
        return Origin.FOREIGN
    if not now.timeline:
        return Origin.STANDBY
    if now.timeline != then.timeline:
        # Another server's, or the same one restored: the id may have been given again.
        return Origin.FOREIGN
    same = now.start == then.start
    if not same and (uptime > elapsed or now.lsn < then.lsn):
        return Origin.FOREIGN
    if now.life == then.life:
        return Origin.SAME if same else Origin.RESTARTED
    if life is not None and life > elapsed:
        # Reset by hand before; or a copy, which recovered when it was made.
        return Origin.SAME if same else Origin.FOREIGN
    return Origin.CRASHED


# Asking.


def resolve(engine: sqlalchemy.Engine, transaction: Noted, resolve_timeout: float) -> str:
    """Return ``committed``, ``aborted``, or an empty text if the outcome is unknown.

    Args:
        engine: The engine whose server is asked.
        transaction: The transaction whose COMMIT was lost.
        resolve_timeout: Time limit, in seconds; the task's deadline shortens it.
    """
    started = time.monotonic()
    ends = started + (deadline().clamp(resolve_timeout) or 0.0)
    pause = 0.02
    # A separate connection pool: the engine's may be exhausted.
    pool = engine.pool.recreate()
    token = ASKING.set(ends)
    try:
        while True:
            answer = _ask(engine, pool, transaction, ends, end=time.monotonic() - started > GRACE)
            if answer != "":
                return "" if answer == "unknown" else answer
            if time.monotonic() + pause > ends:
                return ""
            _rest(pause)
            pause = min(1.0, pause * 2)
    finally:
        ASKING.reset(token)
        _quietly(pool.dispose)


def _rest(seconds: float) -> None:
    if on_loop():
        await_only(asyncio.sleep(seconds))
    else:
        time.sleep(seconds)


def _ask(engine: sqlalchemy.Engine, pool: Any, transaction: Noted, ends: float, *, end: bool) -> str:
    """Return the outcome, ``unknown`` if it can never be known, or an empty text if asking again may help."""
    try:
        connection = pool.connect()
    except Exception as error:
        ended()
        permanent = classify_connect(error, resource="").kind is FailureKind.PERMANENT
        return "unknown" if permanent else ""
    state: ConnectionState = connection.info[KEY]
    # Until the last answer it is a connection that is being opened, and has connect_timeout.
    state.wait(ends)
    try:
        driver = connection.dbapi_connection
        if driver.autocommit:
            # One transaction, so that a proxy leads all questions to one server.
            driver.autocommit = False
        cursor = connection.cursor()
        cursor.execute(_SERVER)
        replicated, uptime, life, *history = cursor.fetchone()
        server = origin(transaction, History(*history), uptime=uptime, life=life)
        if server is Origin.FOREIGN:
            return "unknown"
        if server is Origin.STANDBY:
            # It learns of a COMMIT later than its primary.
            return ""
        numbered = engine.dialect.paramstyle == "numeric_dollar"
        status = _status(cursor, transaction, numbered)
        if server is Origin.CRASHED:
            # It reuses ids that had not reached the disk. The transaction is then lost, whatever the outcome of the
            # other one; but a COMMIT may belong to either.
            return {"aborted": "aborted", "future": "aborted", "in progress": ""}.get(status, "unknown")
        if status == "in progress":
            if server is Origin.RESTARTED:
                return "unknown"
            if end:
                cursor.execute(*_with(_END, numbered, xid=transaction.xid, pid=transaction.pid))
            return ""
        if status == "committed" and replicated:
            # Its wait for the standbys may have been ended, by a shutdown for example.
            cursor.execute(_REPLICATED)
            finish()
            driver.commit()
        return status if status in ("committed", "aborted") else "unknown"
    except Exception as error:
        logger.debug("could not query the outcome of a COMMIT: %s", type(error).__name__, exc_info=True)
        return ""
    finally:
        state.waited()
        ended()
        _quietly(connection.invalidate)


def _with(question: str, numbered: bool, **values: object) -> tuple[str, object]:
    """Return a question and its parameters as the driver takes them: by name, or by number."""
    if not numbered:
        return question, values
    for number, name in enumerate(values, 1):
        question = question.replace(f"%({name})s", f"${number}")
    return question, tuple(values.values())


def _status(cursor: Any, transaction: Noted, numbered: bool) -> str:
    """Return the server's answer, or ``future`` if it has not given the id yet, or ``old`` if it knows no more."""
    try:
        cursor.execute(*_with(_STATUS, numbered, xid=transaction.xid))
    except Exception as error:
        if error_code(error) != "22023":
            raise
        return "future"
    (status,) = cursor.fetchone()
    return "old" if status is None else str(status)


# A new connection.


def introduce(connection: Any, state: ConnectionState, *, resolves: bool) -> None:
    """Query a new connection's history and timeout; takes one round trip, or two if the server refuses the first query.

    Args:
        connection: The driver's connection, not yet used.
        state: The connection's state. Without a history, no COMMIT over the connection is resolved.
        resolves: Whether to query the history.
    """
    before = connection.autocommit
    try:
        if not (resolves and _introduced(connection, state, _INTRODUCTION)):
            # Deadlines need no history. Some servers with PostgreSQL's protocol have none, and some hide it from some
            # roles.
            _introduced(connection, state, _TIMEOUT)
    finally:
        _quietly(lambda: setattr(connection, "autocommit", before))


def _introduced(connection: Any, state: ConnectionState, question: str) -> bool:
    try:
        # Outside a transaction, which an error would abort.
        connection.autocommit = True
        cursor = connection.cursor()
        cursor.execute(question)
        milliseconds, *values = cursor.fetchone()
        cursor.close()
        state.kind, state.server = POSTGRESQL, int(milliseconds)
        state.session = state.server
        state.introduced = bool(values)
        if values and (history := History(*values)).identifier and history.timeline:
            state.history = history
        return True
    except Exception as error:
        if connection.closed:
            # Lost while it was being opened.
            raise
        logger.debug("could not query the server's history or timeout: %s", type(error).__name__)
        return False


def _quietly(step: Callable[[], object]) -> None:
    try:
        step()
    except Exception as error:
        logger.debug("clean-up failed: %s", type(error).__name__)
