"""All that is known of one pooled connection, in one object: who holds it, what it is doing, what is in force on it."""

from __future__ import annotations

import contextlib
import logging
import threading
import weakref
from collections.abc import Callable, Generator
from contextlib import contextmanager
from functools import partial
from operator import attrgetter
from time import monotonic
from typing import Any, NamedTuple

from sqlalchemy.engine import Connection

from workerpools.adapter import Effect, Lease, Phase, SocketNumber, Watch, Watchdog, current
from workerpools.sqlalchemy._timeouts import FLOOR, GRACE, Kind, fitting, looks_back, send, send_session

__all__ = [
    "IDLE",
    "IN_ERROR",
    "KEY",
    "CommitState",
    "ConnectionState",
    "History",
    "commits_each_statement",
    "state_of",
    "watched",
]

logger = logging.getLogger("workerpools")

#: Where a :class:`ConnectionState` stands in the ``info`` of its connection.
KEY = "workerpools"

#: libpq's PQtransactionStatus of a transaction in which a statement failed: PostgreSQL will only roll it back, and
#: answers COMMIT with ROLLBACK and no error (PostgreSQL documentation, "COMMIT"). Asking costs no round trip.
IN_ERROR = 3
#: That of a connection without a transaction.
IDLE = 0

_watchdog = Watchdog()


class History(NamedTuple):
    """Which history a PostgreSQL server writes.

    Attributes:
        timeline: Eight digits.
        life: Since when the server has statistics: since it was made, or since its last crash.
    """

    timeline: str
    life: str | None


class CommitState(NamedTuple):
    """What is known of a COMMIT that failed.

    Attributes:
        sent: Whether it may have left.
        outcome: ``aborted``, or empty where it is not known.
        xid: The transaction's id, where it was noted.
    """

    sent: bool
    outcome: str = ""
    xid: str = ""


class ConnectionState:
    """One pooled connection: made when connecting begins, gone with the connection.

    Times are those of :func:`time.monotonic`, timeouts in milliseconds.

    Attributes:
        begun: When connecting began.
        took: How long that took, in seconds, until the first lease has counted it; None afterwards.
        born: When it was checked out first; None before.
        lives: How long it may live, in seconds; None for ever.
        used: When it was checked in last; None before.
        reason: Why it is being closed; empty if nothing tells.
        lease: Counts its use; None while it is idle.
        borrower: What the pool has given out. Held weakly, so that one that nobody holds goes back by itself.
        connection: The ``Connection`` around that; None for one that was taken past the engine.
        thread: The thread that has begun the last statement on it; 0 before the first.
        raw: The effect of one that was taken past the engine; None once a ``Connection`` holds it.
        history: The server's; None where no lost COMMIT can be resolved.
        phase: What it is doing.
        read_write: Whether the transaction's READ ONLY may have been taken back.
        commit: What is known of the last COMMIT that failed.
        status: Returns libpq's transaction status; None for other drivers.
        kind: How its server is told a timeout; None where there is none to tell.
        server: The timeout that was in force when it was opened, by the role's or the user's own settings; 0 is none.
        session: The timeout of its session.
        local: The timeout of its transaction; None where that is the session's.
        fits: The deadline that the timeout in force was fitted to, and until when it fits.
        started: When its last statement began.
        watch: Its socket; None where that is not known.
        waiting: Whether something may wait on it, within a deadline.
    """

    __slots__ = (
        "__weakref__",
        "begun",
        "born",
        "borrower",
        "commit",
        "connection",
        "fits",
        "fits_until",
        "history",
        "kind",
        "lease",
        "lives",
        "local",
        "phase",
        "raw",
        "read_write",
        "reason",
        "server",
        "session",
        "started",
        "status",
        "thread",
        "took",
        "used",
        "waiting",
        "watch",
    )

    def __init__(self) -> None:
        self.begun = monotonic()
        self.took: float | None = None
        self.born: float | None = None
        self.lives: float | None = None
        self.used: float | None = None
        self.reason = ""
        self.lease: Lease | None = None
        self.borrower: weakref.ref[Any] | None = None
        self.connection: weakref.ref[Connection] | None = None
        self.thread = 0
        self.raw: Effect | None = None
        self.history: History | None = None
        self.phase = Phase.STATEMENT
        self.read_write = False
        self.commit: CommitState | None = None
        self.status: Callable[[], int] | None = None
        self.kind: Kind | None = None
        self.server = 0
        self.session = 0
        self.local: int | None = None
        self.fits: float | None = None
        self.fits_until = 0.0
        self.started = 0.0
        self.watch: Watch | None = None
        self.waiting = False

    def opened(self, connection: Any, socket: SocketNumber | None) -> None:
        """Note the driver's connection, which was just opened.

        Args:
            connection: The driver's.
            socket: Its socket, where it has no ``fileno()``; None where that is not known.
        """
        if socket is None and hasattr(connection, "fileno"):
            socket = SocketNumber(connection.fileno())
        if socket is not None:
            self.watch = Watch(socket)
        self.status = getattr(connection, "get_transaction_status", None)
        if self.status is None and hasattr(getattr(connection, "info", None), "transaction_status"):
            self.status = partial(attrgetter("info.transaction_status"), connection)

    def closed(self) -> None:
        """Let go of the socket, whose number is given away from here on, and of the driver's connection."""
        self.status = None
        self.waited()
        if self.watch is not None:
            _watchdog.watched.pop(self.watch, None)
            self.watch = None

    # Transactions.

    def transaction_ends(self) -> None:
        """Note that what was set for the transaction is in force no longer."""
        self.read_write = False
        if self.local is not None:
            self.local = self.fits = None

    # Waiting: the watchdog ends what its server does not end.

    def wait(self, at: float | None) -> None:
        """Have the socket watched from here on.

        Args:
            at: The deadline; without one nothing is watched.
        """
        if self.waiting:
            # Left by what was interrupted, and this may be another task's.
            self.waited()
        watch = self.watch
        if watch is None or at is None:
            return
        now = monotonic()
        ends = (at if now < at else now + FLOOR) + GRACE
        if watch.at != ends:
            _watchdog.arm(watch, ends)
        self.waiting = True
        watch.waiting.append(True)
        if not watch.armed:
            _watchdog.arm(watch, ends)

    def waited(self) -> bool:
        """Have the socket watched no longer; return whether it was shut down meanwhile."""
        watch, waiting = self.watch, self.waiting
        self.waiting = False
        if watch is None or not waiting:
            return False
        try:
            watch.waiting.pop()
            return False
        except IndexError:
            return self.taken()

    def taken(self) -> bool:
        """Wait for the watchdog, which took the token; return whether the socket was shut down."""
        return self.watch is not None and _watchdog.stop_waiting(self.watch)

    # The server's timeout.

    def fit_session(self, connection: Any, at: float | None) -> bool:
        """Make the session's timeout fit a deadline; return whether that took a round trip.

        Raises:
            Exception: The driver's: the connection is dead.
        """
        kind = self.kind
        if kind is None:
            return False
        milliseconds = fitting(None if at is None else max(0.0, at - monotonic()), self.session, self.server)
        if milliseconds is not None:
            self.wait(at)
            try:
                send_session(connection, kind, milliseconds)
            finally:
                self.waited()
            self.session = milliseconds
        # What is left gets less, and what is in force does not.
        self.fits, self.fits_until = at, 0.0 if at is None else at - self.session / 1000
        return milliseconds is not None

    def fit(self, connection: Any, at: float, statement: str) -> None:
        """Make the timeout of ``statement`` fit a deadline, if it can be told before it."""
        kind = self.kind
        if kind is None:
            return
        effective = self.session if self.local is None else self.local
        milliseconds = fitting(max(0.0, at - monotonic()), effective, self.server)
        if milliseconds is not None:
            try:
                if kind.transaction is None:
                    if looks_back(statement):
                        return
                    send(connection, kind.session(milliseconds))
                    self.session = milliseconds
                elif connection.autocommit:
                    return
                else:
                    send(connection, kind.transaction(milliseconds))
                    self.local = milliseconds
            except Exception as error:
                # The statement that follows fails on the same connection, with an error that the caller can catch.
                logger.debug("setting a timeout failed: %s", type(error).__name__)
                return
            effective = milliseconds
        self.fits, self.fits_until = at, at - effective / 1000

    @property
    def has_timed_out(self) -> bool:
        """Whether a timeout that the deadline has set for the last statement is over."""
        effective = self.session if self.local is None else self.local
        return effective not in (0, self.server) and monotonic() >= self.started + effective / 1000

    # Giving back what an attempt has left checked out.

    def reclaim(self) -> bool:
        """Roll back and check in, unless another thread has used it last: it may still do so.

        Returns:
            Whether it was still out.

        Raises:
            Exception: It did not go back; it is not used again.
        """
        if self.thread not in (0, threading.get_ident()):
            return False
        connection = None if self.connection is None else self.connection()
        borrower = None if self.borrower is None else self.borrower()
        try:
            if connection is not None and not connection.closed:
                # The outer one: whoever uses it later is told that it is closed.
                connection.close()
                return True
            if borrower is not None and borrower.dbapi_connection is not None:
                borrower.close()
                return True
        except BaseException:
            with contextlib.suppress(BaseException):
                if borrower is not None:
                    borrower.invalidate()
            raise
        return False


def state_of(connection: Connection) -> ConnectionState | None:
    """Return what is known of a connection; None of one that was invalidated or closed, or of none of a pool of ours.

    SQLAlchemy asks its first questions to a server over one without ``info``. Each of them raises an error of its own,
    which would mask the real one.
    """
    if connection.closed or connection.invalidated:
        return None
    try:
        return connection.info.get(KEY)
    except NotImplementedError:
        return None


@contextmanager
def watched(connection: Any) -> Generator[None, None, None]:
    """Have the socket of a driver's connection watched of which nothing is known yet."""
    attempt = current()
    at = None if attempt is None else attempt.deadline.at
    if at is None or not hasattr(connection, "fileno"):
        yield
        return
    now = monotonic()
    watch = _watchdog.watch(connection.fileno(), (at if now < at else now + FLOOR) + GRACE)
    try:
        yield
    finally:
        _watchdog.forget(watch)


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
