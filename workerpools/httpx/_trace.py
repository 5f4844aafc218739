"""Follows one request on the wire through httpcore's trace (the request extension ``trace``, a documented hook)."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

import httpx

from workerpools._pools.adapter import Opening
from workerpools._run import attempts
from workerpools._run.attempts import Effect, note_effect, withdraw_effect
from workerpools.httpx._closing import FAILING, Closing
from workerpools.httpx._errors import Progress, is_idempotent

__all__ = ["Trace", "reclaim"]


class _Handshake:
    """Stands for a connection between TCP and TLS: its descriptor has left one object and is in no other yet."""

    def __init__(self, number: int) -> None:
        self._number = number

    def fileno(self) -> int:
        return self._number


class Trace:
    """What became of one request; called by httpcore at each step.

    Args:
        opening: Where connections are reported.
        request: The request.
        watched: Whether the transport is known to tell of each step.
        keepalive_expiry: How long httpx keeps an idle connection, in seconds; None for ever.
    """

    def __init__(
        self, opening: Opening, request: httpx.Request, *, watched: bool, keepalive_expiry: float | None = None
    ) -> None:
        self._opening = opening
        self._keepalive_expiry = keepalive_expiry
        self._request = request
        self._chained: Callable[[str, Any], Any] | None = request.extensions.get("trace")
        self.progress = Progress(watched=watched)
        self._effect: Effect | None = None
        self._number = -1
        self._handshake = _Handshake(-1)
        self._wanted: float | None = opening.meter.waiting() if watched else None
        self._connecting = 0.0
        self._response: weakref.ref[httpx.Response] | None = None
        self._stream: httpx.SyncByteStream | None = None
        #: The thread that reads the response; 0 before it does.
        self.reader = 0
        if not watched:
            # It does not tell when it has got a connection.
            opening.meter.taken(id(self), attempts.current(), self)

    def __call__(self, name: str, info: Any) -> Any:
        # The first part of a name is the protocol: connection, http11, http2, proxy, socks.
        step = _STEPS.get(name.partition(".")[2])
        if step is not None:
            step(self, info)
        return self._chained(name, info) if self._chained is not None else None

    def _connects(self, info: Any) -> None:
        self._connecting = time.monotonic()
        self._opening.descriptors.connecting(info.get("port"))

    def _gives_up(self, info: Any) -> None:
        self._opening.descriptors.gave_up()

    def _connected(self, info: Any) -> None:
        self.progress.fresh = True
        stream = info["return_value"]
        connection = stream.get_extra_info("socket")
        if connection is not None:
            self._opening.connected(connection)
            self._number = connection.fileno()
            stream.close = Closing(stream, connection, self._opening, self._keepalive_expiry)

    def _starts_tls(self, info: Any) -> None:
        self._handshake = _Handshake(self._number)
        self._opening.descriptors.add(self._handshake)

    def _started_tls(self, info: Any) -> None:
        self.progress.fresh = True
        stream = info["return_value"]
        connection = stream.get_extra_info("socket")
        if connection is not None:
            # The same descriptor in a new object; the connection was counted when it was made.
            self._opening.descriptors.add(connection)
            self._opening.descriptors.drop(self._handshake)
            stream.close = Closing(stream, connection, self._opening, self._keepalive_expiry)

    def _failed_tls(self, info: Any) -> None:
        self._opening.descriptors.drop(self._handshake)

    def _head_starts(self, info: Any) -> None:
        self.progress.head_started = True
        self._acquired()
        self.leaves()

    def _head_failed(self, info: Any) -> None:
        self.progress.head_failed = True

    def _body_sent(self, info: Any) -> None:
        self.progress.body_sent = True

    def _answered(self, info: Any) -> None:
        self.progress.answered = True

    def _ends(self, info: Any) -> None:
        if not self.progress.answered:
            # The connection on which the request has failed is closed next.
            FAILING.add(threading.get_ident())

    def _ended(self, info: Any) -> None:
        if not self.progress.answered:
            FAILING.discard(threading.get_ident())

    def _acquired(self) -> None:
        wanted, meter = self._wanted, self._opening.meter
        if wanted is None:
            return
        self._wanted = None
        # The first sign of a connection is that something is done with it.
        creating = time.monotonic() - self._connecting if self.progress.fresh else 0.0
        if creating:
            meter.created(creating)
        meter.acquired(wanted, id(self), attempts.current(), creating=creating, reused=not creating, holder=self)

    def answers(self, response: httpx.Response, stream: httpx.SyncByteStream) -> None:
        """Note the response, whose connection is in use until ``stream`` is closed."""
        # Weakly the response and not the stream: httpcore keeps a connection in use though nobody reads it any more.
        self._response, self._stream = weakref.ref(response), stream

    def give_back(self) -> bool:
        """Close the response if it is not, unless another thread has read of it last; return whether it was closed."""
        if self._stream is None or self.reader not in (0, threading.get_ident()):
            return False
        response = None if self._response is None else self._response()
        if response is not None and not response.is_closed:
            # The outer one: whoever reads of it later is told that it is closed.
            response.close()
        else:
            self._stream.close()
        return True

    def over(self, error: BaseException | None = None) -> None:
        """Note that the request needs no connection any more, because of ``error`` or as it is answered."""
        wanted, self._wanted = self._wanted, None
        self._stream = None
        if wanted is None:
            self._opening.meter.returned(id(self))
        else:
            self._opening.meter.gave_up(wanted, timed_out=isinstance(error, httpx.PoolTimeout))

    def leaves(self) -> None:
        """Note the effect that the request may have, once."""
        if self._effect is None and not is_idempotent(self._request):
            self._effect = Effect(f"{self._request.method} by {self._opening.resource!r}")
            note_effect(self._effect)

    def never_left(self) -> None:
        """Take the effect back: the server cannot have acted on the request."""
        if self._effect is not None:
            withdraw_effect(self._effect)
            self._effect = None


def reclaim(trace: Any) -> bool:
    """Close the response of ``trace``; return whether it was open, and the calling thread's."""
    return isinstance(trace, Trace) and trace.give_back()


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
    "response_closed.started": Trace._ends,
    "response_closed.complete": Trace._ended,
    "response_closed.failed": Trace._ended,
}
