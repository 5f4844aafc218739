"""Watches httpx's requests: counts those in flight, classifies failures, and resends requests where that is safe."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, cast

import httpx

from workerpools.adapter import Deadline, Failure, FailureKind, Lifetime, Opening, Phase, add_note, failure_of
from workerpools.adapter import deadline as current_deadline
from workerpools.errors import DeadlineExceeded
from workerpools.httpx._errors import RESOURCE, classify_transport, is_idempotent
from workerpools.httpx._trace import Trace, closing_of

__all__ = ["Traffic", "WatchedTransport"]


class Traffic:
    """A client's requests in flight and its transports.

    Args:
        opening: The opening to which connections are reported.
        keepalive_expiry: How long httpx keeps an idle connection, in seconds; None for ever.
    """

    def __init__(self, opening: Opening, keepalive_expiry: float | None = None) -> None:
        self.opening = opening
        #: How long httpx keeps an idle connection, in seconds; None for ever.
        self.keepalive_expiry = keepalive_expiry
        #: The client's transports, each with its own connections.
        self.transports: list[WatchedTransport] = []
        self._in_flight = 0
        self._changed = threading.Condition()

    def begin(self) -> None:
        """Count the start of a request."""
        with self._changed:
            self._in_flight += 1

    def end(self) -> None:
        """Count the end of a request."""
        with self._changed:
            self._in_flight -= 1
            self._changed.notify_all()

    def recycle(self, since: float) -> None:
        """Send new requests only over connections opened after ``since``, a monotonic time in seconds."""
        for transport in self.transports:
            transport.recycle(since)

    def drain(self, timeout: float) -> bool:
        """Wait at most ``timeout`` seconds until no request is in flight; return whether that succeeded."""
        deadline = time.monotonic() + timeout
        with self._changed:
            return self._changed.wait_for(lambda: self._in_flight == 0, max(0.0, deadline - time.monotonic()))


class _Generation:
    """A transport, the age of its connections and the number of requests that use it."""

    def __init__(self, transport: httpx.BaseTransport, lives: float | None) -> None:
        #: The reason for its retirement, one of those in :mod:`workerpools._stats.metrics`; empty while it is current.
        self.retired = ""
        self.transport = transport
        self.begun = time.monotonic()
        self.over = None if lives is None else self.begun + lives
        self.users = 0


class WatchedTransport(httpx.BaseTransport):
    """Forwards requests to another transport, watches them, and resends a lost one where that is safe.

    Args:
        transport: The transport, or a function that creates one, so that a generation of connections can be replaced.
        traffic: The client's traffic.
        traced: Whether the transport reports each step to httpcore's trace.
        lifetime: How long a generation of connections is used. A replaced one closes with its last response.
    """

    def __init__(
        self,
        transport: httpx.BaseTransport | Callable[[], httpx.BaseTransport],
        traffic: Traffic,
        *,
        traced: bool,
        lifetime: Lifetime,
    ) -> None:
        self._lifetime = lifetime
        self._make = None if isinstance(transport, httpx.BaseTransport) else transport
        self._current = self._generation(transport if isinstance(transport, httpx.BaseTransport) else transport())
        self._lock = threading.Lock()
        self._traffic = traffic
        self._traced = traced
        self._closed = False
        traffic.transports.append(self)

    def _generation(self, transport: httpx.BaseTransport) -> _Generation:
        return _Generation(transport, self._lifetime.drawn(random.random()))

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        try:
            return self._send(request)
        except httpx.TransportError as error:
            if not self._may_send_again(request, error, failure_of(error)):
                raise
        return self._send(request)

    def _may_send_again(self, request: httpx.Request, error: httpx.TransportError, failure: Failure | None) -> bool:
        # One automatic retry only (RFC 9110 §9.2.2): the second request goes over a fresh connection, whose failure is
        # never STALE. A body that was partly consumed cannot be sent again.
        if failure is None or failure.kind is not FailureKind.STALE or not isinstance(request.stream, httpx.ByteStream):
            return False
        if self._closed:
            # Closing the client caused the failure; a new connection would outlive it.
            return False
        return self._traffic.opening.replay(error, method=request.method)

    def _send(self, request: httpx.Request) -> httpx.Response:
        before = request.extensions
        deadline = current_deadline()
        remaining = deadline.remaining()
        if remaining is not None and remaining <= 0.0:
            raise DeadlineExceeded(
                f"{request.method} by the resource {self._traffic.opening.resource!r} was not sent: the task's "
                "deadline has passed"
            )
        generation = self._acquire()
        trace = Trace(
            self._traffic.opening,
            request,
            watched=self._traced,
            keepalive_expiry=self._traffic.keepalive_expiry,
        )
        request.extensions = {**before, "trace": trace}
        if remaining is not None:
            request.extensions["timeout"] = ClampedTimeouts(before.get("timeout", {}), deadline)
        if not self._traced:
            trace.leaves()
        try:
            response = generation.transport.handle_request(request)
        except BaseException as error:
            trace.over(error)
            self._release(generation)
            if isinstance(error, httpx.TransportError):
                self._failed(error, request, trace, generation)
            raise
        finally:
            # A redirect copies the extensions to the next request, which gets its own trace.
            request.extensions = before
        response.extensions[RESOURCE] = self._traffic.opening.resource
        closing = closing_of(response)
        if closing is not None:
            closing.begin()

        def release() -> None:
            if closing is not None:
                closing.end()
            trace.over()
            self._release(generation)

        if response.is_closed:
            # A user's transport returned it with its whole body; no stream will be read.
            release()
            return response
        stream = _WatchedStream(
            cast(httpx.SyncByteStream, response.stream),
            trace,
            release=release,
            failed=lambda error: self._failed(error, request, trace, generation),
            deadline=deadline,
        )
        trace.answers(response, stream)
        response.stream = stream
        return response

    def _failed(
        self, error: httpx.TransportError, request: httpx.Request, trace: Trace, generation: _Generation
    ) -> None:
        resource = self._traffic.opening.resource
        host = request.url.host or "a URL without a host"
        add_note(error, f"workerpools: {request.method} by the resource {resource!r} to {host}")
        if isinstance(error, httpx.TimeoutException) and current_deadline().remaining() == 0.0:
            add_note(error, "workerpools: the task's deadline had passed")
            self._traffic.opening.failed(error, None, phase=Phase.REQUEST, deadline=True)
            return
        failure = classify_transport(error, trace.progress, idempotent=is_idempotent(request), resource=resource)
        if failure is not None and failure.kind is FailureKind.POOL_EXHAUSTED:
            endless = self._traffic.opening.endless_wait()
            if endless:
                failure = replace(failure, kind=FailureKind.PERMANENT, known=endless)
        self._traffic.opening.failed(error, failure, phase=failure.phase if failure else Phase.REQUEST)
        if trace.progress.head_failed:
            trace.never_left()
        if failure is not None and failure.kind is FailureKind.STALE:
            self._retire(generation, "stale")

    def _acquire(self) -> _Generation:
        self._traffic.opening.notice()
        self._traffic.begin()
        over = self._current.over
        if over is not None and time.monotonic() >= over:
            self._retire(self._current, "lifetime")
        with self._lock:
            self._current.users += 1
            return self._current

    def _release(self, generation: _Generation) -> None:
        with self._lock:
            generation.users -= 1
            over = bool(generation.retired) and generation.users == 0
        if over:
            self._close(generation)
        self._traffic.end()

    def _close(self, generation: _Generation) -> None:
        with self._traffic.opening.closing(generation.retired):
            generation.transport.close()

    def _retire(self, generation: _Generation, reason: str) -> None:
        """Replace a generation of connections: if one of them was dead, the others are suspect."""
        if self._make is None:
            return
        with self._lock:
            if generation.retired:
                return
            generation.retired = reason
            self._current = self._generation(self._make())
            over = generation.users == 0
        if over:
            self._close(generation)

    def recycle(self, since: float) -> None:
        """Retire the current generation if it was created before ``since``, a monotonic time in seconds."""
        current = self._current
        if current.begun < since:
            self._retire(current, "recycled")

    def close(self) -> None:
        self._closed = True
        self._traffic.opening.ended()
        self._current.transport.close()


class ClampedTimeouts(dict[str, Any]):
    """httpx's four timeouts in seconds, each clamped to the time left until the deadline when it is read.

    httpcore reads each when its wait begins (the request extension ``timeout``).
    """

    # A socket with a timeout of 0 is non-blocking and raises an error other than a timeout.
    _LEAST = 0.001

    def __init__(self, timeouts: Mapping[str, float | None], deadline: Deadline) -> None:
        super().__init__(timeouts)
        self._deadline = deadline

    def get(self, name: str, default: Any = None) -> Any:
        """Return one timeout; None or a missing one becomes the remaining time."""
        timeout, remaining = super().get(name, default), self._deadline.remaining()
        if remaining is None:
            return timeout
        least = max(self._LEAST, remaining)
        return least if timeout is None else min(timeout, least)


class _WatchedStream(httpx.SyncByteStream):
    """A response's body; its end ends the request."""

    def __init__(
        self,
        stream: httpx.SyncByteStream,
        trace: Trace,
        *,
        release: Callable[[], object],
        failed: Callable[[httpx.TransportError], object],
        deadline: Deadline,
    ) -> None:
        self._deadline = deadline
        self._stream = stream
        self._trace = trace
        self._release: Callable[[], object] | None = release
        self._failed = failed

    def __iter__(self) -> Iterator[bytes]:
        self._trace.reader = threading.get_ident()
        try:
            for chunk in self._stream:
                yield chunk
                if self._release is None:
                    # Reclaimed at the end of its attempt while it was being read.
                    raise httpx.StreamClosed()
                # A trickling response never exceeds the read timeout.
                if self._deadline.remaining() == 0.0:
                    raise DeadlineExceeded("a response was not read to its end: the task's deadline has passed")
        except httpx.TransportError as error:
            self._failed(error)
            raise

    def close(self) -> None:
        try:
            self._stream.close()
        finally:
            release, self._release = self._release, None
            if release is not None:
                release()
