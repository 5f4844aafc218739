"""The wire: urllib3's pool and connections, which tell a request's exchange what leaves, and what arrives.

requests tells nothing of what it does. So urllib3's connections are subclassed: connecting, sending, and the head of a
response pass through methods that urllib3 and ``http.client`` offer for it.
"""

from __future__ import annotations

import http.client
import io
import queue
import random
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache
from typing import Any

import urllib3
from urllib3.exceptions import HTTPError, ProtocolError, ReadTimeoutError, SSLError

from workerpools.adapter import (
    Deadline,
    Effect,
    Failure,
    FailureKind,
    Lease,
    Lifetime,
    Opening,
    Phase,
    Sent,
    SocketNumber,
    Watch,
    Watchdog,
)
from workerpools.adapter import deadline as current_deadline
from workerpools.errors import DeadlineExceeded
from workerpools.requests._errors import Progress

__all__ = ["TOO_LATE", "Answer", "Exchange", "Slots", "Traffic", "running", "watched"]

#: How long after the end of its time an exchange is ended, in seconds: the timeouts of its waits, which say more, come
#: first. Less than the deadline's margin before Celery's own limit.
GRACE = 0.08

#: A socket with a timeout of 0 does not wait, and raises an error other than a timeout.
LEAST = 0.001

#: How much is sent under one timeout, in bytes: Python's bounds all of what it is given.
PIECE = 65536

#: A waiting request looks again after this time, in seconds, if nobody wakes it: whoever should may be interrupted.
LOOK = 0.1

TOO_LATE = "the exchange was not over in time, however busy it was"

_watchdog = Watchdog()

#: The exchange that each thread is sending.
running: dict[int, Exchange] = {}


class Traffic:
    """A session's exchanges in flight and its idle connections.

    Args:
        opening: The opening to which they are reported.
        lifetime: How long connections are used.
        acquire_timeout: How long to wait for a connection, in seconds; None for ever.
        total_timeout: How long an exchange may take, in seconds; None for no limit of its own.
    """

    def __init__(
        self, opening: Opening, lifetime: Lifetime, acquire_timeout: float | None, total_timeout: float | None
    ) -> None:
        self.opening = opening
        self.lifetime = lifetime
        self.acquire_timeout = acquire_timeout
        self.total_timeout = total_timeout
        #: The exchanges in flight. Each adds and removes itself in one step, which no signal can interrupt.
        self.exchanges: dict[Exchange, None] = {}
        #: The pools of connections, one per server.
        self.pools: weakref.WeakSet[Slots] = weakref.WeakSet()
        self.closed = False

    def retire(self, since: float, reason: str) -> None:
        """Close connections that were opened before ``since``: now if they are idle, else after their exchanges."""
        for pool in tuple(self.pools):
            pool.retire(since, reason)

    def drain(self, timeout: float) -> None:
        """Wait at most ``timeout`` seconds until no exchange is in flight."""
        until = time.monotonic() + timeout
        # Polled, so that the end of an exchange costs no notification.
        while self.exchanges and time.monotonic() < until:
            time.sleep(0.005)


class Slots:
    """The connections of a pool, in the place of urllib3's queue (``ConnectionPool.QueueCls``).

    A signal handler that raises in a queue's Python code leaves its lock taken for ever, or loses one of its entries.
    Here the exchanges themselves are the count: the first ``maxsize`` of them have a connection each, the others wait
    in their order, and one that ends makes room, whatever interrupted it. No step needs a lock.

    Args:
        maxsize: How many exchanges have a connection at a time.
    """

    def __init__(self, maxsize: int) -> None:
        self._maxsize = maxsize
        self._exchanges: dict[Exchange, None] = {}
        self._idle: list[Watched] = []
        #: Connections opened before it are used for nothing new, and why.
        self._retired = (0.0, "")
        self._traffic: Traffic | None = None
        if (exchange := running.get(threading.get_ident())) is not None:
            self._traffic = exchange.traffic
            self._traffic.pools.add(self)

    def get(self, block: bool = True, timeout: float | None = None) -> Watched | None:
        """Return an idle connection; None if a new one has to be opened.

        Args:
            block: Whether the calling thread's exchange wants it; False to empty the pool.
            timeout: Ignored: requests passes none, and the exchange has its own.

        Raises:
            queue.Empty: No connection became free in time; without ``block``, none is idle.
        """
        exchange = running.get(threading.get_ident()) if block else None
        if exchange is not None:
            self._wait(exchange)
        held: list[Watched] = [] if exchange is None else exchange.held
        while self._idle:
            with suppress(IndexError):
                # In one step, as every move of a connection: it is idle, or its exchange closes it.
                held.extend(map(self._idle.pop, (-1,)))
                connection = held[-1]
                if not self._is_over(connection):
                    if exchange is not None:
                        connection.take(exchange)
                    return connection
                connection.close()
                held.pop()
        if block:
            return None
        raise queue.Empty

    def _wait(self, exchange: Exchange) -> None:
        # Kept before it is counted: an interruption in between leaves it to be removed.
        exchange.slots = self
        self._exchanges[exchange] = None
        if len(self._exchanges) <= self._maxsize:
            return
        exchange.turn = threading.Lock()
        exchange.turn.acquire()
        until = exchange.patience()
        while exchange not in list(self._exchanges)[: self._maxsize]:
            left = LOOK if until is None else until - time.monotonic()
            if left <= 0.0:
                exchange.exhausted = True
                raise queue.Empty
            exchange.turn.acquire(timeout=min(left, LOOK))
        exchange.turn = None

    def leave(self, exchange: Exchange) -> None:
        """Let the next exchange have its turn. Can be repeated."""
        self._exchanges.pop(exchange, None)
        for waiting in list(self._exchanges)[: self._maxsize]:
            if (turn := waiting.turn) is not None:
                # Released already.
                with suppress(RuntimeError):
                    turn.release()

    def put(self, item: Any, block: bool = True) -> None:
        """Take a connection back; its exchange is over."""
        if not isinstance(item, Watched):
            if item is not None:
                # A mock's.
                item.close()
            return
        exchange = item.exchange
        item.idle_since = time.monotonic()
        if exchange is None or item not in exchange.held or exchange.traffic.closed or self._is_over(item):
            item.close()
        elif not item.is_closed:
            self._idle.extend(map(exchange.held.pop, (-1,)))
        if exchange is not None:
            exchange.over()
        # Those that nobody takes any more, because fewer are enough, are the first ones.
        for connection in list(self._idle):
            if not self._is_over(connection):
                break
            self._discard(connection)

    def qsize(self) -> int:
        """Return how many connections are idle."""
        return len(self._idle)

    def retire(self, since: float, reason: str) -> None:
        """Close connections that were opened before ``since``: now if they are idle, else after their exchanges."""
        self._retired = since, reason
        for connection in list(self._idle):
            if connection.made < since:
                connection.reason = reason
                self._discard(connection)

    def _discard(self, connection: Watched) -> None:
        try:
            self._idle.remove(connection)
        except ValueError:
            # An exchange has taken it.
            return
        connection.close()

    def _is_over(self, connection: Watched) -> bool:
        """Return whether a connection must not be used any more, and note why."""
        now = time.monotonic()
        since, reason = self._retired
        if connection.made < since:
            connection.reason = reason
        elif connection.lives is not None and now - connection.made >= connection.lives:
            connection.reason = "lifetime"
        elif (
            self._traffic is not None
            and (longest := self._traffic.lifetime.max_idle) is not None
            and now - connection.idle_since >= longest
        ):
            connection.reason = "idle"
        else:
            return False
        return True


class Exchange:
    """One request on its way, and its response to its end.

    Args:
        traffic: The session's traffic.
        what: What it does, for messages: ``POST by 'api'``.
        repeated: Whether a replay may send the request again.
        limit: When it has to be over.
        write_timeout: How long to wait for the peer to take a piece, in seconds; None for ever.
    """

    def __init__(
        self, traffic: Traffic, what: str, *, repeated: bool, limit: Deadline, write_timeout: float | None
    ) -> None:
        self.traffic = traffic
        self.limit = limit
        self.write_timeout = write_timeout
        self.progress = Progress(watched=False)
        #: Whether no connection became free in time.
        self.exhausted = False
        #: Whether the watchdog ended it.
        self.late = False
        #: Whether its response was closed at the end of its attempt.
        self.reclaimed = False
        #: Held while it waits for its turn; None if it does not.
        self.turn: threading.Lock | None = None
        self.slots: Slots | None = None
        #: Its connection, until it is over.
        self.held: list[Watched] = []
        self.response: Answer | None = None
        #: The thread that reads the response; 0 before the first read.
        self.reader = 0
        #: How long opening its connection took, in seconds.
        self.creating = 0.0
        #: Reports the end of a connection that ends with its response.
        self.closed: Callable[[], object] | None = None
        self._what = what
        self._repeated = repeated
        self._effect: Effect | None = None
        self._watch: Watch | None = None
        self._acquired = False
        self._lease: Lease = traffic.opening.wait()
        self._lease.reclaim = self._reclaim

    def patience(self) -> float | None:
        """Return until when it waits for a connection, on the clock of :func:`time.monotonic`; None for ever."""
        longest = self.clamp(self.traffic.acquire_timeout)
        return None if longest is None else time.monotonic() + longest

    def clamp(self, timeout: float | None) -> float | None:
        """Return what a wait that begins now may take, in seconds; None for ever."""
        remaining = self.limit.remaining()
        if remaining is None:
            return timeout
        least = max(LEAST, remaining)
        return least if timeout is None else min(timeout, least)

    def uses(self, connection: Watched) -> None:
        """Note its connection, which is shut down once the exchange's time is over."""
        at = self.limit.at
        if at is not None and connection.number is not None:
            self.in_time()
            self._watch = _watchdog.watch(connection.number, at + GRACE)

    def in_time(self) -> bool:
        """End the watch over the exchange; return whether it has kept within its time. Can be repeated."""
        watch, self._watch = self._watch, None
        if watch is not None and not _watchdog.forget(watch):
            self.late = True
        return not self.late

    def acquired(self) -> None:
        """Note that it has a connection, once."""
        if not self._acquired:
            self._acquired = True
            if self.creating:
                self.traffic.opening.created(self.creating)
            self._lease.acquired(creating=self.creating, reused=not self.progress.fresh, reclaim=self._reclaim)

    def leaves(self) -> None:
        """Note that its first byte may leave now; declare the possible effect, once."""
        self.acquired()
        if self._effect is None and not self._repeated:
            self._effect = self.traffic.opening.effect(self._what)

    def never_left(self) -> None:
        """Withdraw the effect: the server cannot have acted on the request."""
        if self._effect is not None:
            self._effect.withdraw()
            self._effect = None

    def expired(self) -> TimeoutError | None:
        """Return what to raise if its time is over, however busy the peer keeps it; else None."""
        if not self.late and self.limit.remaining() != 0.0:
            return None
        self.late = True
        return TimeoutError(TOO_LATE)

    def lost(self, error: HTTPError) -> None:
        """Note what an error proves that ended the response.

        Raises:
            DeadlineExceeded: It was the task's deadline.
        """
        if not isinstance(error, (ProtocolError, ReadTimeoutError, SSLError)):
            return
        timed_out = isinstance(error, ReadTimeoutError)
        if timed_out and current_deadline().remaining() == 0.0:
            raise DeadlineExceeded("a response was not read to its end: the task's deadline has passed") from error
        known = "the server had answered, but its response is incomplete"
        failure = Failure(
            FailureKind.INDETERMINATE, Sent.ALL, phase=Phase.RESPONSE, timed_out=timed_out or self.late, known=known
        )
        self.traffic.opening.failed(error, failure)

    def over(self) -> None:
        """Note that it is over: with its response, or for any other reason. Can be repeated.

        The lease ends last: if a signal interrupts this, the end of the attempt does it again.
        """
        self.in_time()
        for connection in self.held:
            # Not given back to the pool.
            connection.close()
        self.held.clear()
        if self.closed is not None:
            self.closed()
            self.closed = None
        if self.slots is not None:
            self.slots.leave(self)
        self.traffic.exchanges.pop(self, None)
        if not self._lease.returned():
            self._lease.gave_up(timed_out=self.exhausted)
        self.response = None

    def _reclaim(self) -> bool:
        """Close an open response, unless another thread was the last to read it; return whether it was closed."""
        if self.reader not in (0, threading.get_ident()):
            return False
        response = self.response
        if response is None:
            # Interrupted before its response, or at its end.
            self.over()
            return False
        self.reclaimed = True
        response.close()
        self.over()
        return True


class Watched:
    """What every connection of a pool has besides urllib3's own: see :func:`watched`."""

    sock: Any
    timeout: Any
    port: Any
    is_closed: Any
    #: The exchange that uses it, or was the last to do so.
    exchange: Exchange | None = None
    #: Its socket; None before it is connected.
    number: SocketNumber | None = None
    #: Why it is closed, one of the reasons of :meth:`Opening.disconnected`.
    reason = ""
    made = 0.0
    idle_since = 0.0
    #: How long it is used, in seconds; None for no limit.
    lives: float | None = None
    _opening: Opening | None = None
    #: Whether what is sent belongs to the connection, and not to a request.
    _connecting = False

    def take(self, exchange: Exchange) -> None:
        """Note that ``exchange`` uses it."""
        if self.exchange is not exchange:
            self.exchange = exchange
            if self not in exchange.held:
                exchange.held.append(self)
            exchange.uses(self)

    @property
    def is_connected(self) -> bool:
        """Whether the peer has not closed it; urllib3 asks before it uses an idle connection again."""
        connected: bool = super().is_connected  # type: ignore[misc]
        if not connected and self.number is not None:
            self.reason = "stale"
        return connected

    def connect(self) -> None:
        exchange = self._begin()
        if exchange is None:
            super().connect()  # type: ignore[misc]
            return
        exchange.progress.watched = exchange.progress.fresh = True
        self.timeout = exchange.clamp(self.timeout)
        begun = time.monotonic()
        self._connecting = True
        try:
            super().connect()  # type: ignore[misc]
        finally:
            self._connecting = False
        exchange.creating = time.monotonic() - begun

    def _begin(self) -> Exchange | None:
        exchange = running.get(threading.get_ident())
        if exchange is not None:
            self.take(exchange)
        return exchange

    def _new_conn(self) -> Any:
        exchange = self.exchange
        if exchange is None:
            return super()._new_conn()  # type: ignore[misc]
        opening = self._opening = exchange.traffic.opening
        opening.descriptors.connecting(self.port)
        try:
            made = super()._new_conn()  # type: ignore[misc]
        except BaseException:
            opening.descriptors.gave_up()
            raise
        # By its number: TLS puts another object in the place of this one.
        self.number = SocketNumber(made.fileno())
        self.made, self.reason = time.monotonic(), ""
        self.lives = exchange.traffic.lifetime.drawn(random.random())
        opening.connected(self.number)
        # From the first byte of a handshake on.
        exchange.uses(self)
        return made

    def request(self, *args: Any, **options: Any) -> None:
        exchange = self._begin()
        if exchange is None:
            super().request(*args, **options)  # type: ignore[misc]
            return
        progress = exchange.progress
        try:
            super().request(*args, **options)  # type: ignore[misc]
            progress.body_sent = True
        finally:
            if not progress.head_started and self.sock is not None:
                # By a connection that does not send by way of send().
                progress.watched, progress.head_started = True, True
                exchange.leaves()

    def send(self, data: Any) -> None:
        exchange = self.exchange
        if exchange is None or self._connecting:
            super().send(data)  # type: ignore[misc]
            return
        if self.sock is None:
            self.connect()
        connected: Any = self.sock
        progress = exchange.progress
        first = not progress.head_started
        if first:
            progress.watched, progress.head_started = True, True
            exchange.leaves()
        try:
            pieces = (data,) if not isinstance(data, bytes) or len(data) <= PIECE else _cut(data)
            for piece in pieces:
                connected.settimeout(exchange.clamp(exchange.write_timeout))
                super().send(piece)  # type: ignore[misc]
        except OSError:
            # The head is sent in one.
            progress.head_failed = first
            raise

    def getresponse(self) -> Any:
        exchange = self.exchange
        if exchange is None:
            return super().getresponse()  # type: ignore[misc]
        self.timeout = exchange.clamp(self.timeout)
        response: Any = super().getresponse()  # type: ignore[misc]
        head = getattr(response, "_original_response", None)
        if isinstance(head, Head) and head.is_cut:
            # http.client takes what came for the whole head.
            raise http.client.RemoteDisconnected("Remote end closed connection within the head of its response")
        exchange.progress.answered = True
        if isinstance(response, urllib3.HTTPResponse):
            # urllib3 has no place for a class of one's own.
            response.__class__ = Answer
            answer: Any = response
            answer.exchange, exchange.response = exchange, answer
        return response

    def close(self) -> None:
        number, self.number = self.number, None
        try:
            super().close()  # type: ignore[misc]
        finally:
            if number is not None and self._opening is not None:
                self._closed(self._opening, number)

    def _closed(self, opening: Opening, number: SocketNumber) -> None:
        reason, age = self.reason, time.monotonic() - self.made

        def report() -> None:
            opening.disconnected(number, reason=reason, age=age)

        exchange = self.exchange
        if exchange is not None and self in exchange.held and number.fileno() >= 0:
            # The response is still to be read from it.
            exchange.closed = report
        else:
            report()


def _cut(data: bytes) -> Iterator[memoryview]:
    view = memoryview(data)
    return (view[begin : begin + PIECE] for begin in range(0, len(data), PIECE))


class Head(http.client.HTTPResponse):
    """A response as ``http.client`` reads it, which looks at the time whenever bytes arrive."""

    def __init__(self, sock: Any, *args: Any, **options: Any) -> None:
        super().__init__(sock, *args, **options)
        self._bytes: Bytes | None = None
        if (exchange := running.get(threading.get_ident())) is not None:
            raw: Any = self.fp
            self._bytes = Bytes(raw.detach(), exchange)
            self.fp = io.BufferedReader(self._bytes)

    def begin(self) -> None:
        """Read the head; informational ones before it are not the response (RFC 9110 §15.2)."""
        super().begin()
        # http.client knows one of them, 100.
        while 100 < self.status < 200 and self.status != http.HTTPStatus.SWITCHING_PROTOCOLS:
            self.headers = None  # type: ignore[assignment]
            super().begin()

    @property
    def is_cut(self) -> bool:
        """Whether the connection ended before the head; to be asked right after the head was read."""
        return self._bytes is not None and self._bytes.ended


class Bytes(io.RawIOBase):
    """What arrives for an exchange.

    Args:
        raw: What the socket made for reading.
        exchange: The exchange.
    """

    def __init__(self, raw: Any, exchange: Exchange) -> None:
        self._raw = raw
        self._exchange = exchange
        #: Whether the peer has closed the connection.
        self.ended = False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        exchange = self._exchange
        try:
            count: int | None = self._raw.readinto(buffer)
        except OSError as error:
            exchange.in_time()
            if exchange.late and not isinstance(error, TimeoutError):
                raise TimeoutError(TOO_LATE) from error
            raise
        if not count:
            # The end of a connection that the watchdog shut down may look like the end of its response.
            self.ended = True
            exchange.in_time()
        if exchange.limit.at is not None and (late := exchange.expired()):
            raise late
        return count

    def fileno(self) -> int:
        number: int = self._raw.fileno()
        return number

    def close(self) -> None:
        self._raw.close()
        super().close()


class Answer(urllib3.HTTPResponse):
    """A response whose failures are noted where they occur: requests hands it to the body unread."""

    exchange: Exchange

    def _reads(self) -> None:
        self.exchange.reader = threading.get_ident()
        if self.exchange.reclaimed:
            raise ProtocolError("the response was closed at the end of its task's run")

    def stream(self, *args: Any, **options: Any) -> Any:
        self._reads()
        return super().stream(*args, **options)

    def read(self, *args: Any, **options: Any) -> bytes:
        self._reads()
        try:
            return super().read(*args, **options)
        except HTTPError as error:
            self.exchange.lost(error)
            raise

    def read1(self, *args: Any, **options: Any) -> bytes:
        self._reads()
        try:
            return super().read1(*args, **options)
        except HTTPError as error:
            self.exchange.lost(error)
            raise

    def read_chunked(self, *args: Any, **options: Any) -> Any:
        self._reads()
        try:
            yield from super().read_chunked(*args, **options)
        except HTTPError as error:
            self.exchange.lost(error)
            raise


@cache
def watched(pool: type[Any]) -> type[Any]:
    """Return a subclass of one of urllib3's pools whose connections tell what they do.

    Args:
        pool: ``HTTPConnectionPool``, ``HTTPSConnectionPool``, or one of these for SOCKS.
    """
    if pool.QueueCls is Slots:
        return pool
    return type(pool.__name__, (pool,), {"ConnectionCls": _ConnectionClass(pool), "QueueCls": Slots})


class _ConnectionClass:
    """The class of a pool's connections: of its own, unless a mock has put one in the place of urllib3's meanwhile."""

    def __init__(self, pool: type[Any]) -> None:
        self._pool = pool
        self._original = pool.ConnectionCls
        name, bases = self._original.__name__, (Watched, self._original)
        self._watched = type(name, bases, {"response_class": Head})

    def __get__(self, instance: object, owner: type) -> type[Any]:
        current: type[Any] = self._pool.ConnectionCls
        return self._watched if current is self._original else current
