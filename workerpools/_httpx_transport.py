"""Watches what httpx sends: what is in flight, what left, what a failure proves; and sends again what may be."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import cast

import httpx

from workerpools._core import scope
from workerpools._core.adapter import Opening
from workerpools._core.events import EventKind
from workerpools._core.failure import Failure, FailureKind, Noted, Phase, noted_of
from workerpools._core.notes import add_note
from workerpools._httpx_classify import RESOURCE, classify_transport, is_idempotent
from workerpools._httpx_trace import Trace

__all__ = ["Traffic", "WatchedTransport"]


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


class _Generation:
    """A transport whose connections are of one age, and how many requests use it."""

    def __init__(self, transport: httpx.BaseTransport) -> None:
        self.transport = transport
        self.users = 0
        self.retired = False


class WatchedTransport(httpx.BaseTransport):
    """Passes requests on to another transport, watches them, and sends one again that was lost and may be.

    Args:
        transport: Where requests go; or a function that makes that, so that a set of connections can be given up.
        traffic: The client's.
        traced: Whether the transport is known to tell httpcore's trace of each step.
    """

    def __init__(
        self,
        transport: httpx.BaseTransport | Callable[[], httpx.BaseTransport],
        traffic: Traffic,
        *,
        traced: bool,
    ) -> None:
        self._make = None if isinstance(transport, httpx.BaseTransport) else transport
        self._current = _Generation(transport if isinstance(transport, httpx.BaseTransport) else transport())
        self._lock = threading.Lock()
        self._traffic = traffic
        self._traced = traced

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        try:
            return self._send(request)
        except httpx.TransportError as error:
            noted = noted_of(error)
            if noted is None or noted.failure is None or not self._may_send_again(request, noted, noted.failure):
                raise
            failed = noted.failure
        opening = self._traffic.opening
        opening.listeners.emit(
            EventKind.REQUEST_REPLAYED, opening.resource, f"method={request.method} kind={failed.kind.value}"
        )
        return self._send(request)

    def _may_send_again(self, request: httpx.Request, noted: Noted, failure: Failure) -> bool:
        # One automatic retry and not more (RFC 9110 §9.2.2): the second one goes out on a fresh connection, whose
        # failure never is STALE. A body that is no longer whole cannot be sent again.
        if failure.kind is not FailureKind.STALE or not isinstance(request.stream, httpx.ByteStream):
            return False
        attempt = scope.current()
        if attempt is None or attempt.allowance is None:
            return self._traffic.opening.budget.take(timed_out=False)
        return attempt.allowance.take_replay(noted)

    def _send(self, request: httpx.Request) -> httpx.Response:
        before = request.extensions
        trace = Trace(self._traffic.opening, request, watched=self._traced)
        request.extensions = {**before, "trace": trace}
        if not self._traced:
            trace.leaves()
        generation = self._acquire()
        try:
            response = generation.transport.handle_request(request)
        except BaseException as error:
            self._release(generation)
            if isinstance(error, httpx.TransportError):
                self._failed(error, request, trace, generation)
            raise
        finally:
            # A redirect copies the extensions to the next request, which gets a trace of its own.
            request.extensions = before
        response.extensions[RESOURCE] = self._traffic.opening.resource
        response.stream = _WatchedStream(
            cast(httpx.SyncByteStream, response.stream),
            release=lambda: self._release(generation),
            failed=lambda error: self._failed(error, request, trace, generation),
        )
        return response

    def _failed(
        self, error: httpx.TransportError, request: httpx.Request, trace: Trace, generation: _Generation
    ) -> None:
        resource = self._traffic.opening.resource
        host = request.url.host or "a URL without a host"
        add_note(error, f"workerpools: {request.method} by the resource {resource!r} to {host}")
        failure = classify_transport(error, trace.progress, idempotent=is_idempotent(request), resource=resource)
        scope.note_failure(error, Noted(failure, failure.phase if failure else Phase.REQUEST, self._traffic.opening))
        if trace.progress.head_failed:
            trace.never_left()
        if failure is not None and failure.kind is FailureKind.STALE:
            self._retire(generation)

    def _acquire(self) -> _Generation:
        self._traffic.begin()
        with self._lock:
            self._current.users += 1
            return self._current

    def _release(self, generation: _Generation) -> None:
        with self._lock:
            generation.users -= 1
            over = generation.retired and generation.users == 0
        if over:
            generation.transport.close()
        self._traffic.end()

    def _retire(self, generation: _Generation) -> None:
        """Give up the connections of a generation: where one was dead, its siblings are suspect."""
        if self._make is None:
            return
        with self._lock:
            if generation.retired:
                return
            generation.retired = True
            self._current = _Generation(self._make())
            over = generation.users == 0
        if over:
            generation.transport.close()

    def close(self) -> None:
        self._current.transport.close()


class _WatchedStream(httpx.SyncByteStream):
    """A response's body; its end is the end of the request."""

    def __init__(
        self,
        stream: httpx.SyncByteStream,
        *,
        release: Callable[[], object],
        failed: Callable[[httpx.TransportError], object],
    ) -> None:
        self._stream = stream
        self._release: Callable[[], object] | None = release
        self._failed = failed

    def __iter__(self) -> Iterator[bytes]:
        try:
            yield from self._stream
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
