"""The wire: follows one request through httpcore's trace (the documented request extension ``trace``).

The trace does not tell which connection a request uses. So each connection's network stream tells of its writes: the
first one of a request shows its socket, which the watchdog shuts down once the request's time is over. httpx's own
timeouts bound one wait each, and a peer that sends a byte now and then outlasts them all.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

from workerpools.adapter import Deadline, Effect, Lease, Opening, SocketNumber, Watch, Watchdog

from ._errors import Progress, is_repeated
from ._library import httpx
from ._streams import Stream

__all__ = ["FAILING", "Trace", "Wire", "wire_of"]

#: The threads that are closing a connection after a failed request.
FAILING: set[int] = set()

#: How long after the end of its time an exchange is ended, in seconds: httpx's own timeouts, which say more, come
#: first. Less than the deadline's margin before Celery's own limit.
GRACE = 0.08

_watchdog = Watchdog()


class Wire:
    """Replaces ``write()`` and ``close()`` of a connection's network stream, to report them.

    The trace has no event for a close, and every close of a connection ends there.

    Attributes:
        flow: Returns what runs a request: the calling thread.

    Args:
        stream: The network stream.
        connection: The object under which the connection was reported.
        opening: The opening to which it was reported.
        keepalive_expiry: How long httpx keeps an idle connection, in seconds; None for ever.
    """

    flow = staticmethod(threading.get_ident)

    def __init__(self, stream: Any, connection: Any, opening: Opening, keepalive_expiry: float | None) -> None:
        self._stream = stream
        self._replace(stream)
        self._connection = connection
        #: The connection's socket.
        self.socket = SocketNumber(connection.fileno())
        self._opening = opening
        self._keepalive_expiry = keepalive_expiry
        self._users: set[Trace] = set()
        self._idle_since: float | None = None
        self._made = time.monotonic()
        self._reported = False

    def _replace(self, stream: Any) -> None:
        self._write = stream.write
        self._close = stream.close
        stream.write, stream.close = self.write, self

    def write(self, buffer: bytes, timeout: float | None = None) -> Any:
        """Write to the network stream; the first write of a request tells it its connection."""
        if SENDING and (trace := SENDING.pop(threading.get_ident(), None)) is not None:
            trace.uses(self)
        self._write(buffer, timeout)

    def begin(self, trace: Trace) -> None:
        """Note that a response arrives over the connection."""
        self._users.add(trace)
        self._idle_since = None

    def end(self, trace: Trace) -> None:
        """Note that a response has ended."""
        self._users.discard(trace)
        if not self._users:
            self._idle_since = time.monotonic()

    def __call__(self) -> Any:
        # Before closing: a closed stream cannot be inspected.
        reason = "" if self._reported else self._reason()
        self._close()
        self._report(reason)

    def _report(self, reason: str) -> None:
        if not self._reported:
            self._reported = True
            self._opening.disconnected(self._connection, reason=reason, age=time.monotonic() - self._made)

    def _reason(self) -> str:
        if self._idle_since is None:
            return ""
        failed = self.flow() in FAILING
        if (
            not failed
            and self._keepalive_expiry is not None
            and time.monotonic() - self._idle_since >= self._keepalive_expiry
        ):
            return "idle"
        # An idle connection becomes readable only when the peer closes it.
        return "stale" if self._stream.get_extra_info("is_readable") else ""


def wire_of(response: httpx.Response, name: str = "close") -> Wire | None:
    """Return the wire that ``response`` arrives over; None if unknown.

    Args:
        response: The response.
        name: The method of the stream that the wire replaces.
    """
    found = getattr(response.extensions.get("network_stream"), name, None)
    return found if isinstance(found, Wire) else None


class Interrupted(Exception):
    """Something other than the transport ended a request."""


class _Handshake:
    """A connection during its TLS handshake: no socket object owns its descriptor."""

    def __init__(self, number: int) -> None:
        self._number = number

    def fileno(self) -> int:
        return self._number


class Trace:
    """Tracks the progress of one request; called by httpcore at each step.

    Attributes:
        flow: Returns what runs the request: the calling thread.

    Args:
        opening: The opening to which connections are reported.
        request: The request.
        limit: When the exchange has to be over.
        traced: Whether the transport is one that reports each step, unless a mock stands in its place.
        keepalive_expiry: How long httpx keeps an idle connection, in seconds; None for ever.
    """

    flow = staticmethod(threading.get_ident)
    #: What it makes of a new connection.
    wire: type[Wire] = Wire

    def __init__(
        self,
        opening: Opening,
        request: httpx.Request,
        limit: Deadline,
        *,
        traced: bool,
        keepalive_expiry: float | None = None,
    ) -> None:
        self._opening = opening
        self._keepalive_expiry = keepalive_expiry
        self._request = request
        self._chained: Callable[[str, Any], Any] | None = request.extensions.get("trace")
        #: When the exchange has to be over.
        self.limit = limit
        self._wire: Wire | None = None
        self._watch: Watch | None = None
        #: Whether the request to a proxy for a tunnel is what is being sent.
        self._tunnels = False
        #: Whether the watchdog ended the exchange.
        self.late = False
        self.progress = Progress(watched=False)
        self._effect: Effect | None = None
        # Before the request is sent, as it may change the key.
        self._repeated = is_repeated(request)
        self._number = -1
        self._handshake = _Handshake(-1)
        #: The request's stream; None where only HTTP/1.1 is spoken.
        self.stream: Stream | None = None
        #: The number of its stream; 0 with HTTP/1.1.
        self._stream_number = 0
        #: The transport's generation that it uses; None before.
        self.generation: Any = None
        #: The open connections of the transport's generation; None before it is known.
        self.connections: weakref.WeakSet[Wire] | None = None
        #: Ends the request, and then its lease; None once it has ended.
        self.release: Callable[[BaseException | None], object] | None = None
        # Without a trace, the moment of acquiring a connection is unknown.
        self._lease: Lease = opening.wait() if traced else opening.lease(self._reclaim)
        self._lease.reclaim = self._reclaim
        self._acquired = not traced
        self._connecting = 0.0
        self._response: weakref.ref[httpx.Response] | None = None
        self._stream: Any = None
        #: The connection of the response; None before it, or if unknown.
        self.arrives_over: Wire | None = None
        #: The thread that reads the response; 0 before the first read.
        self.reader = 0

    def __call__(self, name: str, info: Any) -> Any:
        self.progress.watched = True
        # The first part of a name is the protocol: connection, http11, http2, proxy, socks.
        step = _STEPS.get(name.partition(".")[2])
        if step is not None:
            step(self, info)
        if self.stream is not None:
            self.stream.hears(name, info)
        return self._chained(name, info) if self._chained is not None else None

    def _connects(self, info: Any) -> None:
        self._begins()
        self._connecting = time.monotonic()
        self._opening.descriptors.connecting(info.get("port"))

    def _gives_up(self, info: Any) -> None:
        self._opening.descriptors.gave_up()

    def _connected(self, info: Any) -> None:
        self.progress.fresh = True
        stream = info["return_value"]
        connection = stream.get_extra_info("socket")
        if connection is not None:
            # Before it is counted: an interruption in between leaves it to be closed.
            self._watch_close(stream, connection)
            self._opening.connected(connection)
            self._number = connection.fileno()

    def _starts_tls(self, info: Any) -> None:
        self._handshake = _Handshake(self._number)
        self._opening.descriptors.add(self._handshake)

    def _started_tls(self, info: Any) -> None:
        self.progress.fresh = True
        stream = info["return_value"]
        connection = stream.get_extra_info("socket")
        if connection is not None:
            # The same descriptor in a new object; the connection is already counted.
            self._opening.descriptors.add(connection)
            self._opening.descriptors.drop(self._handshake)
            self._watch_close(stream, connection)

    def _watch_close(self, stream: Any, connection: Any) -> None:
        wire = self.wire(stream, connection, self._opening, self._keepalive_expiry)
        if self.connections is not None:
            self.connections.add(wire)
        # From the first byte of a handshake on.
        self.uses(wire)

    def uses(self, wire: Wire) -> None:
        """Note the connection of the request, whose socket is shut down once the exchange's time is over."""
        at = self.limit.at
        if self._wire is wire or at is None:
            return
        self.in_time()
        self._wire, self._watch = wire, _watchdog.watch(wire.socket, at + GRACE)

    def in_time(self) -> bool:
        """End the watch over the exchange; return whether it has kept within its time. Can be repeated."""
        watch, self._watch = self._watch, None
        if watch is not None and not _watchdog.forget(watch):
            self.late = True
        return not self.late

    def _failed_tls(self, info: Any) -> None:
        self._opening.descriptors.drop(self._handshake)

    def _head_starts(self, info: Any) -> None:
        self._tunnels = info["request"].method == b"CONNECT" and self._request.method != "CONNECT"
        if not self._tunnels:
            self._begins()
            self.progress.head_started = True
            self.acquire()
            self.leaves()
            self._stream_number = info.get("stream_id", 0)
        if self.limit.at is not None:
            SENDING[self.flow()] = self

    def _begins(self) -> None:
        """Note the begin of another try, which a transport of the user's may make by itself."""
        progress = self.progress
        if progress.head_started:
            progress.sent_before |= not progress.is_unserved
            progress.head_started = progress.head_failed = progress.body_sent = progress.answered = False
            progress.refused = False

    def _head_failed(self, info: Any) -> None:
        SENDING.pop(self.flow(), None)
        # HTTP/2: the head is one frame, which may have left although the write failed; another thread may have sent it.
        left = self._stream_number and not type(info["exception"]).__module__.startswith("h2.")
        self.progress.head_failed = not self._tunnels and not left

    def _body_sent(self, info: Any) -> None:
        self.progress.body_sent = not self._tunnels

    def _answered(self, info: Any) -> None:
        self.progress.answered = not self._tunnels

    def _unanswered(self, info: Any) -> None:
        # GOAWAY, and httpcore sends the request again.
        self.progress.refused = type(info["exception"]).__name__ == "ConnectionNotAvailable"

    def fails(self, error: BaseException) -> None:
        """Note what the server said of the request that ended with ``error``."""
        # httpcore's own exception, and no other: what came before it may be another request's.
        cause, progress = error.__cause__, self.progress
        if cause is not None and not progress.answered and _is_refused(self._stream_number, *cause.args):
            progress.refused = True

    def _ends(self, info: Any) -> None:
        if not self.progress.answered:
            # httpcore closes the failed request's connection next.
            FAILING.add(self.flow())

    def _ended(self, info: Any) -> None:
        if not self.progress.answered:
            FAILING.discard(self.flow())

    def acquire(self) -> None:
        """Note that the request has a connection, once."""
        if self._acquired:
            return
        self._acquired = True
        # Sending is the first sign that the request has a connection.
        creating = time.monotonic() - self._connecting if self.progress.fresh else 0.0
        if creating:
            self._opening.created(creating)
        self._lease.acquired(creating=creating, reused=not creating, reclaim=self._reclaim)

    def answers(self, response: httpx.Response, stream: Any) -> None:
        """Note the response; its connection is in use until ``stream`` is closed."""
        # A weak reference to the response, a strong one to the stream: httpcore keeps the connection of an abandoned
        # response in use.
        self._response, self._stream = weakref.ref(response), stream

    def _reclaim(self) -> bool:
        """Close an open response, unless another thread was the last to read it; return whether it was closed."""
        if self.reader not in (0, threading.get_ident()):
            return False
        if self._stream is None:
            # Interrupted before its response, or at its end.
            self._end()
            return False
        response = None if self._response is None else self._response()
        if response is not None and not response.is_closed:
            # The outer object, so that a later read raises StreamClosed.
            response.close()
        else:
            self._stream.close()
        if self._lease.is_active:
            # Closed before, but an interruption kept it from ending.
            self._end()
        return True

    def _end(self) -> None:
        if self.release is not None:
            self.release(Interrupted())
        else:
            self.over(Interrupted())

    def over(self, error: BaseException | None = None) -> None:
        """Note that the request has released its connection, after its response or because of ``error``."""
        self._stream = None
        if not self._lease.returned():
            self._lease.gave_up(timed_out=isinstance(error, httpx.PoolTimeout))
        self.release = None

    def unheard(self) -> None:
        """Note that the request may have left, or did, if nothing of it was heard."""
        if not self.progress.watched:
            self.leaves()

    def leaves(self) -> None:
        """Declare the request's possible effect, once."""
        if self._effect is None and not self._repeated:
            self._effect = self._opening.effect(f"{self._request.method} by {self._opening.resource!r}")

    def never_left(self) -> None:
        """Withdraw the effect: the server cannot have acted on the request."""
        if self._effect is not None:
            self._effect.withdraw()
            self._effect = None


def _is_refused(number: int, event: Any = None, *_: object) -> bool:
    """Return whether the server said that it does not process a stream: by GOAWAY or by RST_STREAM.

    See RFC 9113 §6.8 and §8.7.

    Args:
        number: The stream's number.
        event: What httpcore raises: h2's ConnectionTerminated or StreamReset.
    """
    what = type(event).__name__
    if what == "ConnectionTerminated":
        return bool(number > event.last_stream_id)
    return what == "StreamReset" and event.stream_id == number and event.error_code == _REFUSED_STREAM


#: RFC 9113 §7.
_REFUSED_STREAM = 7

#: The requests that are about to write their first byte, by thread.
SENDING: dict[int, Trace] = {}

_STEPS: dict[str, Callable[[Trace, Any], None]] = {
    "connect_tcp.started": Trace._connects,
    "connect_unix_socket.started": Trace._connects,
    "connect_tcp.failed": Trace._gives_up,
    "connect_unix_socket.failed": Trace._gives_up,
    "connect_tcp.complete": Trace._connected,
    "connect_unix_socket.complete": Trace._connected,
    "start_tls.started": Trace._starts_tls,
    "start_tls.complete": Trace._started_tls,
    "start_tls.failed": Trace._failed_tls,
    "send_request_headers.started": Trace._head_starts,
    "send_request_headers.failed": Trace._head_failed,
    "send_request_body.complete": Trace._body_sent,
    "receive_response_headers.complete": Trace._answered,
    "receive_response_headers.failed": Trace._unanswered,
    "response_closed.started": Trace._ends,
    "response_closed.complete": Trace._ended,
    "response_closed.failed": Trace._ended,
}
