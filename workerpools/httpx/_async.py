"""The asynchronous client: what it awaits. All that is known of a request, and decided, is the synchronous one's."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from functools import partial
from typing import Any, cast

from workerpools.adapter import Deadline, deadline, failure_of, flow, on_loop, run_coroutine, start_coroutine
from workerpools.errors import DeadlineExceeded

from ._client import SINGLE, TOKEN_WAIT, Flow, Pooled, failed_request, is_plumbing
from ._errors import PLUMBING, RESOURCE, classify_unwatched
from ._library import httpx
from ._streams import POLL, Stream
from ._trace import SENDING, Trace, Wire, wire_of
from ._transport import ClampedTimeouts, Generation, WatchedTransport

__all__ = ["AsyncPooledClient", "AsyncWatchedTransport"]


class AsyncPooledClient(Pooled, httpx.AsyncClient):
    """An ``httpx.AsyncClient`` for all tasks of a process. It lives on the process's event loop."""

    _lock = asyncio.Lock
    _declaration = "AsyncHttpxClient"

    async def send(
        self,
        request: httpx.Request,
        *,
        stream: bool = False,
        auth: Any = httpx.USE_CLIENT_DEFAULT,
        follow_redirects: Any = httpx.USE_CLIENT_DEFAULT,
    ) -> httpx.Response:
        """Send a request, as ``httpx.AsyncClient`` does.

        Raises:
            RuntimeError: The calling thread has another event loop, to which the connections do not belong.
        """
        self._opening.require_loop()
        chosen: Any = self.auth if auth is httpx.USE_CLIENT_DEFAULT else auth
        if isinstance(chosen, httpx.Auth) and not isinstance(chosen, SINGLE):
            chosen = _AsyncFlow(chosen, self._lock_of(chosen), self._opening)
        try:
            response = await super().send(request, stream=stream, auth=chosen, follow_redirects=follow_redirects)
        except httpx.TransportError as error:
            if RESOURCE not in failed_request(error, request).extensions:
                # By a mock in the place of the transports.
                self._unseen(request)
                self._opening.failed(error, classify_unwatched(error))
            raise
        if RESOURCE not in response.extensions:
            self._unseen(request)
        return response


# In messages and reprs it is what users know it as.
AsyncPooledClient.__name__ = AsyncPooledClient.__qualname__ = "AsyncClient"


class _AsyncFlow(Flow):
    """Follows the requests of another ``httpx.Auth``, as :class:`Flow` does."""

    async def async_auth_flow(self, request: httpx.Request) -> AsyncGenerator[httpx.Request, httpx.Response]:
        auth_flow = self._auth.async_auth_flow(request)
        locked = False
        sent = request
        try:
            locked = await self._acquired()
            step = await anext(auth_flow)
            while True:
                sent = step
                if is_plumbing(sent, request):
                    sent.extensions = {**sent.extensions, PLUMBING: True}
                elif locked:
                    self._release()
                    locked = False
                response = yield sent
                locked = locked or await self._acquired()
                try:
                    step = await auth_flow.asend(response)
                except StopAsyncIteration:
                    break
        finally:
            if locked:
                self._release()
            await auth_flow.aclose()
        self._ended_with(sent)

    async def _acquired(self) -> bool:
        if self._lock is None:
            return False
        try:
            return await asyncio.wait_for(self._lock.acquire(), deadline().clamp(TOKEN_WAIT))
        except asyncio.TimeoutError:
            return False


class _AsyncWire(Wire):
    """Replaces ``write()`` and ``aclose()`` of a connection's network stream."""

    flow = staticmethod(flow)

    def _replace(self, stream: Any) -> None:
        self._write = stream.write
        self._close = stream.aclose
        stream.write, stream.aclose = self.write, self

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:
        if SENDING and (trace := SENDING.pop(flow(), None)) is not None:
            trace.uses(self)
        await self._write(buffer, timeout)

    async def __call__(self) -> None:
        # Before closing: a closed stream cannot be inspected.
        reason = "" if self._reported else self._reason()
        try:
            await self._close()
        finally:
            # Cancelled, too: nothing keeps the connection then.
            self._report(reason)


class _AsyncTrace(Trace):
    """Tracks the progress of one request; httpcore awaits :meth:`hears` at each step."""

    flow = staticmethod(flow)
    wire = _AsyncWire

    async def hears(self, name: str, info: Any) -> None:
        """Note a step."""
        answer = self(name, info)
        if answer is not None:
            await answer

    def _head_failed(self, info: Any) -> None:
        SENDING.pop(flow(), None)
        # The event loop sends what it was given even when nobody waits for that any more.
        if type(info["exception"]).__name__ == "WriteError":
            super()._head_failed(info)

    def _reclaim(self) -> bool:
        if self._stream is None:
            # Interrupted before its response, or at its end.
            self._end()
            return False
        response = None if self._response is None else self._response()
        closing = (self._stream if response is None or response.is_closed else response).aclose()
        if on_loop():
            # A task within a coroutine: nothing waits here.
            start_coroutine(closing)
            return True
        run_coroutine(closing)
        if self._lease.is_active:
            # Closed before, but an interruption kept it from ending.
            self._end()
        return True


class AsyncWatchedTransport(WatchedTransport, httpx.AsyncBaseTransport):
    """Forwards requests to another asynchronous transport, as :class:`WatchedTransport` does."""

    base = httpx.AsyncBaseTransport
    network = httpx.AsyncHTTPTransport

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        try:
            return await self._sent(request)
        except httpx.TransportError as error:
            if not self._may_send_again(request, error, failure_of(error)):
                raise
        return await self._sent(request)

    async def _sent(self, request: httpx.Request) -> httpx.Response:
        before = request.extensions
        due = deadline()
        limit = self._limit(request, due)
        traced = self._current.traced
        trace = _AsyncTrace(
            self._traffic.opening, request, limit, traced=traced, keepalive_expiry=self._traffic.keepalive_expiry
        )
        trace.release = release = partial(self._release, trace)
        try:
            generation = self._acquire(trace)
            timeouts: Mapping[str, float | None] = before.get("timeout", {})
            if limit.at is not None:
                timeouts = ClampedTimeouts(timeouts, limit)
            request.extensions = {**before, "trace": trace.hears, "timeout": timeouts}
            if generation.streams is not None:
                trace.stream = Stream(generation.streams, request)
                await _acquire(trace.stream, timeouts.get("pool"))
            if not traced:
                trace.leaves()
            response: httpx.Response = await generation.transport.handle_async_request(request)
            trace.acquire()
            trace.unheard()
            response.extensions[RESOURCE] = self._traffic.opening.resource
            trace.arrives_over = wire = wire_of(response, "aclose")
            if wire is not None:
                wire.begin(trace)
            if response.is_closed:
                # A user's transport returned it with its whole body; no stream will be read.
                release()
                return response
            stream = _AsyncWatchedStream(
                cast(httpx.AsyncByteStream, response.stream),
                trace,
                release=release,
                failed=partial(self.failed, request=request, trace=trace, generation=generation),
                deadline=due,
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

    # A cancelled request replaces its generation, as an interrupted one does: httpcore may keep a connection for ever
    # that was made for it and never used, or whose response was being closed.

    def _close(self, generation: Generation) -> None:
        start_coroutine(self._closed_for(generation))

    async def _closed_for(self, generation: Generation) -> None:
        with self._traffic.opening.closing(generation.retired):
            await generation.transport.aclose()

    async def aclose(self) -> None:
        self._closed = True
        self._traffic.opening.ended()
        await self._current.transport.aclose()


async def _acquire(stream: Stream, timeout: float | None) -> None:
    """Wait until the connection has a stream free, as :meth:`Stream.acquire` does."""
    until = None if timeout is None else time.monotonic() + timeout
    while not stream.acquired(until):
        await asyncio.sleep(POLL)


class _AsyncWatchedStream(httpx.AsyncByteStream):
    """A response's body; its end ends the request."""

    def __init__(
        self,
        stream: httpx.AsyncByteStream,
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
        self._cancelled: BaseException | None = None

    async def __aiter__(self) -> AsyncIterator[bytes]:
        try:
            async for chunk in self._stream:
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
        except asyncio.CancelledError as error:
            self._cancelled = error
            raise
        # The end of a connection that the watchdog shut down may look like the end of its response.
        if not self._trace.in_time():
            raise self._failed(None)

    async def aclose(self) -> None:
        # Before the connection is another request's.
        self._trace.in_time()
        release, self._release = self._release, None
        error, self._cancelled = self._cancelled, None
        try:
            await self._stream.aclose()
        except BaseException as raised:
            error = raised
            raise
        finally:
            if release is not None:
                release(error)
