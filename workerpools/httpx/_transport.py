"""Watches httpx's requests: counts those in flight, classifies failures, and resends requests where that is safe."""

from __future__ import annotations

import random
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, cast

from workerpools.adapter import Deadline, Failure, FailureKind, Lifetime, Opening, Phase, add_note, failure_of
from workerpools.adapter import deadline as current_deadline
from workerpools.errors import DeadlineExceeded

from ._errors import PLUMBING, RESOURCE, classify_transport, is_idempotent
from ._library import httpx
from ._streams import Stream, Streams
from ._tls import Certificates
from ._trace import FAILING, Trace, Wire, wire_of

__all__ = ["ClampedTimeouts", "Generation", "Traffic", "WatchedTransport"]


#: Raised before anything is sent, also by a transport that reports no step.
_UNSENT = (httpx.PoolTimeout, httpx.LocalProtocolError, httpx.UnsupportedProtocol, httpx.InvalidURL)

#: What a transport raises of its own accord, leaving nothing half done. Anything else interrupted it.
_REPORTED = (httpx.HTTPError, httpx.StreamError, httpx.InvalidURL)


class Traffic:
    """A client's requests in flight and its transports.

    Args:
        opening: The opening to which connections are reported.
        keepalive_expiry: How long httpx keeps an idle connection, in seconds; None for ever.
        total_timeout: How long an exchange may take, in seconds; None for no limit of its own.
        certificates: What the connections are made with; None for a client that has none.
    """

    def __init__(
        self,
        opening: Opening,
        keepalive_expiry: float | None = None,
        total_timeout: float | None = None,
        certificates: Certificates | None = None,
    ) -> None:
        self.opening = opening
        self.certificates = certificates
        #: How long an exchange may take, in seconds; None for no limit of its own.
        self.total_timeout = total_timeout
        #: How long httpx keeps an idle connection, in seconds; None for ever.
        self.keepalive_expiry = keepalive_expiry
        #: The client's transports, each with its own connections.
        self.transports: list[WatchedTransport] = []
        #: The requests in flight. Each adds and removes itself in one step, which no signal can interrupt.
        self.requests: dict[Trace, None] = {}

    def stamp(self) -> object:
        """Return the state of the certificates' files; empty if there are none."""
        return () if self.certificates is None else self.certificates.stamp()

    def recycle(self, since: float) -> None:
        """Send new requests only over connections opened after ``since``, a monotonic time in seconds."""
        for transport in self.transports:
            transport.recycle(since)

    def drain(self, timeout: float) -> bool:
        """Wait at most ``timeout`` seconds until no request is in flight; return whether that succeeded."""
        deadline = time.monotonic() + timeout
        # Polled, so that the end of a request costs no notification.
        while self.requests:
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.005)
        return True


class Generation:
    """A transport, the age of its connections and the number of requests that use it."""

    def __init__(self, transport: Any, lives: float | None, network: type) -> None:
        #: The reason for its retirement, one of those in :mod:`workerpools._stats.metrics`; empty while it is current.
        self.retired = ""
        self.transport = transport
        #: Whether it reports each step to httpcore's trace.
        self.traced = isinstance(transport, network)
        #: The streams of its HTTP/2 connections; None where it speaks HTTP/1.1 alone.
        self.streams = Streams() if _speaks_http2(transport) else None
        #: The state of the certificates' files when it was made.
        self.files: object = ()
        self.begun = time.monotonic()
        self.over = None if lives is None else self.begun + lives
        #: The requests that use it.
        self.users: set[Trace] = set()
        #: Its connections, for closing them without the transport.
        self.connections: weakref.WeakSet[Wire] = weakref.WeakSet()
        #: Whether a request was interrupted in it: its transport may hold a lock for ever, or a slot for nobody.
        self.broken = False


class WatchedTransport(httpx.BaseTransport):
    """Forwards requests to another transport, watches them, and resends a lost one where that is safe.

    Args:
        transport: The transport, or a function that creates one, so that a generation of connections can be replaced.
        traffic: The client's traffic.
        lifetime: How long a generation of connections is used. A replaced one closes with its last response.

    Attributes:
        base: What transports derive from.
        network: The transport that reports each step to httpcore's trace.
    """

    base: type = httpx.BaseTransport
    network: type = httpx.HTTPTransport

    def __init__(
        self,
        transport: Any,
        traffic: Traffic,
        *,
        lifetime: Lifetime,
    ) -> None:
        self._lifetime = lifetime
        given = isinstance(transport, self.base)
        self._make: Callable[[], Any] | None = None if given else transport
        self._traffic = traffic
        self._current = self._generation(transport if given else transport())
        self._lock = threading.Lock()
        self._closed = False
        traffic.transports.append(self)

    def _generation(self, transport: Any) -> Generation:
        if self._make is not None:
            _lock_in_one_step(transport)
        made = Generation(transport, self._lifetime.drawn(random.random()), self.network)
        made.files = self._traffic.stamp()
        return made

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
        limit = self._limit(request, deadline)
        traced = self._current.traced
        trace = Trace(
            self._traffic.opening,
            request,
            limit,
            traced=traced,
            keepalive_expiry=self._traffic.keepalive_expiry,
        )
        trace.release = release = partial(self._release, trace)
        try:
            generation = self._acquire(trace)
            request.extensions = {**before, "trace": trace}
            timeouts: Mapping[str, float | None] = before.get("timeout", {})
            if limit.at is not None:
                request.extensions["timeout"] = timeouts = ClampedTimeouts(timeouts, limit)
            if generation.streams is not None:
                trace.stream = Stream(generation.streams, request)
                trace.stream.acquire(timeouts.get("pool"))
            if not traced:
                trace.leaves()
            response: httpx.Response = generation.transport.handle_request(request)
            trace.acquire()
            trace.unheard()
            response.extensions[RESOURCE] = self._traffic.opening.resource
            trace.arrives_over = wire = wire_of(response)
            if wire is not None:
                wire.begin(trace)
            if response.is_closed:
                # A user's transport returned it with its whole body; no stream will be read.
                release()
                return response
            stream = _WatchedStream(
                cast(httpx.SyncByteStream, response.stream),
                trace,
                release=release,
                failed=partial(self.failed, request=request, trace=trace, generation=generation),
                deadline=deadline,
                limit=limit,
            )
            trace.answers(response, stream)
            response.stream = stream
            return response
        except BaseException as error:
            if isinstance(error, httpx.TransportError):
                before = {**before, RESOURCE: self._traffic.opening.resource}
            failed = self._unanswered(error, request, trace)
            if failed is not error:
                raise failed from error
            raise
        finally:
            # A redirect copies the extensions to the next request, which gets its own trace.
            request.extensions = before

    def _limit(self, request: httpx.Request, deadline: Deadline) -> Deadline:
        """Return when the exchange has to be over.

        Raises:
            DeadlineExceeded: Nothing remains of the task's time.
        """
        remaining = deadline.remaining()
        if remaining is not None and remaining <= 0.0:
            raise DeadlineExceeded(
                f"{request.method} by the resource {self._traffic.opening.resource!r} was not sent: the task's "
                "deadline has passed"
            )
        self._traffic.opening.notice()
        total = self._traffic.total_timeout
        return deadline if total is None else deadline.nearest(Deadline(time.monotonic() + total))

    def _unanswered(self, error: BaseException, request: httpx.Request, trace: Trace) -> BaseException:
        """End a request that was not answered; return the error to raise."""
        if trace.generation is not None and not isinstance(error, _UNSENT):
            trace.unheard()
        self._release(trace, error)
        if isinstance(error, httpx.TransportError):
            return self.failed(error, request, trace, cast(Any, trace.generation))
        return error

    def failed(
        self, error: httpx.TransportError | None, request: httpx.Request, trace: Trace, generation: Generation
    ) -> httpx.TransportError:
        """Note what an error means; return the one to raise.

        That is the error itself, unless the watchdog caused it: then it is a timeout.

        Args:
            error: The error; None if the response ended without one when the watchdog shut its socket down.
            request: The request.
            trace: The request's trace.
            generation: The generation of connections that it used.
        """
        if error is None or trace.late:
            error = self._too_late(request, trace)
        self._note(error, request, trace, generation)
        return error

    def _too_late(self, request: httpx.Request, trace: Trace) -> httpx.TimeoutException:
        progress = trace.progress
        if not progress.head_started:
            timeout: type[httpx.TimeoutException] = httpx.ConnectTimeout
        else:
            timeout = httpx.ReadTimeout if progress.body_sent or progress.answered else httpx.WriteTimeout
        return timeout("the exchange was not over in time, however busy it was", request=request)

    def _note(self, error: httpx.TransportError, request: httpx.Request, trace: Trace, generation: Generation) -> None:
        resource = self._traffic.opening.resource
        host = request.url.host or "a URL without a host"
        add_note(error, f"workerpools: {request.method} by the resource {resource!r} to {host}")
        if isinstance(error, httpx.TimeoutException) and current_deadline().remaining() == 0.0:
            add_note(error, "workerpools: the task's deadline had passed")
            self._traffic.opening.failed(error, None, phase=Phase.REQUEST, deadline=True)
            return
        if isinstance(error, httpx.TimeoutException) and trace.limit.remaining() == 0.0:
            add_note(error, f"workerpools: total_timeout={self._traffic.total_timeout:g} s had passed")
        trace.fails(error)
        failure = classify_transport(
            error,
            trace.progress,
            idempotent=is_idempotent(request),
            plumbing=PLUMBING in request.extensions,
            resource=resource,
        )
        if failure is not None and failure.kind is FailureKind.POOL_EXHAUSTED:
            endless = self._traffic.opening.endless_wait()
            if endless:
                failure = replace(failure, kind=FailureKind.PERMANENT, known=endless)
        self._traffic.opening.failed(error, failure, phase=failure.phase if failure else Phase.REQUEST)
        progress = trace.progress
        if progress.watched and not progress.sent_before and progress.is_unserved:
            trace.never_left()
        if failure is not None and failure.kind is FailureKind.STALE:
            self._retire(generation, "stale")

    def _acquire(self, trace: Trace) -> Generation:
        self._traffic.requests[trace] = None
        over = self._current.over
        if over is not None and time.monotonic() >= over:
            self._retire(self._current, "lifetime")
        elif (files := self._current.files) and files != self._traffic.stamp():
            self._retire(self._current, "recycled")
        with self._lock:
            trace.generation = generation = self._current
            generation.users.add(trace)
        trace.connections = generation.connections
        return generation

    def _release(self, trace: Trace, error: BaseException | None = None) -> None:
        # Repeatable. The lease ends last: if a signal interrupts this, the end of the attempt does it again.
        trace.in_time()
        generation: Generation | None = trace.generation
        if generation is not None and error is not None and not isinstance(error, _REPORTED):
            self._interrupted(generation, trace)
        if trace.arrives_over is not None:
            trace.arrives_over.end(trace)
        if trace.stream is not None:
            trace.stream.release()
        try:
            if generation is not None:
                with self._lock:
                    used = trace in generation.users
                    generation.users.discard(trace)
                    over = used and bool(generation.retired) and not generation.users
                if over:
                    self._close(generation)
        finally:
            self._traffic.requests.pop(trace, None)
        trace.over(error)

    def _close(self, generation: Generation) -> None:
        """Close a generation that nobody uses any more."""
        with self._traffic.opening.closing(generation.retired):
            if generation.broken:
                for connection in tuple(generation.connections):
                    connection()
            else:
                generation.transport.close()

    def _interrupted(self, generation: Generation, trace: Trace) -> None:
        """Replace a generation in which a request was interrupted between any two steps of httpcore's."""
        FAILING.discard(trace.flow())
        self._traffic.opening.descriptors.gave_up()
        if self._make is not None:
            generation.broken = True
            self._retire(generation, "other")

    def _retire(self, generation: Generation, reason: str) -> None:
        """Replace a generation of connections: if one of them was dead, the others are suspect."""
        if self._make is None:
            return
        with self._lock:
            if generation.retired:
                return
            generation.retired = reason
            self._current = self._generation(self._make())
            over = not generation.users
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


def _lock_in_one_step(transport: httpx.BaseTransport) -> None:
    # httpcore's pool takes its lock in a Python function. A signal handler that raises there leaves the lock taken, and
    # httpcore then waits for it for ever, in its handling of that very exception. It has no public option for it; under
    # another name its own lock stays.
    pool: Any = getattr(transport, "_pool", None)
    if hasattr(pool, "_optional_thread_lock"):
        pool._optional_thread_lock = threading.RLock()


def _speaks_http2(transport: httpx.BaseTransport) -> bool:
    # Its options are told by nothing else, and one of a user's function has its own.
    return bool(getattr(getattr(transport, "_pool", None), "_http2", False))


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
        release: Callable[[BaseException | None], object],
        failed: Callable[[httpx.TransportError | None], httpx.TransportError],
        deadline: Deadline,
        limit: Deadline,
    ) -> None:
        self._deadline = deadline
        self._limit = limit
        self._stream = stream
        self._trace = trace
        self._release: Callable[[BaseException | None], object] | None = release
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
                if self._limit.remaining() == 0.0:
                    if self._deadline.remaining() == 0.0:
                        raise DeadlineExceeded("a response was not read to its end: the task's deadline has passed")
                    self._trace.late = True
                    break
        except httpx.TransportError as error:
            self._trace.in_time()
            failed = self._failed(error)
            if failed is not error:
                raise failed from error
            raise
        # The end of a connection that the watchdog shut down may look like the end of its response.
        if not self._trace.in_time():
            raise self._failed(None)

    def close(self) -> None:
        # Before the connection is another request's.
        self._trace.in_time()
        release = self._release
        try:
            self._stream.close()
        except BaseException as error:
            if release is not None:
                release(error)
            raise
        else:
            if release is not None:
                release(None)
        finally:
            self._release = None
