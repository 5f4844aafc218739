"""Watches what httpx sends: which sockets are open, what left, and what a failure proves.

What happened on the wire is read from httpcore's trace (the request extension ``trace``, a documented hook), which
also hands over each new connection's socket.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, cast

import httpx

from workerpools._core import scope
from workerpools._core.adapter import Opening
from workerpools._core.notes import add_note

__all__ = ["Traffic", "WatchedTransport", "is_idempotent"]

#: RFC 9110 §9.2.2: a request with one of these methods may be sent again.
IDEMPOTENT_METHODS = frozenset(("GET", "HEAD", "OPTIONS", "TRACE", "PUT", "DELETE"))

#: Whose exceptions may be in the chain of causes of an httpx error.
PACKAGES = ("httpx", "httpcore", "h11", "h2", "hpack", "ssl")

_CONNECTING = (".connect_tcp.started", ".connect_unix_socket.started")
_GAVE_UP = (".connect_tcp.failed", ".connect_unix_socket.failed")
_OPENED = (".connect_tcp.complete", ".connect_unix_socket.complete", ".start_tls.complete")


def is_idempotent(request: httpx.Request) -> bool:
    """Return whether ``request`` may be sent again, by its method or because it has an Idempotency-Key."""
    return request.method.upper() in IDEMPOTENT_METHODS or "idempotency-key" in request.headers


class Traffic:
    """What one client has in flight, and where its connections are reported."""

    def __init__(self, opening: Opening) -> None:
        self.opening = opening
        self._in_flight = 0
        self._changed = threading.Condition()

    def begin(self) -> None:
        """Count a request."""
        with self._changed:
            self._in_flight += 1

    def end(self) -> None:
        """Count a request's end."""
        with self._changed:
            self._in_flight -= 1
            self._changed.notify_all()

    def drain(self, timeout: float) -> bool:
        """Wait until nothing is in flight, at most ``timeout`` seconds; return whether that was reached."""
        deadline = time.monotonic() + timeout
        with self._changed:
            return self._changed.wait_for(lambda: self._in_flight == 0, max(0.0, deadline - time.monotonic()))


class _Handshake:
    """Stands for a connection between TCP and TLS: its descriptor has left one object and is in no other yet."""

    def __init__(self, number: int) -> None:
        self._number = number

    def fileno(self) -> int:
        return self._number


class _Trace:
    """What became of one request; called by httpcore at each step."""

    def __init__(self, traffic: Traffic, request: httpx.Request, chained: Callable[[str, Any], Any] | None) -> None:
        self._traffic = traffic
        self._request = request
        self.chained = chained
        self.fresh = False
        self.sending = False
        self.head_failed = False
        self.answered = False
        self.effect: scope.Effect | None = None
        self._number = -1
        self._handshake = _Handshake(-1)

    def __call__(self, name: str, info: Any) -> Any:
        if name.endswith(_OPENED):
            self.fresh = True
            self._opened(name, info["return_value"])
        elif name.endswith(_CONNECTING):
            self._traffic.opening.descriptors.connecting(info.get("port"))
        elif name.endswith(".start_tls.started"):
            self._handshake = _Handshake(self._number)
            self._traffic.opening.descriptors.add(self._handshake)
        elif name.endswith(".start_tls.failed"):
            self._traffic.opening.descriptors.drop(self._handshake)
        elif name.endswith(_GAVE_UP):
            self._traffic.opening.descriptors.gave_up()
        elif name.endswith(".send_request_headers.started"):
            self.sending = True
            self.leaves()
        elif name.endswith(".send_request_headers.failed"):
            self.head_failed = True
        elif name.endswith(".receive_response_headers.complete"):
            self.answered = True
        return self.chained(name, info) if self.chained is not None else None

    def leaves(self) -> None:
        """Note the effect that the request may have, once."""
        if self.effect is None and not is_idempotent(self._request):
            self.effect = scope.Effect(f"{self._request.method} by {self._traffic.opening.resource!r}")
            scope.note_effect(self.effect)

    def _opened(self, name: str, stream: Any) -> None:
        connection = stream.get_extra_info("socket")
        if connection is None:
            return
        if name.endswith(".start_tls.complete"):
            # The same descriptor in a new object; the connection was counted when it was made.
            self._traffic.opening.descriptors.add(connection)
            self._traffic.opening.descriptors.drop(self._handshake)
            _tell_of_close(stream, connection, self._traffic.opening)
        else:
            self._traffic.opening.connected(connection)
            self._number = connection.fileno()
            _tell_of_close(stream, connection, self._traffic.opening)


def _tell_of_close(stream: Any, connection: object, opening: Opening) -> None:
    # The trace has no event for it, and every way of closing a connection ends in its network stream's close().
    close, told = stream.close, False

    def close_and_tell() -> None:
        nonlocal told
        close()
        if not told:
            told = True
            opening.disconnected(connection)

    stream.close = close_and_tell


class WatchedTransport(httpx.BaseTransport):
    """Passes requests on to another transport, and watches them.

    Args:
        transport: Where requests go.
        traffic: The client's.
        traced: Whether the transport is known to tell httpcore's trace of each step.
    """

    def __init__(self, transport: httpx.BaseTransport, traffic: Traffic, *, traced: bool) -> None:
        self._transport = transport
        self._traffic = traffic
        self._traced = traced

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        before = request.extensions
        trace = _Trace(self._traffic, request, before.get("trace"))
        request.extensions = {**before, "trace": trace}
        if not self._traced:
            trace.leaves()
        self._traffic.begin()
        try:
            response = self._transport.handle_request(request)
            response.stream = _CountedStream(cast(httpx.SyncByteStream, response.stream), self._traffic)
            return response
        except BaseException as error:
            self._traffic.end()
            if isinstance(error, httpx.TransportError):
                self._failed(error, request, trace)
            raise
        finally:
            # A redirect copies the extensions to the next request, which gets a trace of its own.
            request.extensions = before

    def _failed(self, error: httpx.TransportError, request: httpx.Request, trace: _Trace) -> None:
        resource = self._traffic.opening.resource
        add_note(error, f"workerpools: {request.method} by the resource {resource!r} to {request.url.host}")
        if isinstance(error, (httpx.TimeoutException, httpx.LocalProtocolError)):
            return
        if trace.head_failed and trace.effect is not None:
            # The head of the request never was complete: the server cannot have acted on it.
            scope.withdraw_effect(trace.effect)
            trace.effect = None
        if trace.sending and not trace.fresh and not trace.answered and trace.effect is None:
            # The connection had been idle in the pool and gave no answer to a request that may be sent again.
            scope.note_stale(error, resource, PACKAGES, self._traffic.opening.listeners)

    def close(self) -> None:
        self._transport.close()


class _CountedStream(httpx.SyncByteStream):
    """A response's body; its end is the end of the request."""

    def __init__(self, stream: httpx.SyncByteStream, traffic: Traffic) -> None:
        self._stream = stream
        self._traffic: Traffic | None = traffic

    def __iter__(self) -> Iterator[bytes]:
        yield from self._stream

    def close(self) -> None:
        try:
            self._stream.close()
        finally:
            traffic, self._traffic = self._traffic, None
            if traffic is not None:
                traffic.end()
