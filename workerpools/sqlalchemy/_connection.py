"""The state of a pooled connection in one object: its holder, its activity and the settings in force."""

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
from typing import Any, NamedTuple, TypeVar

from sqlalchemy.engine import Connection

from workerpools.adapter import (
    Attempt,
    Deadline,
    Effect,
    Lease,
    Phase,
    SocketNumber,
    Watch,
    Watchdog,
    current,
    deadline,
)
from workerpools.sqlalchemy._texts import NOTHING, Text
from workerpools.sqlalchemy._timeouts import FLOOR, GRACE, Kind, fitting, looks_back, send, send_session

__all__ = [
    "COMMITTED",
    "IDLE",
    "IN_ERROR",
    "KEY",
    "OUTSIDE",
    "CommitState",
    "ConnectionState",
    "History",
    "Transaction",
    "User",
    "commits_each_statement",
    "raw",
    "state_of",
    "watchdog",
    "watched",
]

logger = logging.getLogger("workerpools")

R = TypeVar("R")

#: The key of a :class:`ConnectionState` in its connection's ``info``.
KEY = "workerpools"

#: libpq's PQtransactionStatus of a transaction with a failed statement: PostgreSQL can only roll it back, and answers
#: COMMIT with ROLLBACK and no error (PostgreSQL documentation, "COMMIT"). Reading it takes no round trip.
IN_ERROR = 3
#: The PQtransactionStatus of a connection without a transaction.
IDLE = 0

#: Returns the attempt that used a session last; None once that is gone.
User = Callable[[], "Attempt | None"]


def OUTSIDE() -> None:
    """The user of a session outside of every attempt."""


#: The process's, for every wait on a database's socket.
watchdog = Watchdog()


class History(NamedTuple):
    """What tells a PostgreSQL server from others, and what it had written when it was asked.

    Attributes:
        identifier: The cluster's system identifier, which copies and standbys of it share.
        timeline: Eight digits; a promoted copy begins a new one. Empty on a standby.
        start: The start of the server's main process, in seconds since 1970.
        life: The start of the server's statistics, in seconds since 1970: its creation or its last crash.
        lsn: The end of the WAL that had reached the disk, in bytes.
    """

    identifier: str
    timeline: str
    start: str
    life: str | None
    lsn: int


class CommitState(NamedTuple):
    """The state of a failed COMMIT.

    Attributes:
        sent: Whether it may have been sent.
        outcome: ``aborted``, or empty if unknown.
        xid: The transaction's id, if it was noted.
    """

    sent: bool
    outcome: str = ""
    xid: str = ""


#: Of a COMMIT that the server has acknowledged.
COMMITTED = CommitState(True, "committed")


class Transaction:
    """What is known of a connection's open transaction.

    Attributes:
        reads: Whether all its statements plainly read, by their texts.
        guarded: Whether the server has refused to write since it began.
        savepoint: Whether it does so in a savepoint of the adapter.
        none: Whether the server has said, after the last statement, that it has no id.
        xid: Its id; empty if unknown.
        pid: Its server process; 0 if unknown.
    """

    # Class attributes until set: every transaction would pay for a constructor.
    reads = True
    guarded = False
    savepoint = False
    none = False
    xid = ""
    pid = 0

    @property
    def did_nothing(self) -> bool:
        """Whether it is proven to have done nothing: by the server's word about a transaction of plain reads."""
        return self.reads and not self.xid and (self.guarded or self.none)


_STATUS = attrgetter("pgconn.transaction_status")


class ConnectionState:
    """One pooled connection: created when connecting begins, gone with the connection.

    Times are those of :func:`time.monotonic`; timeouts are in milliseconds.

    Attributes:
        begun: The time when connecting began.
        took: The duration of connecting, in seconds, until the first lease has counted it; None afterwards.
        born: The time of the first checkout; None before.
        lives: The maximum lifetime, in seconds; None for no limit.
        used: The time of the last checkin; None before.
        reason: The reason for closing it; empty if unknown.
        lease: The lease that counts its use; None while it is idle.
        borrower: The pool's proxy for the holder. Held weakly, so that an abandoned one is returned to the pool.
        connection: The ``Connection`` around it; None before the engine's first statement.
        thread: The thread that began the last statement on it; 0 before the first.
        unseen: The effect of what may go past the engine while an attempt holds it; None while it is idle.
        introduced: Whether its server was recognized as PostgreSQL's own.
        transaction: Its open transaction; None without one, and with drivers that do not tell.
        told: Whether the driver tells of statements that do not come from the engine.
        text: What the text of its last statement says.
        alone: Whether the last statement was its own transaction.
        announced: Whether the engine is executing a statement on it.
        flights: The statements of its engine; None for drivers other than PostgreSQL's.
        lasting: The deadline of a statement past the engine that goes on after its call, as COPY does; None without
            one.
        resets: The statements that restore its session's settings; empty for none.
        left_by: The attempt that used its session last; None for a new session.
        direct: Whether its server stays the same: no PgBouncer is in between.
        history: The server's history; None if a lost COMMIT cannot be resolved.
        phase: The current phase.
        read_write: Whether the transaction's READ ONLY may have been revoked.
        commit: The state of the last failed COMMIT.
        status: Returns libpq's transaction status; None for other drivers.
        kind: The statements that set the server's timeout; None without one.
        server: The timeout in force when it was opened, from the role's or the user's settings; 0 for none.
        session: The timeout of its session.
        local: The timeout of its transaction; None if the session's applies.
        fits: The deadline to which the timeout in force was fitted.
        fits_until: The time until which that timeout fits.
        started: The time when its last statement began.
        watch: Its watched socket; None if unknown.
        shut_down: Whether the watchdog has shut it down.
        waiting: Whether a wait with a deadline may be in progress on it.
    """

    __slots__ = (
        "__weakref__",
        "alone",
        "announced",
        "begun",
        "born",
        "borrower",
        "commit",
        "connection",
        "direct",
        "fits",
        "fits_until",
        "flights",
        "history",
        "introduced",
        "kind",
        "lasting",
        "lease",
        "left_by",
        "lives",
        "local",
        "phase",
        "read_write",
        "reason",
        "resets",
        "server",
        "session",
        "shut_down",
        "started",
        "status",
        "text",
        "thread",
        "told",
        "took",
        "transaction",
        "unseen",
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
        self.unseen: Effect | None = None
        self.introduced = False
        self.transaction: Transaction | None = None
        self.told = False
        self.text: Text = NOTHING
        self.alone = False
        self.announced = False
        self.direct = True
        self.flights: Any = None
        self.lasting: Deadline | None = None
        self.resets: tuple[str, ...] = ()
        self.left_by: User | None = None
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
        self.shut_down = False
        self.waiting = False

    def opened(self, connection: Any, socket: SocketNumber | None) -> None:
        """Note a new connection of the driver.

        Args:
            connection: The driver's connection.
            socket: Its socket if it has no ``fileno()``; None if unknown.
        """
        if socket is None and hasattr(connection, "fileno"):
            socket = SocketNumber(connection.fileno())
        if socket is not None:
            self.watch = Watch(socket)
        self.status = getattr(connection, "get_transaction_status", None)
        if self.status is None and hasattr(getattr(connection, "pgconn", None), "transaction_status"):
            # As a plain number: ``info.transaction_status`` makes two objects for each answer.
            self.status = partial(_STATUS, connection)

    def closed(self) -> None:
        """Release the driver's connection and its socket, whose number may be reused from now on."""
        self.status = None
        self.waited()
        if self.watch is not None:
            watchdog.watched.pop(self.watch, None)
            self.watch = None

    # Transactions.

    def transaction_ends(self) -> None:
        """Note the end of the transaction, and that its settings are no longer in force."""
        self.read_write = False
        self.transaction = None
        if self.local is not None:
            self.local = self.fits = None

    def savepoint_undone(self) -> None:
        """Note that settings made since a savepoint are no longer in force."""
        if self.local is not None:
            self.local = self.fits = None

    def nothing_unseen(self) -> bool:
        """Return whether nothing was committed past the engine, as far as the driver and the server tell."""
        if not self.told and self.connection is None:
            # Taken past the engine, with a driver that does not tell what is executed.
            return False
        return self.transaction is None or self.status is None or self.status() != IDLE

    # The session, whose settings outlast a transaction.

    def is_anothers(self, attempt: Attempt | None) -> bool:
        """Return whether another attempt than ``attempt`` used the session last."""
        left = self.left_by
        if left is None:
            return False
        return left is not OUTSIDE if attempt is None else left is OUTSIDE or left() is not attempt

    def used_by(self, attempt: Attempt | None) -> None:
        """Note which attempt uses the session; None for code outside of one."""
        self.left_by = OUTSIDE if attempt is None else weakref.ref(attempt)

    def was_reset(self) -> None:
        """Note that its session was reset: with RESET ALL, to the timeout with which it was opened."""
        if "RESET ALL" in self.resets:
            self.session, self.fits = self.server, None

    # Waiting: the watchdog ends a wait that the server does not end.

    def wait(self, at: float | None) -> None:
        """Start watching the socket.

        Args:
            at: The deadline; None to watch nothing.
        """
        if self.waiting:
            # Left by an interrupted wait, possibly of another task.
            self.waited()
        watch = self.watch
        if watch is None or at is None:
            return
        now = monotonic()
        ends = (at if now < at else now + FLOOR) + GRACE
        if watch.at != ends:
            watchdog.arm(watch, ends)
        self.waiting = True
        watch.waiting.append(True)
        if not watch.armed:
            watchdog.arm(watch, ends)

    def waited(self) -> bool:
        """Stop watching the socket; return whether the watchdog shut it down."""
        watch, waiting = self.watch, self.waiting
        self.waiting = False
        if watch is None or not waiting:
            return False
        try:
            watch.waiting.pop()
            return False
        except IndexError:
            return self.taken()

    def bounded(self, run: Callable[[], R]) -> R:
        """Return the result of ``run``, which waits for the server, by the deadline.

        Raises:
            Exception: The driver's error.
        """
        lasting = self.lasting
        # A statement that lasts may be continued in a thread that belongs to no attempt.
        self.wait((lasting or deadline()).at)
        if lasting is None:
            # The server's timeout begins anew.
            self.started = monotonic()
        self.announced = True
        try:
            return run()
        finally:
            self.announced = False
            self.waited()

    def past_engine(self, connection: Any, run: Callable[[], R], phase: Phase | None = Phase.STATEMENT) -> R:
        """Return the result of ``run``, which waits for the server past the engine; report its error.

        Args:
            connection: The driver's connection.
            run: The function.
            phase: What it does; None if unknown.

        Raises:
            Exception: The driver's error.
        """
        try:
            return self.bounded(run)
        except Exception as error:
            self.flights.failed(self, error, connection, phase)
            raise

    def fetch(self, cursor: Any, run: Callable[[], R]) -> R:
        """Return the result of ``run``, which fetches rows of a server-side cursor, by the deadline.

        Args:
            cursor: The driver's cursor; ``of_engine`` says whether the engine has executed its statement.
            run: The function.

        Raises:
            Exception: The driver's error.
        """
        if not cursor.of_engine:
            return self.past_engine(cursor.connection, run)
        self.phase = Phase.STATEMENT
        return self.bounded(run)

    def taken(self) -> bool:
        """Wait for the watchdog, which took the token; return whether it shut the socket down."""
        found = self.watch is not None and watchdog.stop_waiting(self.watch)
        self.shut_down |= found
        return found

    # The server's timeout.

    def fit_session(self, connection: Any, at: float | None) -> bool:
        """Fit the session's timeout to a deadline; return whether that took a round trip.

        Raises:
            Exception: An error of the driver: the connection is dead.
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
        # The remaining time shrinks, the timeout in force does not.
        self.fits, self.fits_until = at, 0.0 if at is None else at - self.session / 1000
        return milliseconds is not None

    def fit(self, connection: Any, at: float, statement: str) -> None:
        """Fit the timeout of ``statement`` to a deadline, if it can be set before the statement."""
        kind = self.kind
        if kind is None:
            return
        milliseconds = self.timeout(at)
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
                # The statement itself fails on the same connection, with an error that the caller can catch.
                logger.debug("could not set a statement timeout: %s", type(error).__name__)
                return
        self.fitted(at)

    def timeout(self, at: float) -> int | None:
        """Return the timeout to set for a deadline; None if the one in force fits."""
        effective = self.session if self.local is None else self.local
        return fitting(max(0.0, at - monotonic()), effective, self.server)

    def fitted(self, at: float) -> None:
        """Note that the timeout in force fits a deadline."""
        effective = self.session if self.local is None else self.local
        # The remaining time shrinks, the timeout in force does not.
        self.fits, self.fits_until = at, at - effective / 1000

    @property
    def has_timed_out(self) -> bool:
        """Whether the last statement has exceeded a timeout set for a deadline."""
        effective = self.session if self.local is None else self.local
        return effective not in (0, self.server) and monotonic() >= self.started + effective / 1000

    # Reclaiming a connection that an attempt left checked out.

    def reclaim(self) -> bool:
        """Roll back and check in, unless another thread used it last and may still do so.

        Returns:
            Whether it was still checked out.

        Raises:
            Exception: Checking in failed; the connection is not used again.
        """
        if self.thread not in (0, threading.get_ident()):
            return False
        connection = None if self.connection is None else self.connection()
        borrower = None if self.borrower is None else self.borrower()
        try:
            if connection is not None and not connection.closed:
                # The outer object, so that a later use raises an error.
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


def raw(connection: Any) -> Any:
    """Return the driver's own connection in what SQLAlchemy makes of an asynchronous one; any other as it is."""
    return getattr(connection, "driver_connection", connection)


def state_of(connection: Connection) -> ConnectionState | None:
    """Return the state of a connection; None if it is invalidated, closed or not of one of our pools.

    SQLAlchemy's initial queries to a server use a connection without ``info``. In each of these cases access raises an
    error, which would mask the real one.
    """
    if connection.closed or connection.invalidated:
        return None
    try:
        return connection.info.get(KEY)
    except NotImplementedError:
        return None


@contextmanager
def watched(connection: Any) -> Generator[None, None, None]:
    """Watch the socket of a driver's connection that has no state yet."""
    attempt = current()
    at = None if attempt is None else attempt.deadline.at
    if at is None or not hasattr(connection, "fileno"):
        yield
        return
    now = monotonic()
    watch = watchdog.watch(connection.fileno(), (at if now < at else now + FLOOR) + GRACE)
    try:
        yield
    finally:
        watchdog.forget(watch)


def commits_each_statement(connection: Any) -> bool:
    """Return whether the driver's connection is in autocommit, so that a lost reply may hide a statement's success.

    SQLAlchemy's events do not show it: a connection in AUTOCOMMIT still fires begin and rollback.
    """
    autocommit = getattr(connection, "autocommit", None)
    if callable(autocommit):
        # In the MySQL drivers, autocommit() is the setter and get_autocommit() the getter.
        asked = getattr(connection, "get_autocommit", None)
        return bool(asked()) if asked is not None else False
    if type(connection).__module__ == "sqlite3":
        return autocommit is True or connection.isolation_level is None
    return autocommit is True
