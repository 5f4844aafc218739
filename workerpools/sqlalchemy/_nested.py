"""Nested task runs that wait for the run around them, which cannot go on before they end.

Such a wait is for a connection of an exhausted pool, or for a lock of the outer run's open transaction. No server finds
the second: the outer run is idle in its transaction, so for PostgreSQL there is no deadlock. A thread asks it who
blocks whom while a statement of a nested run takes long, and cancels the statement in that case.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from time import monotonic, sleep
from typing import Any, NamedTuple

import sqlalchemy
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from workerpools.adapter import Attempt, Failure, FailureKind, Lease, Opening, Phase, Sent, Watchdog, add_note
from workerpools.sqlalchemy._connecting import ASKING
from workerpools.sqlalchemy._connection import KEY, ConnectionState
from workerpools.sqlalchemy._errors import POOL_EXHAUSTED

__all__ = ["OwnLocks", "exhausted", "find_blocker", "refuse_endless_wait"]

logger = logging.getLogger("workerpools")

#: How often the connections of nested runs are looked at, in seconds; PostgreSQL's deadlock_timeout has the same value.
INTERVAL = 1.0
#: The longest pause between two questions about the same statement, in seconds. The first one is the interval.
LONGEST = 30.0
#: The longest wait for an answer, in seconds.
TIMEOUT = 5.0

#: libpq's PQtransactionStatus of a connection that waits for a reply.
_ACTIVE = 1

# pg_locks is visible to every role.
_BLOCKED = "SELECT DISTINCT pid, pg_blocking_pids(pid) FROM pg_locks WHERE NOT granted AND pid IS NOT NULL"

_watchdog = Watchdog()


def refuse_endless_wait(opening: Opening) -> None:
    """Raise an error if only the runs around the calling one could return a connection.

    Args:
        opening: The opening of the engine, whose connections are all in use.

    Raises:
        sqlalchemy.exc.TimeoutError: The wait would never end.
    """
    reason = opening.endless_wait(nested=True)
    if reason:
        raise PoolTimeoutError(f"{reason}: raise max_overflow, or send the inner task to the broker")


def exhausted(opening: Opening) -> Failure:
    """Return the failure of a wait for a connection that ended without one."""
    failure, reason = replace(POOL_EXHAUSTED, resource=opening.resource), opening.endless_wait()
    return replace(failure, kind=FailureKind.PERMANENT, known=reason) if reason else failure


def find_blocker(waiting: int, holders: Collection[int], blocked: Mapping[int, Iterable[int]]) -> int | None:
    """Return the session of ``holders`` for which another one waits, directly or through others; None for none of them.

    Args:
        waiting: The process id of the waiting session.
        holders: Those of the sessions that cannot go on.
        blocked: For each waiting session those that block it.
    """
    pending, seen = [waiting], {waiting}
    while pending:
        for blocker in blocked.get(pending.pop(), ()):
            if blocker in holders:
                return blocker
            if blocker not in seen:
                seen.add(blocker)
                pending.append(blocker)
    return None


@dataclass
class _Watched:
    """A connection of a nested run.

    Attributes:
        driver: The driver's connection.
        state: Its state.
        pid: The process id of its session.
        holders: The tasks of the runs around it, by the process id of the sessions they hold.
        next: When to ask the server; None while no statement is in progress.
        pause: The pause before the question after that, in seconds.
        found: The reason why the wait was ended; empty before.
    """

    driver: Any
    state: ConnectionState
    pid: int
    holders: dict[int, str]
    next: float | None = None
    pause: float = INTERVAL
    found: str = ""


class _Held(NamedTuple):
    pid: int
    task: str


class OwnLocks:
    """Ends the waits of nested runs for locks of the runs around them. For psycopg2 and psycopg 3.

    Args:
        engine: The engine.
        opening: Its opening.
        states: The states of its connections.
    """

    def __init__(self, engine: sqlalchemy.Engine, opening: Opening, states: Collection[ConnectionState]) -> None:
        self._engine = engine
        self._opening = opening
        self._states = states
        self._reset()

    def _reset(self) -> None:
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._watched: dict[Lease, _Watched] = {}
        self._runs = False

    def watch(self, connection: Any, lease: Lease) -> None:
        """Watch a connection that a nested run has checked out, if a run around it has one as well.

        Args:
            connection: The pool's proxy.
            lease: Its lease.
        """
        held = dict(self._held_around(lease.attempt))
        if not held:
            return
        if self._pid != os.getpid():
            # The thread does not survive a fork, and the lock may have been held.
            self._reset()
        driver = connection.dbapi_connection
        with self._lock:
            self._watched[lease] = _Watched(driver, connection.info[KEY], driver.info.backend_pid, held)
            if self._runs:
                return
            self._runs = True
        threading.Thread(target=self._run, name="workerpools-locks", daemon=True).start()

    def _held_around(self, attempt: Attempt | None) -> Iterable[_Held]:
        around: set[Attempt] = set()
        while attempt is not None and (attempt := attempt.parent) is not None:
            around.add(attempt)
        for state in list(self._states):
            lease, borrower = state.lease, None if state.borrower is None else state.borrower()
            if lease is None or borrower is None or lease.attempt not in around:
                continue
            if lease.thread == threading.get_ident() and (driver := borrower.dbapi_connection) is not None:
                yield _Held(driver.info.backend_pid, lease.attempt.task)

    def _run(self) -> None:
        ASKING.set(True)
        while True:
            sleep(INTERVAL)
            with self._lock:
                for lease, watched in list(self._watched.items()):
                    if watched.state.lease is not lease:
                        del self._watched[lease]
                if not self._watched:
                    self._runs = False
                    return
                waiting = [each for each in self._watched.values() if _is_due(each)]
            try:
                if waiting:
                    self._look(waiting)
            except Exception as error:
                logger.debug("could not ask who blocks a nested task: %s", type(error).__name__, exc_info=True)

    def _look(self, waiting: Iterable[_Watched]) -> None:
        blocked = self._ask()
        for each in waiting:
            blocker = find_blocker(each.pid, each.holders, blocked)
            if blocker is None or each.found or each.state.lease not in self._watched:
                continue
            each.found = (
                f"it waited for a lock of the run of {each.holders[blocker] or 'a task'} in which it is nested, and "
                "which holds the lock until its own transaction ends"
            )
            getattr(each.driver, "cancel_safe", each.driver.cancel)()

    def _ask(self) -> Mapping[int, Iterable[int]]:
        # A separate connection pool: the engine's may be exhausted.
        pool = self._engine.pool.recreate()
        try:
            connection = pool.connect()
            try:
                watch = _watchdog.watch(connection.fileno(), monotonic() + TIMEOUT)
                try:
                    cursor = connection.cursor()
                    cursor.execute(_BLOCKED)
                    return dict(cursor.fetchall())
                finally:
                    _watchdog.forget(watch)
            finally:
                with suppress(Exception):
                    connection.invalidate()
        finally:
            with suppress(Exception):
                pool.dispose()

    def ended(self, error: BaseException, code: str, state: ConnectionState | None) -> bool:
        """Report an error of a nested run's statement, if it is the end of a wait for a lock of a run around it.

        Args:
            error: SQLAlchemy's exception.
            code: The driver's code.
            state: The state of the connection.

        Returns:
            Whether it is.
        """
        lease = None if state is None else state.lease
        watched = None if lease is None else self._watched.get(lease)
        # 57014: query_canceled.
        if state is None or watched is None or not watched.found or code != "57014":
            return False
        add_note(
            error,
            f"workerpools: {watched.found}. Commit before .apply(), or send the inner task to the broker",
        )
        phase = state.phase if state.phase is Phase.COMMIT else Phase.STATEMENT
        failure = Failure(FailureKind.PERMANENT, Sent.ALL, phase=phase, code=code, known=watched.found)
        self._opening.failed(error, failure)
        return True


def _is_due(watched: _Watched) -> bool:
    """Return whether to ask the server: a statement has been in progress for a while."""
    status = watched.state.status
    if status is None or status() != _ACTIVE:
        watched.next, watched.pause = None, INTERVAL
        return False
    now = monotonic()
    if watched.next is None:
        watched.next = now
        return False
    if now < watched.next:
        return False
    watched.next, watched.pause = now + watched.pause, min(LONGEST, 2 * watched.pause)
    return True
