"""Follows one request on the wire through httpcore's trace (the request extension ``trace``, a documented hook)."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import httpx

from workerpools._core import scope
from workerpools._core.adapter import Opening
from workerpools._core.effects import Effect, note_effect, withdraw_effect
from workerpools._httpx_classify import Progress, is_idempotent

__all__ = ["Trace", "closing_of"]

_CONNECTING = (".connect_tcp.started", ".connect_unix_socket.started")
_GAVE_UP = (".connect_tcp.failed", ".connect_unix_socket.failed")
_ENDING = (".response_closed.started", ".response_closed.complete", ".response_closed.failed")
_OPENED = (".connect_tcp.complete", ".connect_unix_socket.complete", ".start_tls.complete")

#: The threads that are closing a connection because a request has failed on it.
_failing: set[int] = set()


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
        if not watched:
            # It does not tell when it has got a connection.
            opening.meter.taken(id(self), scope.current())

    def __call__(self, name: str, info: Any) -> Any:
        if name.endswith(_OPENED):
            self.progress.fresh = True
            self._opened(name, info["return_value"])
        elif name.endswith(_CONNECTING):
            self._connecting = time.monotonic()
            self._opening.descriptors.connecting(info.get("port"))
        elif name.endswith(".start_tls.started"):
            self._handshake = _Handshake(self._number)
            self._opening.descriptors.add(self._handshake)
        elif name.endswith(".start_tls.failed"):
            self._opening.descriptors.drop(self._handshake)
        elif name.endswith(_GAVE_UP):
            self._opening.descriptors.gave_up()
        elif name.endswith(".send_request_headers.started"):
            self.progress.head_started = True
            self._acquired()
            self.leaves()
        elif name.endswith(".send_request_headers.failed"):
            self.progress.head_failed = True
        elif name.endswith(".send_request_body.complete"):
            self.progress.body_sent = True
        elif name.endswith(".receive_response_headers.complete"):
            self.progress.answered = True
        elif not self.progress.answered and name.endswith(_ENDING):
            # Between the two the connection is closed on which the request has failed.
            (_failing.add if name.endswith(".started") else _failing.discard)(threading.get_ident())
        return self._chained(name, info) if self._chained is not None else None

    def _acquired(self) -> None:
        wanted, meter = self._wanted, self._opening.meter
        if wanted is None:
            return
        self._wanted = None
        # The first sign of a connection is that something is done with it.
        creating = time.monotonic() - self._connecting if self.progress.fresh else 0.0
        if creating:
            meter.created(creating)
        meter.acquired(wanted, id(self), scope.current(), creating=creating, reused=not creating)

    def over(self, error: BaseException | None = None) -> None:
        """Note that the request needs no connection any more, because of ``error`` or as it is answered."""
        wanted, self._wanted = self._wanted, None
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

    def _opened(self, name: str, stream: Any) -> None:
        connection = stream.get_extra_info("socket")
        if connection is None:
            return
        if name.endswith(".start_tls.complete"):
            # The same descriptor in a new object; the connection was counted when it was made.
            self._opening.descriptors.add(connection)
            self._opening.descriptors.drop(self._handshake)
            stream.close = Closing(stream, connection, self._opening, self._keepalive_expiry)
        else:
            self._opening.connected(connection)
            self._number = connection.fileno()
            stream.close = Closing(stream, connection, self._opening, self._keepalive_expiry)


class Closing:
    """Stands for the ``close`` of a connection's network stream: the trace has no event for it, and every way of
    closing a connection ends there.

    Args:
        stream: The network stream.
        connection: What it was reported as.
        opening: Where it was reported.
        keepalive_expiry: How long httpx keeps an idle connection, in seconds; None for ever.
    """

    def __init__(self, stream: Any, connection: object, opening: Opening, keepalive_expiry: float | None) -> None:
        self._stream = stream
        self._close = stream.close
        self._connection = connection
        self._opening = opening
        self._keepalive_expiry = keepalive_expiry
        self._users = 0
        self._idle_since: float | None = None
        self._told = False

    def begin(self) -> None:
        """Note that a response comes over the connection."""
        self._users += 1
        self._idle_since = None

    def end(self) -> None:
        """Note that a response has ended."""
        self._users -= 1
        if self._users == 0:
            self._idle_since = time.monotonic()

    def __call__(self) -> None:
        # Asked first: a closed one tells nothing.
        reason = "" if self._told else self._reason()
        self._close()
        if not self._told:
            self._told = True
            self._opening.disconnected(self._connection, reason=reason)

    def _reason(self) -> str:
        if self._idle_since is None:
            return ""
        failed = threading.get_ident() in _failing
        if (
            not failed
            and self._keepalive_expiry is not None
            and time.monotonic() - self._idle_since >= self._keepalive_expiry
        ):
            return "idle"
        # There is nothing to read from an idle connection but its end.
        return "stale" if self._stream.get_extra_info("is_readable") else ""


def closing_of(response: httpx.Response) -> Closing | None:
    """Return what stands for the close of the connection that ``response`` comes over, if it is known."""
    found = getattr(response.extensions.get("network_stream"), "close", None)
    return found if isinstance(found, Closing) else None
